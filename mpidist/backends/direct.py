"""The direct path: collectives by way of memory that all ranks of a node share.

Arrays that lie there are worked on where they lie: nothing is packed, sent or received inside the
node. Each rank reads and writes the others' arrays between two meetings: at the first all have come
with their contribution, at the second all are done. Other arrays are summed by way of room that the
ranks keep there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import MAX, Array, DType, ReduceOp
from mpidist.backends import algorithms, in_place
from mpidist.backends.agreement import RECORD, Call, tell_difference
from mpidist.backends.kernels import Combine, combination, even_slices, quiet, reduce_into
from mpidist.backends.meetings import RING, DirectBoard, Meetings, Until
from mpidist.backends.neighbours import Neighbours
from mpidist.backends.registered import Place
from mpidist.backends.work import Steps, Waiter
from mpidist.errors import CollectiveMismatchError

__all__ = ["Direct"]

CHUNK = 4 << 20
"""Bytes of an ordinary array that are summed at a time by way of shared memory."""

_REMEMBERED = 256
"""Small calls whose preparations are kept."""

_NOTHING = bytes(RECORD.size)
"""What a rank tells the other nodes when its own does not agree."""

_SKEW = 2048
"""Bytes between the beginning of a page and that of the room for ordinary arrays in it.

Arrays begin at the beginning of a page, or a few bytes behind it, and copying from one to another
that is a little ahead of it modulo 4096 is several times slower: processors compare these 12 bits
of the addresses alone (4K aliasing; Fog, The microarchitecture of Intel, AMD and VIA CPUs, sections
on store forwarding).
"""

_BY_MESSAGES: Mapping[str, Callable[..., Steps]] = {
    "all_reduce": algorithms.all_reduce,
    "all_gather": algorithms.ring_all_gather,
    "broadcast": algorithms.tree_broadcast,
    "reduce_scatter": algorithms.pairwise_reduce_scatter,
}
"""How the collectives with a direct path go where the arrays lie elsewhere."""


class _Small(NamedTuple):
    """A sum of small arrays, prepared: its record, room for them twice, and what combines them."""

    record: bytes
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


class Direct:
    """The collectives of one group by way of the memory that the ranks of each node share.

    Operations go through first in, first out: none does its work before those begun earlier are
    done here, so that the ranks need not agree on anything but the order of their calls.

    Parameters
    ----------
    board : DirectBoard
        Where the ranks of this node meet.
    near : Neighbours
        Who they are.
    transport : Exchanger
        Carries messages to other nodes.
    open_lane : callable
        Returns the number of the next lane, the same on all ranks.
    share : callable
        Returns memory of so many bytes of each rank of the node, or None; collective, blocks.
    """

    def __init__(
        self,
        board: DirectBoard,
        near: Neighbours,
        transport: algorithms.Exchanger,
        *,
        open_lane: Callable[[], int],
        share: Callable[[int], list[memoryview] | None],
    ) -> None:
        self._board = board
        self._near = near
        self._team = in_place.Team(near, transport, quiet())
        self._rank = transport.rank
        self._open_lane = open_lane
        self._share = share
        self._begun = 0
        self._entered = 0
        self._finished = 0
        self._free = 0
        self._stage = 0
        self._chunks = 0
        self._small: dict[tuple[ReduceOp, DType, int], _Small] = {}
        self._scratch: list[Array] | None = None
        self._scratch_refused = False
        self._prepared_chunks: dict[tuple[int, DType, int], _Chunk] = {}

    @property
    def one_node(self) -> bool:
        """Whether all ranks of the group share memory."""
        return self._team.alone

    def plan(self, call: Call, args: tuple[Any, ...]) -> Meetings[None]:
        """Return the steps of a collective that the ranks have to agree on.

        Parameters
        ----------
        call : Call
            What this rank comes with.
        args : tuple
            The collective's arguments, as a transport gets them.

        Returns
        -------
        Meetings
            Where no rank's array is registered the call goes by messages when all have come, in a
            lane of its own: it may be immediate, see [Note: phases].
        """
        # Also where the array is registered: the lanes stay in step when the ranks disagree.
        lane, team = self._open_lane(), self._team
        if call.place is None:
            everybody = algorithms.Lane(team.transport, lane)
            return self._elsewhere(call, lane, _BY_MESSAGES[call.verb](everybody, *args))
        arrays = call.place.arrays
        if call.verb == "all_reduce":
            work = in_place.all_reduce(team, lane, call.place, call.op)
        elif call.verb == "reduce_scatter":
            work = in_place.reduce_scatter(team, lane, arrays, args[1], call.counts, call.op)
        elif call.verb == "all_gather":
            work = in_place.all_gather(team, lane, arrays, call.counts)
        else:
            work = in_place.broadcast(team, lane, arrays, call.root)
        return self._operate(call, lane, work)

    def meet(self, call: Call) -> Meetings[None]:
        """Return the steps of the first meeting alone, before a call that goes another way."""
        return self._meet(call, self._open_lane())

    def _operate(self, call: Call, lane: int, work: Steps) -> Meetings[None]:
        """Meet, work, meet."""
        number = yield from self._agree(call, lane)
        yield from _phases(work)
        yield from self._part(number)

    def _elsewhere(self, call: Call, lane: int, steps: Steps) -> Meetings[None]:
        """Meet, and go by messages."""
        yield from self._meet(call, lane)
        yield from _phases(steps)

    def _meet(self, call: Call, lane: int) -> Meetings[None]:
        number = yield from self._agree(call, lane)
        self._finish(number)

    # -- blocking sums on one node, without the cost of steps ------------------------------------

    def all_reduce_in_place(self, place: Place, op: ReduceOp, *, waiter: Waiter) -> None:
        """Combine registered arrays where they lie; see `in_place.all_reduce`."""
        key = ("record", op)
        record = place.prepared.get(key)
        if record is None:
            record = Call("all_reduce", place.arrays[0], place, op).record()
            place.prepared[key] = record
        number, board = self._open(waiter), self._board
        self._enter(number, record, waiter)
        if not board.same(number, record):
            self._refuse(number, Call("all_reduce", place.arrays[0], place, op), waiter)
        self._team.quiet.run(*in_place.prepare_all_reduce(self._team, place, op))
        self._finish(number)
        if not board.all_finished(number):
            waiter.wait_for(
                lambda: board.all_finished(number),
                missing=lambda: self._ranks(board.unfinished(number)),
            )

    def all_reduce_small(self, x: Array, out: Array, op: ReduceOp, *, waiter: Waiter) -> None:
        """Combine arrays of at most `SMALL` bytes in rank order: each rank gives its own to all.

        One meeting; p arrays read per rank.

        [Note: two halves] A rank may write its next array while others still read this one, so
        there is room for two. There is no need for more: nobody gets beyond the meeting of the next
        one before all have come to it, and whoever has is done with this one.
        """
        key = (op, x.dtype, x.size)
        small = self._small.get(key) or self._prepare_small(key)
        number = self._open(waiter)
        parts = small.halves[number & 1]
        parts[self._near.rank][...] = x
        self._enter(number, small.record, waiter)
        if not self._board.same(number, small.record):
            self._refuse(number, Call("all_reduce", x, None, op), waiter)
        self._team.quiet.run(small.combine, parts, out)
        self._finish(number)

    def _prepare_small(self, key: tuple[ReduceOp, DType, int]) -> _Small:
        op, dtype, count = key
        if len(self._small) >= _REMEMBERED:
            self._small.clear()
        small = self._small[key] = _Small(
            Call("all_reduce", np.empty(count, dtype), None, op).record(),
            (self._board.small(0, dtype, count), self._board.small(1, dtype, count)),
            combination(op, dtype),
        )
        return small

    def all_reduce_by_scratch(self, x: Array, out: Array, op: ReduceOp, *, waiter: Waiter) -> bool:
        """Combine arrays in rank order by way of room in shared memory; False if there is none.

        For each chunk a rank lays down the slices that the others combine, combines its own, and
        takes the others' results: 2 meetings, and 2 (p - 1) / p of the array copied in and out.
        Two halves of the room serve in turn, see [Note: two halves].
        """
        call = Call("all_reduce", x, None, op)
        if self._scratch is None and not self._make_scratch(call, waiter):
            return False
        record, combine = call.record(), combination(op, x.dtype)
        number, step = self._open(waiter), CHUNK // x.itemsize
        for start in range(0, x.size, step):
            given, result = x[start : start + step], out[start : start + step]
            chunk = self._chunk(x.dtype, given.size)
            for part, room in chunk.given:
                room[...] = given[part]
            if start == 0:
                self._enter(number, record, waiter)
                if not self._board.same(number, record):
                    self._refuse(number, call, waiter)
            else:
                self._reach(waiter)
            parts = [*chunk.before, given[chunk.mine], *chunk.after]
            self._team.quiet.run(reduce_into, parts, combine, chunk.result)
            self._reach(waiter)
            result[chunk.mine] = chunk.result
            for part, room in chunk.results:
                result[part] = room
            self._chunks += 1
        self._finish(number)
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
        start, me = _SKEW + half * CHUNK, self._near.rank
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
        number, record = self._open(waiter), call.record()
        self._enter(number, record, waiter)
        if not self._board.same(number, record):
            self._refuse(number, call, waiter)
        self._finish(number)
        parts = self._share(_SKEW + 2 * CHUNK)
        if parts is None:
            self._scratch_refused = True
            return False
        self._scratch = [np.frombuffer(part, np.uint8) for part in parts]
        return True

    # -- the meetings of a blocking call ---------------------------------------------------------

    def _open(self, waiter: Waiter) -> int:
        """Return the number of a blocking operation, when all before it are done here."""
        self._open_lane()  # the lanes stay in step when the ranks disagree
        if self._finished != self._begun:
            waiter.wait_for(lambda: self._finished == self._begun)
        self._begun = number = self._begun + 1
        if not self._slot_free(number):
            waiter.wait_for(lambda: self._slot_free(number))
        return number

    def _enter(self, number: int, record: bytes, waiter: Waiter) -> None:
        board = self._board
        board.enter(number, record)
        self._entered = number
        if not board.all_entered(number):
            waiter.wait_for(
                lambda: board.all_entered(number),
                missing=lambda: self._ranks(board.absent(number)),
            )

    def _reach(self, waiter: Waiter) -> None:
        """Meet again inside an operation."""
        self._stage = stage = self._stage + 1
        board = self._board
        board.reach(stage)
        if not board.all_reached(stage):
            waiter.wait_for(
                lambda: board.all_reached(stage),
                missing=lambda: self._ranks(board.behind(stage)),
            )

    def _refuse(self, number: int, call: Call, waiter: Waiter) -> None:
        """Raise the error that says who came with what."""
        records = self._board.records(number)
        for meeting in self._part(number):
            waiter.wait_for(meeting.condition, missing=meeting.missing)
        raise self._difference(records, call)

    # -- the meetings, waited for by whoever drives the operation --------------------------------

    def _agree(self, call: Call, lane: int) -> Meetings[int]:
        """Meet, and return the operation's number if all came with the same."""
        self._begun += 1
        number, board, record = self._begun, self._board, call.record()
        if self._entered < number - 1 or not self._slot_free(number):
            yield Until(
                lambda: self._entered == number - 1 and self._slot_free(number),
                lambda: self._ranks(board.unfinished(number - RING)),
            )
        board.enter(number, record)
        self._entered = number
        yield Until(
            lambda: self._finished == number - 1 and board.all_entered(number),
            lambda: self._ranks(board.absent(number)),
        )
        if not board.same(number, record):
            # Whoever finds a difference here need not ask the other nodes: these wait for it.
            records = board.records(number)
            if not self._team.alone:
                yield from self._agree_across(_NOTHING, lane)
            yield from self._part(number)
            raise self._difference(records, call)
        if not self._team.alone:
            if not (yield from self._agree_across(record, lane)):
                board.object(number)
            yield from self._pause()
            if board.objected(number):
                yield from self._part(number)
                raise self._difference(board.records(number), call)
        return number

    def _agree_across(self, record: bytes, lane: int) -> Meetings[bool]:
        """Return whether the worker in this place on every node came with the same record."""
        across = self._team.across(lane)
        if across is None:
            return True
        numbers = np.frombuffer(record, np.uint64)
        extremes = np.concatenate([numbers, ~numbers])
        greatest = np.empty_like(extremes)
        yield from _phases(
            algorithms.recursive_doubling_all_reduce(across, extremes, greatest, MAX)
        )
        return bool((greatest == extremes).all())

    def _pause(self) -> Meetings[None]:
        """Meet the ranks of the node again inside an operation."""
        self._stage = stage = self._stage + 1
        board = self._board
        board.reach(stage)
        yield Until(lambda: board.all_reached(stage), lambda: self._ranks(board.behind(stage)))

    def _part(self, number: int) -> Meetings[None]:
        """Be done with an operation, and wait until all of the node are."""
        self._finish(number)
        board = self._board
        yield Until(
            lambda: board.all_finished(number), lambda: self._ranks(board.unfinished(number))
        )

    def _finish(self, number: int) -> None:
        self._finished = number
        self._board.finish(number)

    def _slot_free(self, number: int) -> bool:
        last = number - RING
        if last <= self._free:
            return True
        if self._finished < last or not self._board.all_finished(last):
            return False
        # No need to look again for the many operations that all have finished since.
        self._free = last
        return True

    def _ranks(self, places: list[int]) -> list[int]:
        return [self._near.local[place] for place in places]

    def _difference(self, records: list[bytes], call: Call) -> CollectiveMismatchError:
        return CollectiveMismatchError(tell_difference(records, self._near.local, self._rank, call))


def _phases(steps: Steps) -> Meetings[None]:
    """Wait for each phase as for a meeting."""
    for phase in steps:
        yield Until(phase.done, list)
