"""The report of a benchmark: its machine, its rows and targets, as objects and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from mpidist import env
from mpidist._fields import from_fields
from mpidist._formatting import format_count
from mpidist.backends.crossover_file import processor
from mpidist.backends.mpi.library import library_name, load_mpi
from mpidist.bench.times import Times
from mpidist.collectives import all_gather_object
from mpidist.group import ProcessGroup

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
        Memory of this node, in bytes.
    kernel, python, numpy, mpi4py : str
        Versions; mpi4py's is empty where it is not installed.
    mpi : str
        Name and version of the MPI library; empty where the ranks do not stand on MPI.
    ranks, nodes : int
        How many the job has.
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
            mpi=library_name(load_mpi()) if group.transport.name == "mpi" else "",
            ranks=group.size,
            nodes=group.num_nodes,
            omp_num_threads=env.omp_num_threads(),
            load=round(os.getloadavg()[0], 2),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )

    def lines(self) -> list[str]:
        """Return the description as people read it."""
        mpi = f", mpi4py {self.mpi4py}, {self.mpi}" if self.mpi else ""
        ranks, nodes = format_count(self.ranks, "rank"), format_count(self.nodes, "node")
        cores = f"{format_count(self.cores, 'core')} ({self.usable_cores} usable)"
        caches = ", ".join(self.caches) or "caches unknown"
        memory = f"{self.memory_bytes / 2**30:.0f} GiB of memory"
        return [
            f"{ranks} on {nodes} with {cores}; OMP_NUM_THREADS {self.omp_num_threads or 'not set'}",
            f"{self.processor}; {caches}; {memory}",
            f"{self.kernel}, Python {self.python}, numpy {self.numpy}{mpi}",
            *([self.gpu] if self.gpu else []),
            f"{self.date}, load average {self.load:g} before",
        ]


def _caches() -> tuple[str, ...]:
    """Return level, size and sharers of each data cache of the first core."""
    caches = []
    for directory in sorted(_CPU.glob("cache/index*")):
        level, kind, size, shared = (
            (directory / name).read_text(encoding="utf-8").strip()
            for name in ("level", "type", "size", "shared_cpu_list")
        )
        # A list such as 0-3,8 names five cores.
        spans = [span.partition("-") for span in shared.split(",")]
        cores = sum(int(last or first) - int(first) + 1 for first, _, last in spans)
        if kind != "Instruction":
            caches.append(f"L{level} {size} per {f'{cores} cores' if cores > 1 else 'core'}")
    return tuple(caches)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


REGISTERED = "registered"
"""Series: mpidist on arrays of `ProcessGroup.empty`."""

ORDINARY = "ordinary"
"""Series: mpidist on any other arrays."""

LIBRARY = "library"
"""Series: the MPI library itself, through mpi4py's buffer calls."""

GLOO = "Gloo"
"""Series: torch.distributed on Gloo."""

LINK = "link"
"""Series: the network between the nodes, without MPI."""

BOUND = "bound"
"""Series: the additions and copies that the operation cannot do without."""

_FORMAT = 1

_FACTORS: Mapping[str, tuple[float, float]] = {
    "all_reduce": (2.0, -2.0),
    **dict.fromkeys(("all_gather", "all_to_all", "reduce_scatter"), (1.0, -1.0)),
    **dict.fromkeys(("broadcast", "reduce", "ping-pong", "window", "sendrecv"), (1.0, 0.0)),
}
"""The bus factor is the first number plus the second over the number of ranks."""


def bus_factor(operation: str, ranks: int) -> float | None:
    """Return bus bandwidth over algorithm bandwidth, or None for what moves no bytes.

    Parameters
    ----------
    operation : str
        A verb; others have no bandwidth.
    ranks : int
        Number of ranks taking part.

    Returns
    -------
    float or None
        2 (p - 1) / p for all_reduce, (p - 1) / p for all_gather, reduce_scatter and all_to_all,
        and 1 for broadcast, reduce and messages.

    References
    ----------
    NVIDIA, nccl-tests, doc/PERFORMANCE.md, sections "Algorithm bandwidth" and "Bus bandwidth".
    """
    if operation not in _FACTORS:
        return None
    constant, over_ranks = _FACTORS[operation]
    return constant + over_ranks / ranks


