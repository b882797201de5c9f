"""Where a benchmark ran: without this a time means nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from mpidist import env
from mpidist.backends.crossover_file import processor
from mpidist.backends.mpi.library import library_name, load_mpi
from mpidist.collectives import all_gather_object
from mpidist.group import ProcessGroup

__all__ = ["Machine"]

_CPU = Path("/sys/devices/system/cpu/cpu0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a benchmark ran on, seen from one rank.

    Attributes
    ----------
    processor : str
        Model of the CPU.
    cores : int
        Of this node, as the kernel counts them.
    usable_cores : int
        On which the ranks of this node may run, all of them together.
    caches : tuple of str
        Of the first core, with how many cores share each.
    memory_bytes : int
        Of this node.
    kernel, python, numpy, mpi4py : str
        Versions; mpi4py's is empty where it is not installed.
    mpi : str
        Name and version of the MPI library; empty where the ranks do not stand on MPI.
    ranks, nodes : int
        Of the job.
    omp_num_threads : str
        ``OMP_NUM_THREADS``; empty where it is not set.
    load : float
        Processes that wanted to run in the minute before, the ranks' own start included.
    date : str
        When the measuring began, in UTC.
    gpu : str
        Name of this rank's GPU, and the versions of what drives it; empty where none was measured.
    """

    processor: str
    cores: int
    usable_cores: int
    caches: tuple[str, ...]
    memory_bytes: int
    kernel: str
    python: str
    numpy: str
    mpi4py: str
    mpi: str
    ranks: int
    nodes: int
    omp_num_threads: str
    load: float
    date: str
    gpu: str = ""

    @classmethod
    def of(cls, group: ProcessGroup) -> Machine:
        """Describe the machine of this rank; collective over `group`."""
        allowed = all_gather_object((group.node_rank, os.sched_getaffinity(0)), group)
        usable = {core for node, cores in allowed if node == group.node_rank for core in cores}
        return cls(
            processor=processor(),
            cores=os.cpu_count() or 1,
            usable_cores=len(usable),
            caches=_caches(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            numpy=metadata.version("numpy"),
            mpi4py=_version("mpi4py"),
            mpi=library_name(load_mpi()) if group._backend.name == "mpi" else "",
            ranks=group.size,
            nodes=group.num_nodes,
            omp_num_threads=env.omp_num_threads(),
            load=round(os.getloadavg()[0], 2),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )

    def lines(self) -> list[str]:
        """Return the description as people read it."""
        mpi = f", mpi4py {self.mpi4py}, {self.mpi}" if self.mpi else ""
        ranks, nodes = _number(self.ranks, "rank"), _number(self.nodes, "node")
        cores = f"{_number(self.cores, 'core')} ({self.usable_cores} usable)"
        caches = ", ".join(self.caches) or "caches unknown"
        memory = f"{self.memory_bytes / 2**30:.0f} GiB of memory"
        return [
            f"{ranks} on {nodes} with {cores}; OMP_NUM_THREADS {self.omp_num_threads or 'not set'}",
            f"{self.processor}; {caches}; {memory}",
            f"{self.kernel}, Python {self.python}, numpy {self.numpy}{mpi}",
            *([self.gpu] if self.gpu else []),
            f"{self.date}, load average {self.load:g} before",
        ]


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def _caches() -> tuple[str, ...]:
    """Return level, size and sharers of each data cache of the first core."""
    found = []
    for directory in sorted(_CPU.glob("cache/index*")):
        level, kind, size, shared = (
            (directory / name).read_text(encoding="utf-8").strip()
            for name in ("level", "type", "size", "shared_cpu_list")
        )
        cores = _count(shared)
        if kind != "Instruction":
            found.append(f"L{level} {size} per {f'{cores} cores' if cores > 1 else 'core'}")
    return tuple(found)


def _count(cores: str) -> int:
    """Return how many numbers a list such as ``0-3,8`` names."""
    spans = [span.partition("-") for span in cores.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
