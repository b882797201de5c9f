"""Blocking sums over the ranks of one node by way of the memory that they share.

There are three kinds, by where the arrays lie and how long they are. All combine in rank order. A
program makes the same few calls again and again, and the shortest take microseconds: what can be
prepared is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from mpidist._types import Array, DType, ReduceOp
from mpidist.backends.combine import combination, combining, even_slices
from mpidist.backends.crossovers import Crossovers
from mpidist.backends.node.counters import ROOM
from mpidist.backends.node.direct_path import Team, prepare_all_reduce
from mpidist.backends.node.registered_memory import Place, Registry
from mpidist.backends.node.sequencer import Sequencer, Waiters
from mpidist.backends.node.signatures import Route, Signature, record_of
from mpidist.backends.work import Waiter
from mpidist.observe.recorder import Name

__all__ = ["NodeSums", "Sum"]

K = TypeVar("K")
V = TypeVar("V")

_ALL_CHUNKS, _SHORTEST_CHUNK = 2 << 20, 256 << 10
"""Bytes of an ordinary array that are summed at a time, by all ranks together and at least by each.

Long enough to lie in a cache that cores share when others read it, short enough to stay there; the
more ranks, the less memory for each.
"""

_SKEW = 2048
"""Bytes between the beginning of a page and that of the room for ordinary arrays in it.

Arrays begin at the beginning of a page, or a few bytes behind it, and copying from one to another
that is a little ahead of it modulo 4096 is several times slower: processors compare these 12 bits
of the addresses alone (4K aliasing; Fog, The microarchitecture of Intel, AMD and VIA CPUs, sections
on store forwarding).
"""

_PAGE = 4096
"""The second of two halves must begin as far behind a page as the first, and as well aligned."""

_REMEMBERED = 256
"""Calls whose preparations are kept, of each kind."""


class Sum(Protocol):
    """A blocking all_reduce of one kind of array, prepared.

    Attributes
    ----------
    name : Name or None
        How it is recorded; None as long as nobody has asked.
    """

    name: Name | None

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine `x` of all ranks into `out`, which may be `x`."""


class SmallSum:
    """Each rank gives its array to all together with its arrival, and combines all for itself.

    One meeting; p arrays read per rank.

    [Note: two halves] A rank may write its next array while others still read this one, so there is
    room for two. There is no need for more: nobody gets beyond the meeting of the next one before
    all have come to it, and whoever has is done with this one.
    """

    name: Name | None = None

    def __init__(
        self,
        sequencer: Sequencer,
        team: Team,
        rooms: _Rooms,
        x: Array,
        op: ReduceOp,
        signature: Signature,
    ) -> None:
        self._sequencer = sequencer
        self._rooms = rooms
        self._run: Callable[..., None] = team.quiet.run
        self._record = record_of(signature, Route.ARRIVAL)
        halves = [rooms.arrays(half, x.dtype, x.size) for half in (0, 1)]
        self._mine = [parts[team.near.rank] for parts in halves]
        self._work = [combining(parts, op) for parts in halves]

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer, rooms = self._sequencer, self._rooms
        half = rooms.half
        if sequencer.begun != sequencer.board.finished:
            sequencer.settle(waiters)
        self._mine[half][...] = x
        number = sequencer.enter(self._record, waiters)
        rooms.half = 1 - half
        self._run(*self._work[half], out)
        sequencer.board.finish(number)


class PlaceSum:
    """Arrays in registered memory, where they lie.

    Two meetings; see `direct_path.all_reduce`. The place keeps this, so this does not keep the
    place: the memory is to go with its last array, and not wait for the garbage collector.
    """

    name: Name | None = None

    def __init__(
        self, sequencer: Sequencer, team: Team, place: Place, op: ReduceOp, signature: Signature
    ) -> None:
        self._sequencer = sequencer
        self._run = team.quiet.run
        self._work = prepare_all_reduce(team, place, op)
        self._record = record_of(signature, Route.REGISTERED, place)

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer = self._sequencer
        sequencer.settle(waiters)
        number = sequencer.enter(self._record, waiters)
        self._run(*self._work)
        sequencer.part(number, waiters)


