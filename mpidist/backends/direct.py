"""The direct path: collectives where the arrays lie, in memory that all ranks of a node share.

Nothing is packed, sent or received. Each rank reads and writes the others' arrays between two
meetings: at the first all have come with their contribution, at the second all are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any
from zlib import crc32

import numpy as np

from mpidist._types import SUM, Array, DType, ReduceOp
from mpidist.arrays import DTYPES, reduce_in_rank_order
from mpidist.backends import algorithms
from mpidist.backends.meetings import RING, DirectBoard, Meetings, Until, supported
from mpidist.backends.registered import LEAST, Block, Place, Registry
from mpidist.backends.work import Steps
from mpidist.boxes import split_evenly
from mpidist.errors import CollectiveMismatchError

__all__ = ["LEAST", "Block", "Call", "Direct", "DirectBoard", "Place", "Registry", "supported"]

_CACHE_LINE = 64

_BLOCK_BYTES = 256 << 10
"""What is reduced at a time: small enough to stay in a core's cache for the copies that follow."""

_BY_MESSAGES: Mapping[str, Callable[..., Steps]] = {
    "all_reduce": algorithms.all_reduce,
    "all_gather": algorithms.ring_all_gather,
    "broadcast": algorithms.tree_broadcast,
    "reduce_scatter": algorithms.pairwise_reduce_scatter,
}
"""The collectives that have a direct path, and how they go where the arrays lie elsewhere."""

_VERBS = tuple(_BY_MESSAGES)
_OPS = tuple(ReduceOp)
_DTYPES: tuple[DType, ...] = tuple(sorted(DTYPES, key=lambda dtype: dtype.name))


@dataclass(frozen=True, slots=True)
class Call:
    """What a rank comes with.

    Attributes
    ----------
    verb : str
        One that has a direct path.
    whole : Array
        The argument that has the same size on all ranks.
    place : Place or None
        Where it lies; None unless it is registered and the call one that has a direct path.
    op : ReduceOp
        SUM where nothing is reduced.
    root : int
        0 where there is none.
    counts : sequence of int
        Elements of each rank's part; none where there are no parts.
    """

    verb: str
    whole: Array
    place: Place | None
    op: ReduceOp = SUM
    root: int = 0
    counts: Sequence[int] = ()

    @classmethod
    def of(cls, verb: str, args: tuple[Any, ...], registered: Registry) -> Call | None:
        """Return a call that the ranks have to agree on, or None: all ranks alike.

        So it depends on what is the same on all ranks only: on verb and size, not on where the
        arrays of this rank lie.
        """
        if verb not in _BY_MESSAGES:
            return None
        whole = args[1] if verb == "all_gather" else args[0]
        if whole.nbytes < LEAST:
            return None
        place = registered.place(whole)
        if verb == "all_reduce":
            x, out, op = args
            return cls(verb, x, place if x is out else None, op)
        if verb == "reduce_scatter":
            x, _, counts, op = args
            return cls(verb, x, place, op, counts=counts)
        if verb == "all_gather":
            x, out, counts = args
            return cls(verb, out, place if x is None else None, counts=counts)
        return cls(verb, whole, place, root=args[1])

    def record(self) -> tuple[int, ...]:
        """Return the numbers that must be the same on all ranks."""
        where = (0, 0) if self.place is None else (self.place.block.number, self.place.offset)
        return (
            _VERBS.index(self.verb) << 32 | _OPS.index(self.op) << 16 | self.root,
            _DTYPES.index(self.whole.dtype),
            self.whole.size,
            *where,
            crc32(np.array(self.counts, np.int64).tobytes()),
        )


