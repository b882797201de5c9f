"""The direct path: collectives where the arrays lie, in memory that all ranks of a node share.

Nothing is packed, sent or received. Each rank reads and writes the others' arrays between two
meetings: at the first all have come with their contribution, at the second all are done.

[Note: memory order] A meeting is a counter per rank, written by its owner and read by the others.
On x86-64 stores become visible in the order in which they were made and loads are not reordered
with loads (Intel SDM, volume 3, section 9.2.2), so that whoever sees the counter sees what was
written before it; only non-temporal stores, which a large memcpy may use, need a fence, and taking
a lock is one (any locked instruction is). Other processors promise less, and have no direct path.
"""

from __future__ import annotations

import platform
import struct
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import MEAN, Array, DType, ReduceOp
from mpidist.arrays import DTYPES, HALVES, ufunc_of
from mpidist.backends.work import Work
from mpidist.boxes import split_evenly
from mpidist.errors import CollectiveMismatchError

__all__ = ["Block", "Direct", "DirectBoard", "Place", "Registry", "supported"]

_CACHE_LINE = 64
_PAGE = 4096
_RING = 64
"""Operations that may be under way at once; a further one is delayed."""

_BLOCK_BYTES = 256 << 10
"""What is reduced at a time: small enough to stay in a core's cache for the copies that follow."""

LEAST = 128 << 10
"""Bytes of the shortest array that goes the direct path; below, a library's latency wins."""

_FENCE = threading.Lock()


def supported() -> bool:
    """Whether this processor orders memory as the direct path needs; see [Note: memory order]."""
    return platform.machine() in ("x86_64", "AMD64")


# -- registered memory ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """Memory with one part per rank, all of which this rank can read and write.

    Attributes
    ----------
    number : int
        The same on all ranks: how many blocks their group had made.
    parts : tuple of Array, uint8
        One per rank, of the same size.
    address : int
        Of this rank's part.
    """

    number: int
    parts: tuple[Array, ...]
    address: int

    @staticmethod
    def stride(nbytes: int) -> int:
        """Return the distance between two parts: whole pages, at least one."""
        return max(-(-nbytes // _PAGE), 1) * _PAGE


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies in a block: the same place in every rank's part.

    Attributes
    ----------
    block : Block
        The memory.
    offset : int
        Bytes from the beginning of a part.
    dtype : dtype
        Of the elements.
    count : int
        Number of elements.
    """

    block: Block
    offset: int
    dtype: DType
    count: int

    @classmethod
    def of(cls, x: Array, block: Block) -> Place:
        """Return the place of a flat array in its block."""
        return cls(block, x.ctypes.data - block.address, x.dtype, x.size)

    def arrays(self) -> list[Array]:
        """Return the array of every rank."""
        stop = self.offset + self.count * self.dtype.itemsize
        return [part[self.offset : stop].view(self.dtype) for part in self.block.parts]


