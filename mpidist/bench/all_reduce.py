"""The sum of float32 arrays over all ranks, in place.

Beside mpidist: the MPI library, Gloo through torch if it is installed, and the bound, which is the
arithmetic and the copies alone; over several nodes also the link, which is the network alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from mmap import mmap

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import split_evenly
from mpidist.backends.node.registered_memory import Block
from mpidist.bench.harness import BenchmarkRun, add_effort, sweep
from mpidist.bench.link import TcpRing, open_link
from mpidist.bench.peers import Gloo, find_library, open_gloo
from mpidist.bench.report import (
    BOUND,
    GLOO,
    LIBRARY,
    LINK,
    ORDINARY,
    REGISTERED,
    Comparison,
    Report,
)
from mpidist.bench.times import Series
from mpidist.bench.verbs import DTYPE, Arrays, checked, library_call, our_call, prepare
from mpidist.group import ProcessGroup

_BLOCK_BYTES = 256 << 10
"""What the bound adds and copies at a time, as the direct path does."""

_COMPARISONS = (
    Comparison("reg/library", REGISTERED, LIBRARY),
    Comparison("ord/library", ORDINARY, LIBRARY),
    Comparison("reg/Gloo", REGISTERED, GLOO),
    Comparison("of bound", REGISTERED, BOUND),
    Comparison("reg/link", REGISTERED, LINK),
    Comparison("ord/link", ORDINARY, LINK),
)

_LEGEND = {
    REGISTERED: "mpidist.all_reduce(x, group, out=x), x made by group.empty",
    ORDINARY: "the same, x made by numpy",
    LIBRARY: "comm.Allreduce(MPI.IN_PLACE, x) of mpi4py, x made by numpy",
    GLOO: "torch.distributed.all_reduce(torch.from_numpy(x))",
    LINK: "raw TCP sockets between nodes, both ways at once, of the least bytes that a sum sends",
    BOUND: "the additions and copies alone, on private memory, by all ranks at once; no meeting",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("4", "64MiB", 4))
    parser.add_argument("--no-gloo", action="store_true", help="leave out the peer Gloo")
    parser.add_argument(
        "--rewrite",
        action="store_true",
        help="let each rank write its array before each call, as a program does: a rank that sums "
        "arrays again and again otherwise finds what it needs in its own cache",
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure all_reduce over the sizes; collective over `world`."""
    bench = BenchmarkRun("all_reduce", world, options)
    notes = bench.notes
    if options.rewrite:
        notes.append(
            "each rank writes its array before each call; the bound works on its own memory"
        )
    shared_cores = world.local_size > bench.machine.usable_cores
    if shared_cores:
        notes.append("no bound: there are more ranks than cores, and they would take turns")
    peer = nullcontext("Gloo was left out") if options.no_gloo else open_gloo(world)
    with peer as gloo, open_link(world) as link:
        notes.append(gloo if isinstance(gloo, str) else gloo.describe())
        if isinstance(link, str) and world.num_nodes > 1:
            notes.append(link)

        def make(nbytes: int) -> list[Series]:
            series = mpidist_and_library(world, nbytes, notes, rewrite=options.rewrite)
            if isinstance(gloo, Gloo):
                arrays = _in_place(world, partial(np.empty, dtype=DTYPE), nbytes)
                call = partial(gloo.torch.distributed.all_reduce, gloo.torch.from_numpy(arrays.x))
                series.append(checked(GLOO, call, arrays, world, rewrite=options.rewrite))
            if isinstance(link, TcpRing):
                series.append(Series(LINK, link.transfer(nbytes)))
            return series if shared_cores else [*series, bound_series(world, nbytes)]

        bench.measure_sizes("all_reduce", options.sizes, make)
    return bench.report(legend=_LEGEND, comparisons=_COMPARISONS)


def mpidist_and_library(
    world: ProcessGroup, nbytes: int, notes: list[str], *, rewrite: bool = False
) -> list[Series]:
    """Return the series of mpidist and, unless a note says that it is missing, of the MPI library.

    Each has given the right sum once. The sums that are timed are of zeros: in place, others would
    grow without end. With `rewrite` each rank writes its array before each call. Collective over
    `world`; blocks.
    """
    ordinary = _in_place(world, partial(np.empty, dtype=DTYPE), nbytes)
    registered = _in_place(world, partial(world.empty, dtype=DTYPE), nbytes)
    series = [
        checked(name, our_call("all_reduce", arrays, world), arrays, world, rewrite=rewrite)
        for name, arrays in ((REGISTERED, registered), (ORDINARY, ordinary))
    ]
    peer = find_library(world, notes)
    if peer is not None:
        call = library_call("all_reduce", ordinary, peer)
        series.append(checked(LIBRARY, call, ordinary, world, rewrite=rewrite))
    return series


def _in_place(world: ProcessGroup, make: Callable[[int], Array], nbytes: int) -> Arrays:
    return prepare("all_reduce", world, make, max(nbytes // DTYPE.itemsize, 1))


def bound_series(world: ProcessGroup, nbytes: int) -> Series:
    """Return the work that remains where nothing is sent and nobody waits; local.

    A rank's share of the direct path on memory of its own: of p arrays, laid out as registered ones
    are, it adds its 1/p slices into the first one, a block at a time, and copies the block into the
    others.
    """
    stride, count = Block.stride(nbytes), nbytes // DTYPE.itemsize
    memory = np.frombuffer(mmap(-1, world.size * stride), np.uint8).reshape(world.size, stride)
    start, size = split_evenly(count, world.size)[world.rank]
    slices = memory.view(DTYPE)[:, start : start + size]
    slices[...] = 0
    step = _BLOCK_BYTES // DTYPE.itemsize
    blocks = [list(slices[:, at : at + step]) for at in range(0, size, step)]
    return Series(BOUND, partial(_add_and_copy, blocks))


def _add_and_copy(blocks: list[list[Array]]) -> None:
    for first, *others in blocks:
        for other in others:
            np.add(first, other, out=first)
        for other in others:
            np.copyto(other, first)
