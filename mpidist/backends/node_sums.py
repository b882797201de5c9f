"""Blocking sums over the ranks of one node by way of the memory that they share.

There are three, by where the arrays lie and how long they are. All combine in rank order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpidist._types import Array, DType, ReduceOp
from mpidist.backends.agreement import Call, Way
from mpidist.backends.in_place import Team, prepare_all_reduce
from mpidist.backends.kernels import Combine, combination, even_slices, reduce_into
from mpidist.backends.meetings import Record
from mpidist.backends.registered import Place
from mpidist.backends.turns import Turns
from mpidist.backends.work import Waiter

__all__ = ["NodeSums"]

CHUNK = 4 << 20
"""Bytes of an ordinary array that are summed at a time by way of shared memory."""

_SKEW = 2048
"""Bytes between the beginning of a page and that of the room for ordinary arrays in it.

Arrays begin at the beginning of a page, or a few bytes behind it, and copying from one to another
that is a little ahead of it modulo 4096 is several times slower: processors compare these 12 bits
of the addresses alone (4K aliasing; Fog, The microarchitecture of Intel, AMD and VIA CPUs, sections
on store forwarding).
"""

_REMEMBERED = 256
"""Calls whose preparations are kept, of each kind."""


class _Small(NamedTuple):
    """A sum of small arrays, prepared: its record, room for them twice, and what combines them."""

    record: Record
    halves: tuple[list[Array], list[Array]]
    combine: Combine


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


class NodeSums:
    """The blocking all_reduces of a group whose ranks all share memory.

    Parameters
    ----------
    turns : Turns
        Their order among the group's operations.
    team : Team
        The ranks.
    share : callable
        Returns memory of so many bytes of each rank of the node, or None; collective, blocks.
    """

    def __init__(
        self, turns: Turns, team: Team, share: Callable[[int, Waiter], list[memoryview] | None]
    ) -> None:
        self._turns = turns
        self._team = team
        self._share = share
        self._me = team.near.rank
        self._small: dict[tuple[ReduceOp, DType, int], _Small] = {}
        self._chunks = 0
        self._prepared_chunks: dict[tuple[int, DType, int], _Chunk] = {}
        self._scratch: list[Array] | None = None
        self._scratch_refused = False

    def in_place(self, place: Place, op: ReduceOp, *, waiter: Waiter) -> None:
        """Combine registered arrays where they lie; 2 meetings, see `in_place.all_reduce`."""
        key = ("record", op)
        record = place.prepared.get(key)
        if record is None:
            record = Call("all_reduce", place.arrays[0], place, op).record()
            place.prepared[key] = record
        turns = self._turns
        number = turns.open(waiter)
        if not turns.enter(number, record, waiter):
            turns.refuse(number, Call("all_reduce", place.arrays[0], place, op), waiter)
        self._team.quiet.run(*prepare_all_reduce(self._team, place, op))
        turns.part(number, waiter)

    def small(self, x: Array, out: Array, op: ReduceOp, *, waiter: Waiter) -> None:
        """Combine arrays of at most `SMALL` bytes in rank order: each rank gives its own to all.

        One meeting; p arrays read per rank.

        [Note: two halves] A rank may write its next array while others still read this one, so
        there is room for two. There is no need for more: nobody gets beyond the meeting of the next
        one before all have come to it, and whoever has is done with this one.
        """
        key = (op, x.dtype, x.size)
        small = self._small.get(key) or self._prepare_small(key)
        turns = self._turns
        number = turns.open(waiter)
        parts = small.halves[number & 1]
        parts[self._me][...] = x
        if not turns.enter(number, small.record, waiter):
            turns.refuse(number, Call("all_reduce", x, None, op, way=Way.ARRIVAL), waiter)
        self._team.quiet.run(small.combine, parts, out)
        turns.finish(number)

    def _prepare_small(self, key: tuple[ReduceOp, DType, int]) -> _Small:
        op, dtype, count = key
        if len(self._small) >= _REMEMBERED:
            self._small.clear()
        small = self._small[key] = _Small(
            Call("all_reduce", np.empty(count, dtype), None, op, way=Way.ARRIVAL).record(),
            (self._turns.board.small(0, dtype, count), self._turns.board.small(1, dtype, count)),
            combination(op, dtype),
        )
        return small

    def by_scratch(self, x: Array, out: Array, op: ReduceOp, *, waiter: Waiter) -> bool:
        """Combine arrays in rank order by way of room in shared memory; False if there is none.

        For each chunk a rank lays down the slices that the others combine, combines its own, and
        takes the others' results: 2 meetings, and 2 (p - 1) / p of the array copied in and out.
        Two halves of the room serve in turn, see [Note: two halves].
        """
        call = Call("all_reduce", x, None, op, way=Way.SCRATCH)
        if self._scratch is None and not self._make_scratch(call, waiter):
            return False
        record, combine = call.record(), combination(op, x.dtype)
        turns, step = self._turns, CHUNK // x.itemsize
        number = turns.open(waiter)
        for start in range(0, x.size, step):
            given, result = x[start : start + step], out[start : start + step]
            chunk = self._chunk(x.dtype, given.size)
            for part, room in chunk.given:
                room[...] = given[part]
            if start:
                turns.reach(waiter)
            elif not turns.enter(number, record, waiter):
                turns.refuse(number, call, waiter)
            parts = [*chunk.before, given[chunk.mine], *chunk.after]
            self._team.quiet.run(reduce_into, parts, combine, chunk.result)
            turns.reach(waiter)
            result[chunk.mine] = chunk.result
            for part, room in chunk.results:
                result[part] = room
            self._chunks += 1
        turns.finish(number)
        return True

    def _chunk(self, dtype: DType, count: int) -> _Chunk:
        """Return every rank's room for a chunk, in the half whose turn it is."""
        key = (self._chunks & 1, dtype, count)
        chunk = self._prepared_chunks.get(key)
        if chunk is None:
            if len(self._prepared_chunks) >= _REMEMBERED:
                self._prepared_chunks.clear()
            chunk = self._prepared_chunks[key] = self._prepare_chunk(*key)
        return chunk

    def _prepare_chunk(self, half: int, dtype: DType, count: int) -> _Chunk:
        start, me = _SKEW + half * CHUNK, self._me
        stop = start + count * dtype.itemsize
        rooms = [room[start:stop].view(dtype) for room in self._scratch or ()]
        slices = even_slices(count, dtype.itemsize, len(rooms))
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

    def _make_scratch(self, call: Call, waiter: Waiter) -> bool:
        """Make the room when all have come for it; it is asked for once."""
        if self._scratch_refused:
            return False
        turns = self._turns
        number = turns.open(waiter)
        if not turns.enter(number, call.record(), waiter):
            turns.refuse(number, call, waiter)
        turns.finish(number)
        parts = self._share(_SKEW + 2 * CHUNK, waiter)
        if parts is None:
            self._scratch_refused = True
            return False
        self._scratch = [np.frombuffer(part, np.uint8) for part in parts]
        return True
