"""The peers that are measured beside mpidist; the only module of the benchmarks that uses torch."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from mpidist._optional import require
from mpidist._types import Array
from mpidist.backends.mpi.library import load_mpi
from mpidist.collectives import all_gather_object, broadcast_object
from mpidist.errors import BackendUnavailableError
from mpidist.group import ProcessGroup

_TIMEOUT = timedelta(seconds=60)


class LibraryPeer(NamedTuple):
    """The MPI library of a group: ``mpi4py.MPI``, and the communicator of its ranks."""

    mpi: Any
    comm: Any


def find_library(group: ProcessGroup, notes: list[str]) -> LibraryPeer | None:
    """Return the MPI library of a group, or None and a note where it stands on none."""
    try:
        return LibraryPeer(load_mpi(), group.mpi_comm)
    except BackendUnavailableError as error:
        notes.append(f"the MPI library is missing: {error}")
        return None


class Gloo(NamedTuple):
    """torch.distributed with Gloo as its default process group: ``torch``, and its version."""

    torch: Any
    version: str

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Let torch compute in one thread inside: a rank has one core."""
        threads = self.torch.get_num_threads()
        self.torch.set_num_threads(1)
        try:
            yield
        finally:
            self.torch.set_num_threads(threads)

    def describe(self) -> str:
        """Return version and threads, for a note."""
        return (
            f"Gloo is that of torch {self.version}, OpenMP threads: {self.torch.get_num_threads()}"
        )


class TorchCheckpoints:
    """torch.distributed.checkpoint of arrays, the same on all ranks.

    Each rank holds them all or, `sharded`, its part of them, cut on dim 0.
    """

    def __init__(
        self, gloo: Gloo, arrays: Mapping[str, Array], *, sharded: bool, ranks: int
    ) -> None:
        purpose = "the peer torch.distributed.checkpoint"
        self._dcp: Any = require("torch.distributed.checkpoint", extra="torch", purpose=purpose)
        self._state = {name: gloo.torch.from_numpy(array) for name, array in arrays.items()}
        if sharded:
            tensor: Any = require("torch.distributed.tensor", extra="torch", purpose=purpose)
            cut = (tensor.init_device_mesh("cpu", (ranks,)), [tensor.Shard(0)])
            for name, array in self._state.items():
                self._state[name] = tensor.distribute_tensor(array, *cut)

    def save(self, path: Path) -> None:
        """Save into a directory; collective, blocks."""
        self._dcp.save(self._state, checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Load from it; collective, blocks."""
        self._dcp.load(self._state, checkpoint_id=path)


def shard_fully(model: Any, units: Sequence[Sequence[str]], ranks: int) -> None:
    """Shard a model of torch by its FSDP2, ``fully_shard``, over so many ranks.

    Each unit is given by the names of its parameters; a module is whole in the first unit that has
    one of its own. Collective.
    """
    purpose = "the peer FSDP2"
    fsdp: Any = require("torch.distributed.fsdp", extra="torch", purpose=purpose)
    meshes: Any = require("torch.distributed.device_mesh", extra="torch", purpose=purpose)
    mesh = meshes.init_device_mesh("cpu", (ranks,))
    sharded: set[str] = set()
    for parameters in units:
        owners = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        names = [name for name in owners if name not in sharded]
        if names:
            fsdp.fully_shard([model.get_submodule(name) for name in names], mesh=mesh)
        sharded.update(names)
    fsdp.fully_shard(model, mesh=mesh)


def pipeline_step(
    schedule: str, stage: Any, group: ProcessGroup, micro_batches: int, loss: Callable[..., Any]
) -> Callable[[Any, Any], None]:
    """Return a step of torch's schedule of this name, ``"gpipe"`` or ``"1f1b"``: of x and target.

    It forgets the gradients, and adds those of all micro-batches. `loss` takes output and target.
    """
    purpose = "the peer torch.distributed.pipelining"
    pipelining: Any = require("torch.distributed.pipelining", extra="torch", purpose=purpose)
    kind = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}[schedule]
    part = pipelining.PipelineStage(stage, group.rank, group.size, "cpu")
    made = kind(part, micro_batches, loss_fn=loss, scale_grads=False)
    last = group.rank == group.size - 1

    def step(x: Any, target: Any) -> None:
        stage.zero_grad()
        made.step(*((x,) if group.rank == 0 else ()), target=target if last else None)

    return step


@contextmanager
def open_gloo(group: ProcessGroup) -> Iterator[Gloo | str]:
    """Start torch.distributed with Gloo on the ranks of a group, if all of them have torch.

    Gives, on all ranks alike, the peer or the sentence that says why there is none. The default
    process group, with the ranks of `group` in their order, is destroyed at the end. Collective;
    blocks. The ranks meet at a TCP store on the first rank's host, whose port the kernel chooses;
    no variable of the environment is read or set.
    """
    try:
        torch: Any = require("torch", extra="torch", purpose="the peer Gloo")
        require("torch.distributed", extra="torch", purpose="the peer Gloo")
        problem = "" if torch.distributed.is_gloo_available() else "this torch has no Gloo"
        problem = problem or _unreachable(group)
    except BackendUnavailableError as error:
        torch, problem = None, str(error)
    problem = _first(problem, group)
    if not problem:
        problem = _first(_start(torch, group), group)
    if problem:
        yield f"Gloo is missing: {problem}"
        return
    try:
        yield Gloo(torch, torch.__version__)
    finally:
        torch.distributed.destroy_process_group()


def _unreachable(group: ProcessGroup) -> str:
    """Return why the other nodes could not reach this one by its name, or nothing."""
    if group.num_nodes > 1:
        try:
            socket.getaddrinfo(socket.gethostname(), None)
        except OSError as error:  # torch would try again for a minute
            return f"the name of the host {socket.gethostname()} is not known ({error})"
    return ""


def _start(torch: Any, group: ProcessGroup) -> str:
    """Make torch's default process group; return what failed, or nothing."""
    distributed = torch.distributed
    store, port, failed = None, 0, "torch's TCP store did not start on rank 0"
    host = "127.0.0.1" if group.num_nodes == 1 else socket.gethostname()
    options = {"world_size": group.size, "timeout": _TIMEOUT, "wait_for_workers": False}
    try:
        if group.rank == 0:
            store = distributed.TCPStore(host, 0, is_master=True, **options)
            port = store.port
    except Exception as error:  # noqa: BLE001  # a peer that cannot start is a note in the table
        failed = f"torch's TCP store did not start ({error})"
    host, port = broadcast_object((host, port), group)
    if not port:
        return failed
    try:
        if store is None:
            store = distributed.TCPStore(host, port, is_master=False, **options)
        distributed.init_process_group(
            "gloo", store=store, rank=group.rank, world_size=group.size, timeout=_TIMEOUT
        )
    except Exception as error:  # noqa: BLE001  # the same
        return f"torch.distributed did not start with Gloo ({error})"
    return ""


def _first(problem: str, group: ProcessGroup) -> str:
    """Return the problem of the first rank that has one, the same on all."""
    return next(filter(None, all_gather_object(problem, group)), "")
