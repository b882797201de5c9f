"""Find out from which sizes on this machine takes which path.

Sums of float32 arrays of rising sizes are timed on every path, whatever the sizes that are in use.
A path is taken from the size on from which it is not slower than the others, up to the largest
size. With --save the result is kept for this kind of machine, MPI library and number of ranks, and
`init` takes it from then on (``MPIDIST_CROSSOVERS`` overrides it).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mpidist._formatting import format_bytes
from mpidist._types import Array
from mpidist.backends.crossover_file import machine_name, user_file, write
from mpidist.backends.crossovers import NEVER, SMALL, Crossovers
from mpidist.backends.mpi.library import library_name, load_mpi
from mpidist.bench.harness import BenchmarkError, BenchmarkRun, add_effort, sweep
from mpidist.bench.report import Report, Row
from mpidist.bench.times import Series
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup

_PATHS = {
    "with arrival": Crossovers(small=SMALL, registered=NEVER, scratch=NEVER),
    "in place": Crossovers(small=0, registered=0, scratch=NEVER),
    "by scratch": Crossovers(small=0, registered=NEVER, scratch=0),
    "by library": Crossovers(small=0, registered=NEVER, scratch=NEVER),
}
"""Sizes that send every all_reduce one way; only the second is of registered memory."""

_LEGEND = {
    "with arrival": "each rank gives its array to all and combines them for itself",
    "in place": "arrays in registered memory, where they lie",
    "by scratch": "other arrays, by way of shared memory",
    "by library": "arrival, and then the MPI library's call",
}

_TOLERANCE = 1.02
"""A path that is slower by less than this is not slower: times are not more exact."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("64", "16MiB", 2), seconds=0.7)
    parser.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=user_file(),
        metavar="FILE",
        help="keep the result (default: %(const)s)",
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure every path over the sizes; collective over `world`."""
    bench = BenchmarkRun("crossovers", world, options)
    if world.transport.sums is None or world.num_nodes > 1:
        raise BenchmarkError(
            "bench crossovers: expected ranks of one node that share memory, under MPI; start it "
            "on one node with as many ranks as a job has there"
        )
    in_use = world.crossovers
    try:
        bench.measure_sizes("all_reduce", options.sizes, partial(_series, world))
    finally:
        world.crossovers = in_use
    measured = find(bench.rows)
    bench.notes += [
        f"{name}: {_format_size(getattr(measured, name))}"
        for name in ("small", "registered", "scratch")
    ]
    problem = "" if options.save is None else _save(options.save, measured, world)
    if options.save is not None and not problem:
        bench.notes.append(f"kept in {options.save} for {world.size} ranks and more")
    return bench.report(legend=_LEGEND, comparisons=(), failures=[problem] if problem else ())


def _save(path: Path, crossovers: Crossovers, world: ProcessGroup) -> str:
    """Keep the result, on rank 0; return why it could not be done, or nothing."""
    if world.rank == 0:
        try:
            write(path, machine_name(library_name(load_mpi())), world.size, crossovers)
        except OSError as error:
            return f"not kept in {path}: {error}"
    return ""


def _series(world: ProcessGroup, nbytes: int) -> list[Series]:
    count = nbytes // 4
    registered, ordinary = world.empty(count), np.zeros(count, np.float32)
    registered.fill(0)
    return [
        Series(name, _forced(world, sizes, registered if name == "in place" else ordinary))
        for name, sizes in _PATHS.items()
        if name != "with arrival" or nbytes <= SMALL
    ]


def _forced(world: ProcessGroup, sizes: Crossovers, x: Array) -> Callable[[], Array]:
    def call() -> Array:
        if world.crossovers is not sizes:
            world.crossovers = sizes
        return all_reduce(x, world, out=x)

    return call


def find(rows: Sequence[Row]) -> Crossovers:
    """Return the crossovers that the measured times of every path ask for."""
    sizes = sorted({row.nbytes for row in rows})
    times = {(row.series, row.nbytes): row.times.median for row in rows}

    def time(path: str, nbytes: int) -> float:
        return times.get((path, nbytes), float("inf"))

    def others(nbytes: int) -> float:
        return min(time("by scratch", nbytes), time("by library", nbytes))

    small = 0
    for nbytes in sizes:
        if time("with arrival", nbytes) > others(nbytes) * _TOLERANCE:
            break
        small = nbytes

    def from_which_on(path: str, peers: Callable[[int], float]) -> int:
        least = NEVER
        for nbytes in reversed(sizes):
            if time(path, nbytes) > peers(nbytes) * _TOLERANCE:
                break
            least = nbytes
        return least

    return Crossovers(
        small=small,
        registered=from_which_on(
            "in place", lambda nbytes: min(time("with arrival", nbytes), others(nbytes))
        ),
        scratch=from_which_on("by scratch", partial(time, "by library")),
    )


def _format_size(nbytes: int) -> str:
    return "never" if nbytes >= NEVER else f"{format_bytes(nbytes)} ({nbytes})"
