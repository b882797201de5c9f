"""Arrival counters of the ranks of a node, in shared memory, and what each rank has called.

[Note: memory order] Each rank has counters that it alone writes, and all others read.
On x86-64 stores become visible in the order in which they were made and loads are not reordered
with loads (Intel SDM, volume 3, section 9.2.2), so that whoever sees the counter sees what was
written before it; only non-temporal stores, which a large memcpy may use, need a fence, and taking
a lock is one (any locked instruction is). Other processors promise less, and have no direct path.
"""

from __future__ import annotations

import mmap
import threading
from os import sched_yield
from typing import Any

import numpy as np

from mpidist.backends.node.signatures import Record

__all__ = ["RING", "ROOM", "DirectBoard", "fence", "supported"]

RING = 64
"""Operations that may be under way at once; a further one is delayed."""

ROOM = 16 << 10
"""Bytes of the largest array for which there is room beside the counters, twice."""

_BREAKS, _BALANCE, _NUMBER = 4, 5, 7
"""Words of a slot: of the record, and the number of its operation behind it."""

_FENCE = threading.Lock()

_SPINS, _POLLS = 20, 80
"""How often a counter is looked at before the core is yielded in between, and before a wait does
something else, too."""


def supported() -> bool:
    """Whether this processor orders memory as the direct path needs; see [Note: memory order]."""
    import platform  # of the standard library, but not needed to import this package

    return platform.machine() in ("x86_64", "AMD64")