class ScratchSum:
    """Other arrays, by way of room in shared memory.

    For each chunk a rank lays down the slices that the others combine, combines its own, and takes
    the others' results: 2 meetings, and 2 (p - 1) / p of the array copied in and out. Two halves of
    the room serve in turn, see [Note: two halves].
    """

    name: Name | None = None

    def __init__(
        self,
        sequencer: Sequencer,
        team: Team,
        rooms: _Rooms,
        x: Array,
        op: ReduceOp,
        signature: Signature,
    ) -> None:
        self._sequencer = sequencer
        self._run = team.quiet.run
        self._rooms = rooms
        self._combine = combination(op, x.dtype)
        self._record = record_of(signature, Route.SCRATCH)
        self._step = rooms.nbytes // x.itemsize
        self._chunks: dict[tuple[int, int], _Chunk] = {}
        self._me = team.near.rank

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer, rooms, step = self._sequencer, self._rooms, self._step
        sequencer.settle(waiters)
        number = 0
        for start in range(0, x.size, step):
            given, result = x[start : start + step], out[start : start + step]
            chunk = self._chunk(given)
            for part, room in chunk.given:
                room[...] = given[part]
            if start:
                sequencer.reach(waiters)
            else:
                number = sequencer.enter(self._record, waiters)
            rooms.half ^= 1
            mine, total = given[chunk.mine], result[chunk.mine]
            if x is out and self._me > 1:
                # It is added third or later, when the sum of the first two lies in its place.
                mine = mine.copy()
            # Straight into the result: it is in the cache, the room for it perhaps in another's.
            self._run(self._combine, [*chunk.before, mine, *chunk.after], total)
            chunk.result[...] = total
            sequencer.reach(waiters)
            for part, room in chunk.results:
                result[part] = room
        sequencer.board.finish(number)

    def _chunk(self, given: Array) -> _Chunk:
        """Return every rank's room for a chunk, in the half whose turn it is."""
        key = (self._rooms.half, given.size)
        return self._chunks.get(key) or _remember(self._chunks, key, self._cut(given))

    def _cut(self, given: Array) -> _Chunk:
        me, rooms = self._me, self._rooms.arrays(self._rooms.half, given.dtype, given.size)
        slices = even_slices(given.size, given.itemsize, len(rooms))
        others = [place for place in range(len(rooms)) if place != me]
        mine = slices[me]
        return _Chunk(
            mine,
            [(slices[place], rooms[me][slices[place]]) for place in others],
            [room[mine] for room in rooms[:me]],
            [room[mine] for room in rooms[me + 1 :]],
            rooms[me][mine],
            [(slices[place], rooms[place][slices[place]]) for place in others],
        )


class _Chunk(NamedTuple):
    """Room for a chunk of ordinary arrays, cut into one slice per rank.

    Attributes
    ----------
    mine : slice
        What this rank combines.
    given : list of (slice, Array)
        What the others combine, and where they find this rank's.
    before, after : list of Array
        Where the ranks before and after this one lay what it combines.
    result : Array
        Where they find what it has combined; they leave their own there.
    results : list of (slice, Array)
        What the others combine, and where this rank finds it.
    """

    mine: slice
    given: list[tuple[slice, Array]]
    before: list[Array]
    after: list[Array]
    result: Array
    results: list[tuple[slice, Array]]


class _Rooms:
    """Room of every rank for an array, twice.

    Parameters
    ----------
    parts : sequence of buffer
        Of each rank.
    nbytes : int
        Of the largest array.
    skew : int, optional
        Bytes that are left out at the beginning.

    Attributes
    ----------
    nbytes : int
        As given.
    half : int
        Whose turn it is, the same on all ranks: 0 or 1.
    """

    def __init__(self, parts: Sequence[memoryview], nbytes: int, skew: int = 0) -> None:
        self._parts = [np.frombuffer(part, np.uint8) for part in parts]
        self._skew = skew
        self.nbytes = nbytes
        self.half = 0

    def arrays(self, half: int, dtype: DType, count: int) -> list[Array]:
        """Return the room of every rank for an array."""
        start = self._skew + half * self.nbytes
        stop = start + count * dtype.itemsize
        return [part[start:stop].view(dtype) for part in self._parts]


