"""The other collectives on float32 arrays, and barrier.

The size is that of the whole array: what all ranks hold after an all_gather, what each contributes
to the others. all_gather and broadcast are in place, the rest write into another array.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np

from mpidist.bench.harness import BenchmarkRun, add_effort, sweep
from mpidist.bench.peers import LibraryPeer, find_library
from mpidist.bench.report import LIBRARY, ORDINARY, REGISTERED, Comparison, Report
from mpidist.bench.times import Series
from mpidist.bench.verbs import DTYPE, checked, divisible, library_call, our_call, prepare
from mpidist.collectives import barrier
from mpidist.group import ProcessGroup

_LEGEND = {
    REGISTERED: "mpidist on arrays made by group.empty",
    ORDINARY: "mpidist on arrays made by numpy",
    LIBRARY: "the buffer calls of mpi4py on arrays made by numpy",
}

_COMPARISONS = (
    Comparison("reg/library", REGISTERED, LIBRARY),
    Comparison("ord/library", ORDINARY, LIBRARY),
)

VERBS = ("reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("1KiB", "64MiB", 16), seconds=1.0)
    names = [*VERBS, "barrier"]
    parser.add_argument(
        "--verbs", nargs="+", choices=names, default=names, help="which ones (default: all)"
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the collectives over the sizes; collective over `world`."""
    bench = BenchmarkRun("collectives", world, options)
    peer = find_library(world, bench.notes)
    sizes = list(dict.fromkeys(divisible(nbytes, world.size) for nbytes in options.sizes))
    for verb in dict.fromkeys(options.verbs):
        of = [0] if verb == "barrier" else sizes
        bench.measure_sizes(verb, of, partial(_series, verb, world, peer))
    return bench.report(legend=_LEGEND, comparisons=_COMPARISONS)


def _series(verb: str, world: ProcessGroup, peer: LibraryPeer | None, nbytes: int) -> list[Series]:
    """Return one series per memory and peer, each of which has given the right result once."""
    if verb == "barrier":
        series = [Series(ORDINARY, partial(barrier, world))]
        return series if peer is None else [*series, Series(LIBRARY, peer.comm.Barrier)]
    series = []
    for name in (REGISTERED, ORDINARY) if peer is None else (REGISTERED, ORDINARY, LIBRARY):
        make = partial(world.empty if name == REGISTERED else np.empty, dtype=DTYPE)
        arrays = prepare(verb, world, make, nbytes // DTYPE.itemsize)
        if name == LIBRARY and peer is not None:
            call = library_call(verb, arrays, peer)
        else:
            call = our_call(verb, arrays, world)
        series.append(checked(name, call, arrays, world))
    return series