class DirectBoard:
    """Where the ranks of a node meet: counters, what each came with, and room for small arrays.

    Parameters
    ----------
    memory : buffer
        `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank, and the number of ranks.

    Attributes
    ----------
    finished : int
        Number of the last operation with which this rank is done.
    """

    # In words of 8 bytes. A slot holds a record and the number of its operation; a rank's part
    # begins with a slot of its counters: finished, reached.
    _SLOT = 8
    _ROOM = _SLOT * (RING + 1) * 8
    _PART = -(-(_ROOM + 2 * ROOM) // mmap.PAGESIZE) * mmap.PAGESIZE

    def __init__(self, memory: Any, rank: int, size: int) -> None:
        self._bytes = memoryview(memory).cast("B")
        self._words = self._bytes.cast("Q")
        self._starts = tuple(other * self._PART // 8 for other in range(size))
        self._others = tuple(s for other, s in enumerate(self._starts) if other != rank)
        self._mine = self._starts[rank]
        self._numbers = [self._mine + self._SLOT * (2 + place) - 1 for place in range(RING)]
        slots = np.frombuffer(self._bytes, np.uint64, self._SLOT * (RING + 1), 8 * self._mine)
        self._slots = [slot[:_NUMBER] for slot in slots.reshape(-1, self._SLOT)[1:]]
        self.finished = 0
        self._standing: list[Record | None] = [None] * RING

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Return the memory that so many ranks need."""
        return size * cls._PART

    # -- operations, by their number -------------------------------------------------------------

    def enter(self, number: int, record: Record) -> None:
        """Come to operation `number` with these arguments; what was written before is visible."""
        place = number % RING
        if self._standing[place] is not record:
            self._slots[place][...] = record.words
            self._standing[place] = record
        with _FENCE:
            pass
        self._words[self._numbers[place]] = number

    def all_entered(self, number: int) -> bool:
        """Whether the others have come to it."""
        return self._all_at(self._SLOT * (1 + number % RING) + _NUMBER, number)

    def meet(self, number: int, record: Record) -> bool:
        """Come to an operation, and say whether all have soon come to it with the same."""
        # One body, not three methods: this is part of every blocking sum.
        place = number % RING
        if self._standing[place] is not record:
            self._slots[place][...] = record.words
            self._standing[place] = record
        words, digest = self._words, record.digest
        with _FENCE:
            pass
        words[self._numbers[place]] = number
        place = 8 * place + 15  # where its number stands; looking names up takes longer
        for start in self._others:
            at = start + place
            if words[at] < number and not _comes(words, at, number):
                return False
            if words[at - 1] != digest:
                return False
        return True

    def absent(self, number: int) -> list[int]:
        """Return the places of the ranks that have not come to operation `number`."""
        place = self._SLOT * (1 + number % RING) + _NUMBER
        return [at for at, start in enumerate(self._starts) if self._words[start + place] != number]

    def same(self, number: int, record: Record) -> bool:
        """Whether all came to it with this record."""
        words, place = self._words, self._SLOT * (1 + number % RING) + 6
        digest = record.digest
        for start in self._others:  # noqa: SIM110  # part of every operation
            if words[start + place] != digest:
                return False
        return True

    def balanced(self, number: int) -> bool:
        """Whether the balances of all ranks add up to 0."""
        place = self._SLOT * (1 + number % RING) + _BALANCE
        return sum(self._words[start + place] for start in self._starts) % 2**64 == 0

    def breaks(self, number: int) -> bool:
        """Whether any rank came with a call of which a part is under way."""
        place = self._SLOT * (1 + number % RING) + _BREAKS
        return any(self._words[start + place] for start in self._starts)

    def finish(self, number: int) -> None:
        """Be done with operation `number` and all before it."""
        with _FENCE:
            pass
        self._words[self._mine] = number
        # Last: where another thread drives this one, the next may be over as soon as this is
        # finished here, and the number on the board must not go back.
        self.finished = number

    def all_finished(self, number: int) -> bool:
        """Whether the others are, too."""
        return self._all_at(0, number)

    def soon_finished(self, number: int) -> bool:
        """Whether they are, or will be within a few microseconds."""
        return self._soon_at(0, number)

    def least_finished(self) -> int:
        """Return the last operation with which all are done."""
        return min(self._words[start] for start in self._starts)

    def unfinished(self, number: int) -> list[int]:
        """Return the places of the ranks that are not done with operation `number`."""
        return [at for at, start in enumerate(self._starts) if self._words[start] < number]

    # -- stages inside an operation, counted over all of them ------------------------------------

    def reach(self, stage: int) -> None:
        """Come to a stage; what was written before is visible."""
        with _FENCE:
            pass
        self._words[self._mine + 1] = stage

    def all_reached(self, stage: int) -> bool:
        """Whether the others have, too."""
        return self._all_at(1, stage)

    def soon_reached(self, stage: int) -> bool:
        """Whether they have, or do so within a few microseconds."""
        return self._soon_at(1, stage)

    def behind(self, stage: int) -> list[int]:
        """Return the places of the ranks that have not come to a stage."""
        return [at for at, start in enumerate(self._starts) if self._words[start + 1] < stage]

    # -- counters --------------------------------------------------------------------------------

    def _all_at(self, place: int, number: int) -> bool:
        """Whether this word of all others has come to a number."""
        words = self._words
        for start in self._others:  # noqa: SIM110  # this is polled
            if words[start + place] < number:
                return False
        return True

    def _soon_at(self, place: int, number: int) -> bool:
        """Whether it has, or comes to it soon."""
        words = self._words
        for start in self._others:
            at = start + place
            if words[at] < number and not _comes(words, at, number):
                return False
        return True

    def rooms(self) -> list[memoryview]:
        """Return `2 * ROOM` bytes of each rank, for small arrays."""
        starts = [8 * start + self._ROOM for start in self._starts]
        return [self._bytes[start : start + 2 * ROOM] for start in starts]


def _comes(words: memoryview, at: int, number: int) -> bool:
    """Whether a word comes to a number within a few microseconds."""
    for polls in range(_POLLS):
        if polls >= _SPINS:
            sched_yield()
        if words[at] >= number:
            return True
    return False


def fence() -> None:
    """Make what this rank has written visible before what it writes from now on."""
    with _FENCE:
        pass