class Registry:
    """The blocks of one group, found by the arrays that lie in them.

    A block lives as long as the last array in this rank's part: the registry forgets it then.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._made = 0

    def add(self, parts: Sequence[Any], rank: int, nbytes: int) -> Array:
        """Register memory, and return this rank's part of it.

        Parameters
        ----------
        parts : sequence of buffer
            Writable memory of each rank, of the same size.
        rank : int
            This rank.
        nbytes : int
            Size of the array to return.

        Returns
        -------
        Array, shape (nbytes,), uint8
            Every view of it is found by `place`.
        """
        self._made += 1
        # numpy gives all views of an array made from a buffer that array as their base.
        root: Array = np.frombuffer(parts[rank], np.uint8, nbytes)
        views = tuple(np.frombuffer(part, np.uint8) for part in parts)
        self._blocks[id(root)] = Block(self._made, views, root.ctypes.data)
        weakref.finalize(root, self._blocks.pop, id(root), None)
        return root[:]

    def place(self, x: Array) -> Place | None:
        """Return where a flat array lies, if it is registered and not short."""
        if x.nbytes < LEAST:
            return None
        block = self._blocks.get(id(x.base))
        return None if block is None else Place.of(x, block)


# -- the meetings --------------------------------------------------------------------------------


class DirectBoard:
    """Where the ranks of a node meet: counters, and what each came with.

    Parameters
    ----------
    memory : buffer
        `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank, and the number of ranks.
    """

    _RECORD = struct.Struct("<6Q")
    _SLOT = 8  # of 8 bytes: a record, its number, and padding to a cache line

    def __init__(self, memory: Any, rank: int, size: int) -> None:
        self._bytes = memoryview(memory).cast("B")
        self._words = self._bytes.cast("Q")
        self._rank = rank
        self._stride = self._SLOT * (_RING + 1)
        self._starts = tuple(other * self._stride for other in range(size))
        self._others = tuple(s for r, s in enumerate(self._starts) if r != rank)
        self._mine = self._starts[rank]

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Return the memory that so many ranks need."""
        return size * cls._SLOT * (_RING + 1) * 8

    def _slot(self, start: int, number: int) -> int:
        return start + self._SLOT * (1 + number % _RING)

    def enter(self, number: int, record: tuple[int, ...]) -> None:
        """Come to operation `number` with these arguments; what was written before is visible."""
        slot = self._slot(self._mine, number)
        self._RECORD.pack_into(self._bytes, 8 * slot, *record)
        with _FENCE:
            pass
        self._words[slot + 7] = number

    def all_entered(self, number: int) -> bool:
        """Whether the others have come to it."""
        words, place = self._words, self._slot(7, number)
        for start in self._others:  # noqa: SIM110  # this is polled
            if words[start + place] != number:
                return False
        return True

    def absent(self, number: int) -> list[int]:
        """Return the ranks that have not come to operation `number`."""
        place = self._slot(7, number)
        return [r for r, start in enumerate(self._starts) if self._words[start + place] != number]

    def unfinished(self, number: int) -> list[int]:
        """Return the ranks that are not done with operation `number`."""
        return [r for r, start in enumerate(self._starts) if self._words[start] < number]

    def records(self, number: int) -> list[tuple[int, ...]]:
        """Return what each rank came with."""
        places = [8 * self._slot(start, number) for start in self._starts]
        return [self._RECORD.unpack_from(self._bytes, place) for place in places]

    def finish(self, number: int) -> None:
        """Be done with operation `number` and all before it."""
        with _FENCE:
            pass
        self._words[self._mine] = number

    def all_finished(self, number: int) -> bool:
        """Whether the others are, too."""
        words = self._words
        for start in self._others:  # noqa: SIM110  # this is polled
            if words[start] < number:
                return False
        return True


class Until(Work[None]):
    """Complete when a condition holds.

    Parameters
    ----------
    condition : callable
        Polled.
    missing : callable
        Returns the ranks that keep it from holding.
    """

    def __init__(self, condition: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        self.condition = condition
        self.missing = missing

    def done(self) -> bool:
        """Return whether the condition holds."""
        return self.condition()

    def wait(self, timeout: float | None = None) -> None:
        """Do nothing: a phase is polled, never waited for."""


Meetings: TypeAlias = Generator[Until, None, None]
"""An operation on the direct path: it yields each meeting that it has to wait for."""


# -- the collectives -----------------------------------------------------------------------------

_VERBS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter")
_OPS = tuple(ReduceOp)
_DTYPES: tuple[DType, ...] = tuple(sorted(DTYPES, key=lambda dtype: dtype.name))


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
    """

    def __init__(self, board: DirectBoard, rank: int, size: int) -> None:
        self._board = board
        self._rank = rank
        self._size = size
        self._begun = 0
        self._entered = 0
        self._finished = 0

    def plan(self, verb: str, args: tuple[Any, ...], registered: Registry) -> Meetings | None:
        """Return the steps of a collective on registered memory, or None if it is not on such.

        Parameters
        ----------
        verb, args : str, tuple
            As a transport gets them.
        registered : Registry
            The group's blocks.

        Returns
        -------
        Meetings or None
            The same choice on all ranks if they pass the same places, as they must.
        """
        if verb == "all_reduce":
            x, out, op = args
            place = registered.place(x) if x is out else None
            return None if place is None else self.all_reduce(place, op)
        if verb == "reduce_scatter":
            x, out, counts, op = args
            place = registered.place(x)
            return None if place is None else self.reduce_scatter(place, out, counts, op)
        if verb == "all_gather":
            x, out, counts = args
            place = registered.place(out) if x is None else None
            return None if place is None else self.all_gather(place, counts)
        if verb == "broadcast":
            x, root = args
            place = registered.place(x)
            return None if place is None else self.broadcast(place, root)
        return None

    def all_reduce(self, place: Place, op: ReduceOp) -> Meetings:
        """Combine the arrays of all ranks in rank order, in place.

        Each rank combines one slice of all arrays and writes the result into all: 2 (p - 1) / p
        of the array read from others and written to others, nothing sent.
        """
        slices = self._slices(place)
        return self._operate("all_reduce", place, op, 0, lambda: reduce_into_all(slices(), op))

    def reduce_scatter(
        self, place: Place, out: Array, counts: Sequence[int], op: ReduceOp
    ) -> Meetings:
        """Combine this rank's part of all arrays in rank order into `out`, anywhere."""
        start = sum(counts[: self._rank])
        stop = start + counts[self._rank]

        def work() -> None:
            reduce_into([array[start:stop] for array in place.arrays()], op, out)

        return self._operate("reduce_scatter", place, op, 0, work)

    def all_gather(self, place: Place, counts: Sequence[int]) -> Meetings:
        """Copy every rank's own part of the arrays from its array into this rank's."""

        def work() -> None:
            arrays, start = place.arrays(), 0
            for rank, count in enumerate(counts):
                if rank != self._rank:
                    arrays[self._rank][start : start + count] = arrays[rank][start : start + count]
                start += count

        return self._operate("all_gather", place, ReduceOp.SUM, 0, work)

    def broadcast(self, place: Place, root: int) -> Meetings:
        """Copy the array of `root` into this rank's."""

        def work() -> None:
            if self._rank != root:
                arrays = place.arrays()
                arrays[self._rank][...] = arrays[root]

        return self._operate("broadcast", place, ReduceOp.SUM, root, work)

    def _slices(self, place: Place) -> Callable[[], list[Array]]:
        """Return what returns this rank's slice of every array, in whole cache lines."""
        unit = _CACHE_LINE // gcd(_CACHE_LINE, place.dtype.itemsize)
        start, size = split_evenly(-(-place.count // unit), self._size)[self._rank]
        return lambda: [a[start * unit : (start + size) * unit] for a in place.arrays()]

    def _operate(
        self, verb: str, place: Place, op: ReduceOp, root: int, work: Callable[[], None]
    ) -> Meetings:
        """Meet, work, meet."""
        self._begun += 1
        number, board = self._begun, self._board
        record = (
            _VERBS.index(verb) << 32 | _OPS.index(op) << 16 | root,
            _DTYPES.index(place.dtype),
            place.count,
            place.block.number,
            place.offset,
            0,
        )
        if self._entered < number - 1 or not self._slot_free(number):
            yield Until(
                lambda: self._entered == number - 1 and self._slot_free(number),
                lambda: board.unfinished(number - _RING),
            )
        board.enter(number, record)
        self._entered = number
        yield Until(
            lambda: self._finished == number - 1 and board.all_entered(number),
            lambda: board.absent(number),
        )
        records = board.records(number)
        alike = all(other == record for other in records)
        if alike:
            work()
        self._finished = number
        board.finish(number)
        yield Until(lambda: board.all_finished(number), lambda: board.unfinished(number))
        if not alike:
            raise CollectiveMismatchError(_tell_difference(records))

    def _slot_free(self, number: int) -> bool:
        last = number - _RING
        return last <= 0 or (self._finished >= last and self._board.all_finished(last))


def _tell_difference(records: Sequence[tuple[int, ...]]) -> str:
    told = []
    for rank, (what, dtype, count, block, offset, _) in enumerate(records):
        verb, op, root = _VERBS[what >> 32], _OPS[what >> 16 & 0xFFFF], what & 0xFFFF
        told.append(
            f"rank {rank}: {verb} (op {op.name}, root {root}) of {count} {_DTYPES[dtype]} at byte "
            f"{offset} of registered block {block}"
        )
    return (
        "the ranks called different things on registered memory; nothing has been changed. All "
        "must make the same call on the same place of the same block: " + "; ".join(told)
    )


def _blocks(arrays: Sequence[Array]) -> Iterator[list[Array]]:
    step = max(_BLOCK_BYTES // arrays[0].itemsize, 1)
    for start in range(0, arrays[0].size, step):
        yield [array[start : start + step] for array in arrays]


def reduce_into_all(arrays: Sequence[Array], op: ReduceOp) -> None:
    """Combine arrays in their order, and write the result into each, a cacheful at a time."""
    combine = _combiner(arrays[0].dtype, op)
    with np.errstate(all="ignore"):
        for blocks in _blocks(arrays):
            first = blocks[0]
            combine(blocks, first)
            for other in blocks[1:]:
                np.copyto(other, first)


def reduce_into(arrays: Sequence[Array], op: ReduceOp, out: Array) -> None:
    """Combine arrays in their order into `out`, a cacheful at a time."""
    combine = _combiner(out.dtype, op)
    with np.errstate(all="ignore"):
        for *blocks, target in _blocks([*arrays, out]):
            combine(blocks, target)


def _combiner(dtype: DType, op: ReduceOp) -> Callable[[list[Array], Array], None]:
    """Return what combines blocks in their order into one, which may be the first."""
    ufunc = ufunc_of(op)
    wide = np.dtype(np.float32) if dtype in HALVES else dtype

    def combine(blocks: list[Array], out: Array) -> None:
        total: Any = out
        if wide is not dtype:
            blocks = [block.astype(wide) for block in blocks]
            total = blocks[0]
        ufunc(blocks[0], blocks[1], out=total, casting="unsafe")
        for block in blocks[2:]:
            ufunc(total, block, out=total, casting="unsafe")
        if op is MEAN:
            np.divide(total, len(blocks), out=total)
        if total is not out:
            np.copyto(out, total, casting="unsafe")

    return combine
