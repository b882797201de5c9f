"""What mpidist adds to the time of a small all_reduce.

20 calls in a row are timed together, as in a program that makes one call after another; the time
is that of one call. "added" is mpidist's median time less that of mpi4py's buffer call, "watched"
what the flight recorder and the deadline add: the time less that of the same sum by the same code
without them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from mpidist._types import SUM, Array, ReduceOp
from mpidist.backends.work import Waiter
from mpidist.bench.all_reduce import mpidist_and_library
from mpidist.bench.harness import BenchmarkRun, add_effort, sweep
from mpidist.bench.report import LIBRARY, ORDINARY, Comparison, Measure, Report
from mpidist.bench.times import Series, in_a_row
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup

UNWATCHED = "unwatched"

_CALLS = 20

_LEGEND = {
    ORDINARY: "mpidist.all_reduce(x, group, out=x)",
    LIBRARY: "comm.Allreduce(MPI.IN_PLACE, x) of mpi4py",
    UNWATCHED: "as ordinary, recording nothing and waiting for ever",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("4", "4KiB", 4))


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure small sums over the sizes; collective over `world`."""
    bench = BenchmarkRun("overhead", world, options)

    def make(nbytes: int) -> list[Series]:
        series = mpidist_and_library(world, nbytes, bench.notes)
        series = [one_series for one_series in series if one_series.name in (ORDINARY, LIBRARY)]
        series += _unwatched(world, nbytes, bench.notes)
        return [in_a_row(one_series, _CALLS) for one_series in series]

    bench.measure_sizes("all_reduce", options.sizes, make)
    return bench.report(
        legend=_LEGEND,
        comparisons=(
            Comparison("added", ORDINARY, LIBRARY, Measure.ADDED),
            Comparison("watched", ORDINARY, UNWATCHED, Measure.ADDED),
        ),
    )


class _Patience(Waiter):
    """Waits without a deadline."""

    operation = "all_reduce"

    def wait_for(
        self, ready: Callable[[], bool], *, missing: Callable[[], Sequence[int]] | None = None
    ) -> None:
        """Wait for ever."""
        while not ready():
            os.sched_yield()


def _unwatched(world: ProcessGroup, nbytes: int, notes: list[str]) -> list[Series]:
    """Return the sum as `Operations.repeat_sum` makes it, without recorder and deadline.

    Nothing where the sums of this group are not made there.
    """
    x = np.zeros(max(nbytes // 4, 1), np.float32)
    all_reduce(x, world, out=x)  # prepares it
    sums, patience = world.transport.sums, _Patience()
    if sums is None or sums.find(x, SUM) is None:
        notes.append("recorder and deadline are measured where all ranks share memory")
        return []

    def repeat_sum(x: Array, op: ReduceOp) -> bool:
        prepared = sums.find(x, op)
        if prepared is None:
            return False
        world.operations.collectives[0] += 1
        try:
            prepared.run(x, x, lambda: patience)
        except BaseException as error:
            world.operations.state.break_by(error)
            raise
        return True

    def call(x: Array, op: ReduceOp = SUM) -> Array:
        if repeat_sum(x, op):
            return x
        raise RuntimeError("the sum is not prepared any more")

    return [Series(UNWATCHED, partial(call, x))]
