"""The other collectives on float32 arrays, and barrier.

The size is that of the whole array: what all ranks hold after an all_gather, what each contributes
to the others. all_gather and broadcast are in place, the rest write into another array.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.bench.machine import Machine
from mpidist.bench.options import add_effort, require_ranks
from mpidist.bench.peers import Library, find_library
from mpidist.bench.report import LIBRARY, ORDINARY, REGISTERED, Comparison, Report, Row
from mpidist.bench.sizes import sweep
from mpidist.bench.sweeps import rows_over
from mpidist.bench.times import Series
from mpidist.collectives import (
    all_gather,
    all_to_all,
    barrier,
    broadcast,
    reduce,
    reduce_scatter,
)
from mpidist.group import ProcessGroup

__all__ = ["VERBS", "Prepared", "configure", "run"]

_DTYPE = np.dtype(np.float32)

_LEGEND = {
    REGISTERED: "mpidist on arrays made by group.empty",
    ORDINARY: "mpidist on arrays made by numpy",
    LIBRARY: "the buffer calls of mpi4py on arrays made by numpy",
}

_COMPARISONS = (
    Comparison("reg/library", REGISTERED, LIBRARY),
    Comparison("ord/library", ORDINARY, LIBRARY),
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call, and how one sees that it does what it should.

    Attributes
    ----------
    call : callable
        Without arguments.
    x, out : Array
        What this rank contributes, and where it finds the result; may be the same.
    expected : Array or float
        The result if every rank contributes its number plus one.
    """

    call: Callable[[], Any]
    x: Array
    out: Array
    expected: Array | float


Empty = Callable[[int], Array]
"""Makes an array of so many elements; collective."""


def _reduce_scatter(
    world: ProcessGroup, peer: Library | None, empty: Empty, count: int
) -> Prepared:
    x, out = empty(count), np.empty(count // world.size, _DTYPE)
    if peer is None:
        return Prepared(partial(reduce_scatter, x, world, out=out), x, out, _sum(world))
    return Prepared(partial(peer.comm.Reduce_scatter_block, x, out), x, out, _sum(world))


def _all_gather(world: ProcessGroup, peer: Library | None, empty: Empty, count: int) -> Prepared:
    out, part = empty(count), count // world.size
    x = out[world.rank * part : (world.rank + 1) * part]
    if peer is None:
        return Prepared(partial(all_gather, x, world, out=out), x, out, _parts(world, part))
    call = partial(peer.comm.Allgather, peer.mpi.IN_PLACE, out)
    return Prepared(call, x, out, _parts(world, part))


def _broadcast(world: ProcessGroup, peer: Library | None, empty: Empty, count: int) -> Prepared:
    x = empty(count)
    if peer is None:
        return Prepared(partial(broadcast, x, world, out=x), x, x, 1.0)
    return Prepared(partial(peer.comm.Bcast, x), x, x, 1.0)


def _reduce(world: ProcessGroup, peer: Library | None, empty: Empty, count: int) -> Prepared:
    x, out = empty(count), np.empty(count if world.rank == 0 else 0, _DTYPE)
    if peer is None:
        call = partial(reduce, x, world, out=out if world.rank == 0 else None)
    else:
        call = partial(peer.comm.Reduce, x, out if world.rank == 0 else None)
    return Prepared(call, x, out, _sum(world))


def _all_to_all(world: ProcessGroup, peer: Library | None, empty: Empty, count: int) -> Prepared:
    x, out, expected = empty(count), empty(count), _parts(world, count // world.size)
    if peer is None:
        return Prepared(partial(all_to_all, x, world, out=out), x, out, expected)
    return Prepared(partial(peer.comm.Alltoall, x, out), x, out, expected)


VERBS: Mapping[str, Callable[[ProcessGroup, Library | None, Empty, int], Prepared]] = {
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "reduce": _reduce,
    "all_to_all": _all_to_all,
}
"""Each verb, and how its call on so many elements is prepared: mpidist's, or that of a peer."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_effort(parser, sizes=sweep("1KiB", "64MiB", 16), seconds=1.0)
    names = [*VERBS, "barrier"]
    parser.add_argument(
        "--verbs", nargs="+", choices=names, default=names, help="which ones (default: all)"
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the collectives over the sizes; collective over `world`."""
    require_ranks(world, "collectives")
    machine = Machine.of(world)
    notes: list[str] = []
    rows: list[Row] = []
    peer = find_library(world, notes)
    sizes = list(dict.fromkeys(_divisible(nbytes, world.size) for nbytes in options.sizes))
    for verb in dict.fromkeys(options.verbs):
        make = partial(_series, verb, world, peer)
        of = [0] if verb == "barrier" else sizes
        rows += rows_over(of, make, world, operation=verb, options=options)
    return Report(
        benchmark="collectives",
        machine=machine,
        rows=rows,
        comparisons=_COMPARISONS,
        legend={name: _LEGEND[name] for name in dict.fromkeys(row.series for row in rows)},
        notes=notes,
    )


def _divisible(nbytes: int, ranks: int) -> int:
    """Return a size near this one of which every rank has the same number of elements."""
    return max(nbytes // (ranks * _DTYPE.itemsize), 1) * ranks * _DTYPE.itemsize


def _series(verb: str, world: ProcessGroup, peer: Library | None, nbytes: int) -> list[Series]:
    """Return one series per memory and peer, each of which has given the right result once."""
    if verb == "barrier":
        series = [Series(ORDINARY, partial(barrier, world))]
        return series if peer is None else [*series, Series(LIBRARY, peer.comm.Barrier)]
    count, prepare = nbytes // _DTYPE.itemsize, VERBS[verb]
    ordinary = partial(np.empty, dtype=_DTYPE)
    prepared = {
        REGISTERED: prepare(world, None, lambda n: world.empty(n, _DTYPE), count),
        ORDINARY: prepare(world, None, ordinary, count),
    }
    if peer is not None:
        prepared[LIBRARY] = prepare(world, peer, ordinary, count)
    return [Series(name, _checked(verb, each, world)) for name, each in prepared.items()]


def _checked(verb: str, prepared: Prepared, world: ProcessGroup) -> Callable[[], Any]:
    prepared.out.fill(0)
    prepared.x.fill(world.rank + 1)
    prepared.call()
    if not (prepared.out == prepared.expected).all():
        raise RuntimeError(f"{verb}: expected {prepared.expected}, got {prepared.out}")
    prepared.x.fill(0)
    return prepared.call


def _sum(world: ProcessGroup) -> float:
    return world.size * (world.size + 1) / 2


def _parts(world: ProcessGroup, part: int) -> Array:
    return np.repeat(np.arange(1, world.size + 1, dtype=_DTYPE), part)
