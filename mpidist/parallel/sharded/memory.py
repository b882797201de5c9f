"""What training holds in memory: the bytes that are accounted for, and what the kernel counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpidist.collectives import all_reduce, barrier
from mpidist.group import ProcessGroup
from mpidist.nn.parameter import Parameter
from mpidist.optim import Optimizer

__all__ = ["MemoryLedger", "MemoryUse", "memory_ledger", "memory_use", "proportional_set_size"]

_ROLLUP = Path("/proc/self/smaps_rollup")
_DATA = ("Pss_Anon:", "Pss_Shmem:")
_UNITS = {"GiB": 2**30, "MiB": 2**20}


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes that training holds, by what they are for.

    Attributes
    ----------
    parameters, gradients, optimizer_state : int
        Bytes. Of memory that the ranks of a node share, each rank counts an equal share, so that
        the sum over a node's ranks is what the node holds.
    buffers : int
        Bytes of message buffers that are not gradients themselves, as a `DDP`'s are; of gradients
        beside them, as inside `FSDP.no_sync`; and of the slots in which units are gathered.
    peak_buffers : int
        The most that `buffers` has been.
    offloaded : int
        Bytes of parameters, gradients and state that ``FSDP(offload=...)`` keeps in host memory, or
        in files, instead; they are no part of the others.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    buffers: int = 0
    peak_buffers: int = 0
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All of them but `offloaded` together, with the buffers at their peak, in bytes."""
        most = max(self.buffers, self.peak_buffers)
        return self.parameters + self.gradients + self.optimizer_state + most


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """What one rank and all ranks of its node hold.

    Attributes
    ----------
    rank, node : MemoryUse
        Accounted for, of this rank and of all ranks of its node.
    rank_pss, node_pss : int or None
        What the kernel counts of this process's data, and of all of the node, in bytes; None where
        it does not report it. See `proportional_set_size`.
    """

    rank: MemoryUse
    node: MemoryUse
    rank_pss: int | None
    node_pss: int | None

    def __str__(self) -> str:
        """Return a table, in the largest unit of which this rank holds ten or more."""
        rows = [
            ("parameters", self.rank.parameters, self.node.parameters),
            ("gradients", self.rank.gradients, self.node.gradients),
            ("optimizer state", self.rank.optimizer_state, self.node.optimizer_state),
            ("buffers, now", self.rank.buffers, self.node.buffers),
            ("buffers, peak", self.rank.peak_buffers, self.node.peak_buffers),
            ("total", self.rank.total, self.node.total),
            ("all data (PSS)", self.rank_pss, self.node_pss),
        ]
        if self.node.offloaded:
            rows.insert(-1, ("offloaded", self.rank.offloaded, self.node.offloaded))
        name, unit = next(
            (known for known in _UNITS.items() if self.rank.total >= 10 * known[1]), ("KiB", 2**10)
        )
        lines = [f"{name:<20}{'this rank':>12}{'its node':>12}"]
        lines += [
            f"{what:<20}{_count(rank, unit)}{_count(node, unit)}" for what, rank, node in rows
        ]
        return "\n".join(lines)


class _HasParameters(Protocol):
    def parameters(self) -> Iterator[Parameter]:
        """Yield them, a shared one once."""


def memory_use(module: _HasParameters, optimizer: Optimizer) -> MemoryUse:
    """Count what a model and its optimizer hold on this rank alone.

    Parameters
    ----------
    module : Module or Pipeline
        The model, or this rank's stages of it; a shared parameter counts once.
    optimizer : Optimizer
        Its optimizer. A `ShardedOptimizer` counts by `ShardedOptimizer.memory_use`.

    Returns
    -------
    MemoryUse
        Gradients count from the first backward on, or once they are attached, as by `DDP`.

    Notes
    -----
    Local. Padding between gradients in a bucket, activations and buffers are not counted.
    """
    parameters = list(module.parameters())
    return MemoryUse(
        parameters=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(parameter.grad_nbytes for parameter in parameters),
        optimizer_state=array_bytes(optimizer.state_dict()),
    )


def array_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of all arrays in a state dict."""
    return sum(int(getattr(value, "nbytes", 0)) for value in state.values())


def memory_ledger(use: MemoryUse, group: ProcessGroup) -> MemoryLedger:
    """Add up what the ranks of each node hold.

    Parameters
    ----------
    use : MemoryUse
        Of this rank: `memory_use`, or `ShardedOptimizer.memory_use`.
    group : ProcessGroup
        The ranks of the job; those of one node are added up.

    Returns
    -------
    MemoryLedger
        Of this rank and its node.

    Notes
    -----
    Collective over `group`; blocks. A barrier and an all_reduce of 64 bytes in its `node_group`.
    """
    # A page that another rank has yet to touch would count as this rank's alone.
    barrier(group.node_group())
    pss = proportional_set_size()
    counts = np.array([*astuple(use), pss or 0, pss is not None], np.int64)
    *counted, pss_sum, known = all_reduce(counts, group.node_group()).tolist()
    node_pss = pss_sum if known == group.local_size else None
    return MemoryLedger(use, MemoryUse(*counted), pss, node_pss)


def proportional_set_size() -> int | None:
    """Return the kernel's count of this process's data.

    Returns
    -------
    int or None
        Bytes in memory, a page that n processes have mapped counting for one n-th in each: the sum
        over the ranks of a node is what they take together. None where the kernel does not report
        it (before Linux 5.4, elsewhere than Linux, or where ``/proc`` is hidden).

    Notes
    -----
    Local. Private and shared memory; not the pages of program files, of which a process's part
    changes whenever another one that runs the same programs starts or ends. The resident set size
    (RSS), which most tools show, counts a shared page once in each process. The kernel walks all of
    the process's pages: some milliseconds per GiB.

    References
    ----------
    proc_pid_smaps(5), ``/proc/pid/smaps_rollup``.
    """
    try:
        text = _ROLLUP.read_text(encoding="ascii")
    except OSError:
        return None
    lines = [line.split() for line in text.splitlines() if line.startswith(_DATA)]
    return sum(int(fields[1]) for fields in lines) * 1024 if lines else None


def _count(count: int | None, unit: int) -> str:
    return f"{'not told':>12}" if count is None else f"{count / unit:>12,.1f}"