class Direct:
    """The collectives of one group on the memory that its ranks share.

    Operations go through first in, first out: none does its work before those begun earlier are
    done here, so that the ranks need not agree on anything but the order of their calls.

    Parameters
    ----------
    board : DirectBoard
        Where they meet.
    rank, size : int
        This rank, and the number of ranks.
    open_lane : callable
        Returns the lane of the next collective that may need one, the same on all ranks.
    """

    def __init__(
        self, board: DirectBoard, rank: int, size: int, open_lane: Callable[[], algorithms.Lane]
    ) -> None:
        self._board = board
        self._rank = rank
        self._size = size
        self._open_lane = open_lane
        self._begun = 0
        self._entered = 0
        self._finished = 0

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
        lane = self._open_lane()
        if call.place is None:
            return self._elsewhere(call, _BY_MESSAGES[call.verb](lane, *args))
        if call.verb == "all_reduce":
            return self._operate(call, self._all_reduce(call.place, call.op))
        if call.verb == "reduce_scatter":
            return self._operate(call, self._reduce_scatter(call.place, args[1], call))
        if call.verb == "all_gather":
            return self._operate(call, self._all_gather(call.place, call.counts))
        return self._operate(call, self._broadcast(call.place, call.root))

    def meet(self, call: Call) -> Meetings[None]:
        """Return the steps of the first meeting alone, before a call that goes another way."""
        self._open_lane()
        return self._meet(call)

    def _all_reduce(self, place: Place, op: ReduceOp) -> Callable[[], None]:
        """Combine the arrays of all ranks in rank order, in place.

        Each rank combines one slice of all arrays and writes the result into all: 2 (p - 1) / p
        of the array read from others and written to others, nothing sent.
        """
        unit = _CACHE_LINE // gcd(_CACHE_LINE, place.dtype.itemsize)
        start, size = split_evenly(-(-place.count // unit), self._size)[self._rank]
        mine = slice(start * unit, (start + size) * unit)
        return lambda: reduce_into_all([array[mine] for array in place.arrays()], op)

    def _reduce_scatter(self, place: Place, out: Array, call: Call) -> Callable[[], None]:
        """Combine this rank's part of all arrays in rank order into `out`, anywhere."""
        start = sum(call.counts[: self._rank])
        mine = slice(start, start + call.counts[self._rank])
        return lambda: reduce_into([array[mine] for array in place.arrays()], call.op, out)

    def _all_gather(self, place: Place, counts: Sequence[int]) -> Callable[[], None]:
        """Copy every rank's own part of the arrays from its array into this rank's."""

        def work() -> None:
            arrays, start = place.arrays(), 0
            for rank, count in enumerate(counts):
                if rank != self._rank:
                    arrays[self._rank][start : start + count] = arrays[rank][start : start + count]
                start += count

        return work

    def _broadcast(self, place: Place, root: int) -> Callable[[], None]:
        """Copy the array of `root` into this rank's."""

        def work() -> None:
            if self._rank != root:
                arrays = place.arrays()
                arrays[self._rank][...] = arrays[root]

        return work

    # -- the meetings ----------------------------------------------------------------------------

    def _operate(self, call: Call, work: Callable[[], None]) -> Meetings[None]:
        """Meet, work, meet."""
        number = yield from self._agree(call)
        work()
        yield from self._part(number)

    def _elsewhere(self, call: Call, steps: Steps) -> Meetings[None]:
        """Meet, and go by messages."""
        yield from self._meet(call)
        for phase in steps:
            yield Until(phase.done, list)

    def _meet(self, call: Call) -> Meetings[None]:
        number = yield from self._agree(call)
        self._finish(number)

    def _agree(self, call: Call) -> Meetings[int]:
        """Meet, and return the operation's number if all came with the same."""
        self._begun += 1
        number, board, record = self._begun, self._board, call.record()
        if self._entered < number - 1 or not self._slot_free(number):
            yield Until(
                lambda: self._entered == number - 1 and self._slot_free(number),
                lambda: board.unfinished(number - RING),
            )
        board.enter(number, record)
        self._entered = number
        yield Until(
            lambda: self._finished == number - 1 and board.all_entered(number),
            lambda: board.absent(number),
        )
        records = board.records(number)
        if any(other != record for other in records):
            yield from self._part(number)
            raise CollectiveMismatchError(_tell_difference(records, self._rank, call))
        return number

    def _part(self, number: int) -> Meetings[None]:
        """Be done with an operation, and wait until all are."""
        self._finish(number)
        board = self._board
        yield Until(lambda: board.all_finished(number), lambda: board.unfinished(number))

    def _finish(self, number: int) -> None:
        self._finished = number
        self._board.finish(number)

    def _slot_free(self, number: int) -> bool:
        last = number - RING
        return last <= 0 or (self._finished >= last and self._board.all_finished(last))


def _tell_difference(records: Sequence[tuple[int, ...]], rank: int, call: Call) -> str:
    told = "; ".join(f"rank {other}: {_tell(record)}" for other, record in enumerate(records))
    parts = f" Here, on rank {rank}, the counts are {list(call.counts)}." if call.counts else ""
    return (
        f"{call.verb} on rank {rank} of {len(records)}: the ranks called different things; nothing "
        "has been changed. All must make the same call with the same counts, on the same place of "
        f"the same registered block or all on other memory.{parts} {told}"
    )


def _tell(record: tuple[int, ...]) -> str:
    what, dtype, count, block, offset, checksum = record
    verb, op, root = _VERBS[what >> 32], _OPS[what >> 16 & 0xFFFF], what & 0xFFFF
    where = f"at byte {offset} of registered block {block}" if block else "not registered"
    if not block and verb in ("all_reduce", "all_gather"):
        where = "not in place in registered memory"
    counts = f", counts with checksum {checksum:08x}" if checksum else ""
    return f"{verb} (op {op.name}, root {root}) of {count} {_DTYPES[dtype]}{counts}, {where}"


def _blocks(arrays: Sequence[Array]) -> Iterator[list[Array]]:
    step = max(_BLOCK_BYTES // arrays[0].itemsize, 1)
    for start in range(0, arrays[0].size, step):
        yield [array[start : start + step] for array in arrays]


def reduce_into_all(arrays: Sequence[Array], op: ReduceOp) -> None:
    """Combine arrays in their order, and write the result into each, a cacheful at a time."""
    for first, *others in _blocks(arrays):
        reduce_in_rank_order([first, *others], op, first)
        for other in others:
            np.copyto(other, first)


def reduce_into(arrays: Sequence[Array], op: ReduceOp, out: Array) -> None:
    """Combine arrays in their order into `out`, a cacheful at a time."""
    for *blocks, target in _blocks([*arrays, out]):
        reduce_in_rank_order(blocks, op, target)
