"""What mpidist adds to the time of a small all_reduce.

20 calls in a row are timed together, as in a program that makes one call after another; the time
is that of one call. "added" is mpidist's median time less that of mpi4py's buffer call.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mpidist.bench.all_reduce import mpidist_and_library
from mpidist.bench.machine import Machine
from mpidist.bench.options import add_effort, require_ranks
from mpidist.bench.report import LIBRARY, ORDINARY, Comparison, Measure, Report
from mpidist.bench.sizes import sweep
from mpidist.bench.sweeps import rows_over
from mpidist.bench.times import Series
from mpidist.group import ProcessGroup

__all__ = ["configure", "run"]

_CALLS = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("4", "4KiB", 4))


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure small sums over the sizes; collective over `world`."""
    require_ranks(world, "overhead")
    machine = Machine.of(world)
    notes: list[str] = []

    def make(nbytes: int) -> list[Series]:
        series = mpidist_and_library(world, nbytes, notes)
        return [_in_a_row(each) for each in series if each.name in (ORDINARY, LIBRARY)]

    return Report(
        benchmark="overhead",
        machine=machine,
        rows=rows_over(options.sizes, make, world, operation="all_reduce", options=options),
        comparisons=(Comparison("added", ORDINARY, LIBRARY, Measure.ADDED),),
        legend={
            ORDINARY: "mpidist.all_reduce(x, group, out=x)",
            LIBRARY: "comm.Allreduce(MPI.IN_PLACE, x) of mpi4py",
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def _in_a_row(series: Series) -> Series:
    def calls(call: Callable[[], Any] = series.call) -> None:
        for _ in range(_CALLS):
            call()

    return replace(series, call=calls, operations=_CALLS)
