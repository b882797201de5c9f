"""Calls of the collectives on host or device arrays, each checked once before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import part_slices
from mpidist.arrays.namespaces import array_namespace, to_host
from mpidist.bench.peers import LibraryPeer
from mpidist.bench.times import Series
from mpidist.collectives import (
    all_gather,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    broadcast,
    iall_reduce,
    reduce,
    reduce_scatter,
)
from mpidist.group import ProcessGroup
from mpidist.point_to_point import sendrecv

DTYPE = np.dtype(np.float32)

COALESCED = 8
"""Arrays of an all_reduce_coalesced."""

_IN_PLACE = ("all_reduce", "iall_reduce and wait", "all_reduce_coalesced", "broadcast")


@dataclass(frozen=True, slots=True)
class Arrays:
    """What one rank contributes to a call, and where it finds the result; may be the same.

    `expected` is the result on every rank that has one, if each contributes its number plus one.
    """

    x: Array
    out: Array
    expected: Array | float


def prepare(verb: str, world: ProcessGroup, make: Callable[[int], Array], count: int) -> Arrays:
    """Make this rank's arrays for a verb, in place where the verb knows it.

    ``make(count)`` returns an array of so many elements of `DTYPE`, collectively; `count` is that
    of the whole array, see `mpidist.bench.report.Row.nbytes`.
    """
    x, share = make(count), count // world.size
    like = array_namespace(x).empty_like
    total = world.size * (world.size + 1) / 2
    gathered = np.repeat(np.arange(1, world.size + 1, dtype=DTYPE), share)
    if verb in _IN_PLACE:
        return Arrays(x, x, 1.0 if verb == "broadcast" else total)
    if verb == "all_gather":
        return Arrays(parts(x, world.size)[world.rank], x, gathered)
    if verb == "reduce_scatter":
        return Arrays(x, like(x[:share]), total)
    if verb == "reduce":
        return Arrays(x, like(x if world.rank == 0 else x[:0]), total)
    return Arrays(x, make(count), gathered if verb == "all_to_all" else neighbours(world)[1] + 1.0)


def neighbours(world: ProcessGroup) -> tuple[int, int]:
    """Return the next rank and the one before, around the ring."""
    return (world.rank + 1) % world.size, (world.rank - 1) % world.size


def parts(x: Array, number: int) -> list[Array]:
    """Cut a flat array into so many parts of the same length."""
    return [x[part] for part in part_slices([x.size // number] * number)]


_CALLS: dict[str, Callable[..., Any]] = {
    "all_gather": all_gather,
    "all_reduce": all_reduce,
    "all_to_all": all_to_all,
    "broadcast": broadcast,
    "reduce": reduce,
    "reduce_scatter": reduce_scatter,
}


def our_call(verb: str, arrays: Arrays, world: ProcessGroup) -> Callable[[], Any]:
    """Return mpidist's call of a verb."""
    x, out = arrays.x, arrays.out
    if verb == "sendrecv":
        dst, src = neighbours(world)
        return partial(sendrecv, x, world, dst=dst, src=src, out=out)
    if verb == "iall_reduce and wait":
        return lambda: iall_reduce(x, world, out=out).wait()
    if verb == "all_reduce_coalesced":
        several = parts(x, COALESCED)
        return partial(all_reduce_coalesced, several, world, outs=several)
    given = None if verb == "reduce" and world.rank != 0 else out
    return partial(_CALLS[verb], x, world, out=given)


def library_call(verb: str, arrays: Arrays, peer: LibraryPeer) -> Callable[[], Any]:
    """Return the call of the MPI library, through mpi4py's buffer interface."""
    comm, in_place, x, out = peer.comm, peer.mpi.IN_PLACE, arrays.x, arrays.out
    calls: dict[str, Callable[[], Any]] = {
        "all_gather": partial(comm.Allgather, in_place, out),
        "all_reduce": partial(comm.Allreduce, in_place, out),
        "all_to_all": partial(comm.Alltoall, x, out),
        "broadcast": partial(comm.Bcast, x),
        "reduce": partial(comm.Reduce, x, out if comm.rank == 0 else None),
        "reduce_scatter": partial(comm.Reduce_scatter_block, x, out),
    }
    return calls[verb]


def divisible(nbytes: int, parts: int) -> int:
    """Return a size near this one, of which every part has the same number of elements."""
    multiple = DTYPE.itemsize * parts
    return max(nbytes // multiple, 1) * multiple


def checked(
    name: str,
    call: Callable[[], Any],
    arrays: Arrays,
    world: ProcessGroup,
    *,
    rewrite: bool = False,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> Series:
    """Return the series of a call on `arrays` of `prepare` that has given the right result once.

    The arrays hold zeros afterwards: in place, sums of others would grow without end. With
    `rewrite` each rank writes its array before each call; `clock` times a call, see `Series`.
    Collective over `world`; blocks. Raises RuntimeError if the result is wrong.
    """
    arrays.out.fill(0)
    arrays.x.fill(world.rank + 1)
    call()
    result = to_host(arrays.out)
    if not (result == arrays.expected).all():
        raise RuntimeError(f"bench: by {name} expected {arrays.expected}, got {result}")
    for array in (arrays.x, arrays.out):
        array.fill(0)
    return Series(name, call, before=partial(arrays.x.fill, 0) if rewrite else None, clock=clock)
