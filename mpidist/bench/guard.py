"""Whether all_reduce still is as fast, beside the MPI library, as it must be.

Only ratios of times taken in the same run are compared, with wide margins, and of 5th percentiles,
which calls that nobody disturbed decide: the check is to fail where a path is lost, not where a
machine is busy. What is not reached is measured again, and the best of the attempts counts. The
exit code is 1 where something was not reached in any.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from mpidist._formatting import format_bytes
from mpidist.bench.all_reduce import mpidist_and_library
from mpidist.bench.harness import add_effort, effort, require_ranks
from mpidist.bench.report import LIBRARY, ORDINARY, REGISTERED, Comparison, Machine, Report, Row
from mpidist.bench.times import Series, measure
from mpidist.group import ProcessGroup


@dataclass(frozen=True, slots=True)
class Floor:
    """The least speed that is accepted.

    Attributes
    ----------
    series : str
        Registered or ordinary memory.
    nbytes : int
        Of the array that each rank reduces.
    least : float
        The 5th percentile of the MPI library's time over that of the series.
    """

    series: str
    nbytes: int
    least: float


FLOORS = (
    Floor(REGISTERED, 1 << 20, 1.5),
    Floor(REGISTERED, 16 << 20, 1.5),
    Floor(ORDINARY, 1 << 20, 0.7),
    Floor(ORDINARY, 16 << 20, 0.15),
)
"""Far below what an idle machine with a core for each rank shows, far above the speed of a path
that has been lost.

Ordinary arrays of 16 MiB are 1.4 to 1.7 times as fast as MPICH where the two cores share a cache.
Where they do not, as in a virtual machine whose cores the host moves apart, each line that the
other rank wrote costs a transfer between caches, which MPICH's large messages avoid: there the
same code was measured at 0.32 to 0.50.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this check."""
    add_effort(parser, sizes=None, seconds=1.0)
    parser.add_argument(
        "--attempts",
        type=int,
        choices=range(1, 10),
        default=3,
        metavar="N",
        help="measure what is not reached up to N times, at most 9 (default: %(default)s)",
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure until everything is reached or the attempts are over; collective over `world`."""
    require_ranks(world, "guard")
    machine = Machine.of(world)
    notes: list[str] = []
    rows: list[Row] = []
    missed: Sequence[Floor] = FLOORS
    best = dict.fromkeys(FLOORS, 0.0)
    for attempt in range(1, options.attempts + 1):
        for nbytes in dict.fromkeys(floor.nbytes for floor in missed):
            series = mpidist_and_library(world, nbytes, notes)
            rows += _rows(series, nbytes, attempt, world, options)
        for floor in missed:
            best[floor] = max(best[floor], _speedup(rows, floor))
        missed = [floor for floor in missed if best[floor] < floor.least]
        if not missed:
            break
    return Report(
        benchmark="guard",
        machine=machine,
        rows=rows,
        comparisons=(
            Comparison("reg/library", REGISTERED, LIBRARY),
            Comparison("ord/library", ORDINARY, LIBRARY),
        ),
        notes=(*(_sentence(floor, best[floor]) for floor in FLOORS), *dict.fromkeys(notes)),
        failures=[_sentence(floor, best[floor]) for floor in missed],
    )


def _rows(
    series: Sequence[Series],
    nbytes: int,
    attempt: int,
    world: ProcessGroup,
    options: argparse.Namespace,
) -> list[Row]:
    times = measure(series, world, effort=effort(options))
    operation = f"all_reduce, attempt {attempt}"
    return [
        Row(operation=operation, series=name, nbytes=nbytes, times=measured)
        for name, measured in times.items()
    ]


def _speedup(rows: Sequence[Row], floor: Floor) -> float:
    """Return the speed of the latest attempt; 0 where there is no library to compare with."""
    latest = {row.series: row.times.p5 for row in rows if row.nbytes == floor.nbytes}
    return latest[LIBRARY] / latest[floor.series] if LIBRARY in latest else 0.0


def _sentence(floor: Floor, best: float) -> str:
    return (
        f"{floor.series} all_reduce of {format_bytes(floor.nbytes)}: {best:.2f} times the "
        f"library's speed, at least {floor.least:g} expected"
    )