class NodeSums:
    """The blocking all_reduces of a group whose ranks all share memory.

    Parameters
    ----------
    sequencer : Sequencer
        Their order among the group's operations.
    team : Team
        The ranks.
    registered : Registry
        Knows the arrays that lie in shared memory.
    share : callable
        Returns memory of so many bytes of each rank of the node, or None; collective, blocks.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        team: Team,
        registered: Registry,
        share: Callable[[int, Waiter], list[memoryview] | None],
    ) -> None:
        self._sequencer = sequencer
        self._team = team
        self._registered = registered
        self._share = share
        self._sizes = Crossovers()
        self._small: dict[Any, Sum] = {}
        self._long: dict[Any, Sum] = {}
        self._beside = _Rooms(sequencer.board.rooms(), ROOM)
        self._scratch: _Rooms | None = None
        self._scratch_refused = False

    def take(self, sizes: Crossovers) -> None:
        """Change the way at these sizes from now on; the same on all ranks."""
        self._sizes = sizes
        self._small.clear()
        self._long.clear()

    def find(self, x: Array, op: ReduceOp) -> Sum | None:
        """Return the sum of `x` in place, if one like it has been prepared before.

        Parameters
        ----------
        x : Array
            Any, as the caller gave it.
        op : ReduceOp
            How to combine.
        """
        if type(x) is not np.ndarray or x.ndim != 1 or not x.flags.carray:
            return None
        kept = self._choose(x, x, op)
        return None if kept is None else kept[0].get(kept[1])

    def prepare(self, x: Array, out: Array, op: ReduceOp, waiter: Waiter) -> Sum | None:
        """Return the sum of flat arrays, or None where the library is faster.

        Parameters
        ----------
        x, out, op : Array, Array, ReduceOp
            As `Backend.all_reduce` takes them.
        waiter : Waiter
            Has the signature of the call.

        Notes
        -----
        Collective; it makes room in shared memory for the first array that needs it.
        """
        kept = self._choose(x, out, op)
        if kept is None:
            return None
        sums, key, place = kept
        shape = waiter.shape
        if shape != x.shape:
            # Arrays of another shape, though as long, are another call; `find` never asks for them.
            key = (key, shape)
        found = sums.get(key)
        if found is None:
            found = self._make(x, op, place, waiter)
            if found is not None:
                _remember(sums, key, found)
        return found

    def _choose(
        self, x: Array, out: Array, op: ReduceOp
    ) -> tuple[dict[Any, Sum], object, Place | None] | None:
        """Choose the way by size and place: where its sums are kept, this one's key, the place."""
        nbytes, sizes = x.nbytes, self._sizes
        if nbytes <= sizes.small:
            return self._small, (op, x.dtype, x.size), None
        if x is out and nbytes >= sizes.registered:
            place = self._registered.place(x)
            if place is not None:
                return place.prepared, ("sum", op), place
        if nbytes >= sizes.scratch:
            return self._long, (op, x.dtype, x.size), None
        return None

    def _make(self, x: Array, op: ReduceOp, place: Place | None, waiter: Waiter) -> Sum | None:
        sequencer, team = self._sequencer, self._team
        if place is not None:
            return PlaceSum(sequencer, team, place, op, waiter)
        small = x.nbytes <= self._sizes.small
        beside = small and x.nbytes <= ROOM
        rooms = self._beside if beside else self._make_scratch(waiter)
        if rooms is None:
            return None
        if small:
            return SmallSum(sequencer, team, rooms, x, op, waiter)
        return ScratchSum(sequencer, team, rooms, x, op, waiter)

    def _make_scratch(self, waiter: Waiter) -> _Rooms | None:
        """Make room for long arrays when all have come for it; it is asked for once."""
        if self._scratch is not None or self._scratch_refused:
            return self._scratch
        self._sequencer.arrive(waiter, Route.SCRATCH)
        chunk = _chunk_bytes(self._team.transport.size)
        parts = self._share(_SKEW + 2 * chunk, waiter)
        if parts is None:
            self._scratch_refused = True
            return None
        self._scratch = _Rooms(parts, chunk, _SKEW)
        return self._scratch


def _chunk_bytes(size: int) -> int:
    """Return how many bytes of an ordinary array are summed at a time by so many ranks."""
    return max(_ALL_CHUNKS // size, _SHORTEST_CHUNK) // _PAGE * _PAGE


def _remember(kept: dict[K, V], key: K, value: V) -> V:
    """Keep what was prepared; all is forgotten where there is too much of it."""
    if len(kept) >= _REMEMBERED:
        kept.clear()
    kept[key] = value
    return value