class Measure(Enum):
    """How two series are compared, by their medians.

    Notes
    -----
    `SPEEDUP` is the reference's time over the series' time, larger is faster; `ADDED` is the
    series' time less the reference's, in seconds.
    """

    SPEEDUP = "speedup"
    ADDED = "added"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A column of a table that compares two series of the same operation and size.

    Attributes
    ----------
    title : str
        Head of the column.
    series, reference : str
        Names of what is compared, and with what.
    measure : Measure
        Whether the column is a ratio or a difference of the times.
    """

    title: str
    series: str
    reference: str
    measure: Measure = Measure.SPEEDUP

    def of(self, time: Times, reference: Times) -> float:
        """Return the value for two times."""
        if self.measure is Measure.ADDED:
            return time.median - reference.median
        return reference.median / time.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One series at one size.

    Attributes
    ----------
    operation : str
        What was done, such as ``all_reduce``.
    series : str
        By whom, such as ``library``.
    nbytes : int
        Of the whole array: what every rank contributes to an all_reduce, what all ranks together
        hold after an all_gather or contributed to a reduce_scatter.
    times : Times
        In seconds per operation, each that of the slowest rank.
    bus_factor : float or None
        See `bus_factor`; None where there is no bandwidth.
    values : mapping of str to float
        What else belongs to the row; the benchmark's docstring says what.
    """

    operation: str
    series: str
    nbytes: int
    times: Times
    bus_factor: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def algorithm_bandwidth(self) -> float | None:
        """Bytes per second of median time: `nbytes` over time."""
        return None if self.bus_factor is None else self.nbytes / self.times.median

    @property
    def bus_bandwidth(self) -> float | None:
        """Algorithm bandwidth times the bus factor, in bytes per second."""
        bandwidth = self.algorithm_bandwidth
        return None if bandwidth is None or not self.bus_factor else bandwidth * self.bus_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that is to be reached, and what was measured.

    Attributes
    ----------
    what : str
        Such as ``save, over plain writing``.
    value : float
        The measured value, in the unit that `what` names.
    bound : float
        What it is to be.
    most : bool
        Whether `bound` is the most that it may be; else it is the least.
    detail : str
        What the value is made of, for people.
    """

    what: str
    value: float
    bound: float
    most: bool = False
    detail: str = ""

    @property
    def reached(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound if self.most else self.value >= self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one run of a benchmark found.

    Attributes
    ----------
    benchmark : str
        Its name on the command line.
    machine : Machine
        Hardware, software and load of the run.
    rows : sequence of Row
        One per operation, size and series, in the order in which they were measured.
    comparisons : sequence of Comparison
        What the table compares.
    targets : sequence of Target
        What is to be reached.
    legend : mapping of str to str
        What each series is, for people.
    notes : sequence of str
        What is missing and why, for people.
    failures : sequence of str
        What the run was to show and did not; with any, the command's exit code is 1.
    command : sequence of str
        The words of the command line that made it, from ``bench`` on.
    """

    benchmark: str
    machine: Machine
    rows: Sequence[Row]
    comparisons: Sequence[Comparison] = ()
    targets: Sequence[Target] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()
    command: Sequence[str] = ()

    def find(self, operation: str, series: str, nbytes: int) -> Row | None:
        """Return the row of this operation, series and size, or None."""
        for row in self.rows:
            if (row.operation, row.series, row.nbytes) == (operation, series, nbytes):
                return row
        return None

    def compare(self, comparison: Comparison, operation: str, nbytes: int) -> float | None:
        """Return a comparison's value, or None where one of the two series is missing."""
        row = self.find(operation, comparison.series, nbytes)
        reference = self.find(operation, comparison.reference, nbytes)
        if row is None or reference is None:
            return None
        return comparison.of(row.times, reference.times)

    def to_json(self) -> str:
        """Return the report as JSON: times in seconds, all percentiles, bandwidths in bytes/s."""
        document: dict[str, Any] = {"format": _FORMAT} | asdict(self)
        for written, row in zip(document["rows"], self.rows, strict=True):
            written["algorithm_bandwidth"] = row.algorithm_bandwidth
            written["bus_bandwidth"] = row.bus_bandwidth
        for written, target in zip(document["targets"], self.targets, strict=True):
            written["reached"] = target.reached
        return json.dumps(document, indent=1, default=lambda measure: measure.value) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Parameters
        ----------
        text : str
            A JSON document that `to_json` returned.

        Returns
        -------
        Report
            Equal to the one that was written.

        Raises
        ------
        ValueError
            If it is not such a document, or of another format.
        """
        document = json.loads(text)
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(
                "this is no report that `python -m mpidist bench ... --json FILE` of this version "
                f"wrote: expected a JSON object with format {_FORMAT}"
            )
        return from_fields(cls, document)

    def save(self, path: Path) -> None:
        """Write the report as JSON into a file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report from a file that `save` or ``--json`` wrote."""
        return cls.from_json(path.read_text(encoding="utf-8"))
