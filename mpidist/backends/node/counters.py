"""Arrival counters of the ranks of a node, in shared memory, and the call signature of each.

[Note: memory order] Each rank has counters that it alone writes and that all others read. On x86-64
stores become visible in the order in which they were made and loads are not reordered with loads
(Intel SDM, volume 3, section 9.2.2), so that a rank that sees a counter sees everything that was
written before it; only non-temporal stores, which a large memcpy may use, need a fence, and taking
a lock is one (any locked instruction is). Other processors promise less, and have no direct path.
"""

from __future__ import annotations

import mmap
import threading
from os import sched_yield
from typing import Any

import numpy as np

from mpidist.backends.node.signatures import CallSignature

__all__ = ["RING", "SMALL_NBYTES", "ArrivalCounters", "fence", "supported"]

RING = 64
"""Operations that may be under way at once; a further one is delayed."""

SMALL_NBYTES = 16 << 10
"""Bytes of the largest array that has a buffer beside the counters; each rank has two of them."""

_BREAKS, _BALANCE, _DIGEST, _NUMBER = 4, 5, 6, 7
"""Words of a slot: three of the call signature, and behind it the number of its operation."""

_FENCE = threading.Lock()

_SPINS, _POLLS = 20, 80
"""How often a counter is read before the core is yielded in between, and before the wait gives up
spinning and drives other operations, too."""


def supported() -> bool:
    """Whether this processor orders memory as the direct path needs; see [Note: memory order]."""
    import platform  # of the standard library, but not needed to import this package

    return platform.machine() in ("x86_64", "AMD64")


class ArrivalCounters:
    """What each rank of a node has begun and finished, and buffers for small arrays.

    Parameters
    ----------
    memory : buffer
        `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank among those of the node, and their number.

    Attributes
    ----------
    finished : int
        Number of the last operation that this rank has finished.
    """

    # In words of 8 bytes. A slot holds a call signature and the number of its operation; the part
    # of a rank begins with a slot of its counters: last operation finished, last phase reached.
    _SLOT = 8
    _BUFFERS = _SLOT * (RING + 1) * 8
    _PART = -(-(_BUFFERS + 2 * SMALL_NBYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

    def __init__(self, memory: Any, rank: int, size: int) -> None:
        self._bytes = memoryview(memory).cast("B")
        self._values = self._bytes.cast("Q")
        self._starts = tuple(other * self._PART // 8 for other in range(size))
        self._others = tuple(s for other, s in enumerate(self._starts) if other != rank)
        self._own = self._starts[rank]
        self._numbers = [self._own + self._SLOT * (2 + slot) - 1 for slot in range(RING)]
        slots = np.frombuffer(self._bytes, np.uint64, self._SLOT * (RING + 1), 8 * self._own)
        self._slots = [slot[:_NUMBER] for slot in slots.reshape(-1, self._SLOT)[1:]]
        self.finished = 0
        # What stands in each slot: a program repeats its calls, and need not write them again.
        self._written: list[CallSignature | None] = [None] * RING

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Return the bytes of memory that `size` ranks need."""
        return size * cls._PART

    # -- operations, by their number -------------------------------------------------------------

    def arrive(self, number: int, signature: CallSignature) -> None:
        """Publish this rank's arrival at operation `number`, after all earlier writes (release)."""
        slot = number % RING
        if self._written[slot] is not signature:
            self._slots[slot][...] = signature.values
            self._written[slot] = signature
        with _FENCE:
            pass
        self._values[self._numbers[slot]] = number

    def all_arrived(self, number: int) -> bool:
        """Whether the other ranks have arrived at operation `number`."""
        return self._all_at(self._SLOT * (1 + number % RING) + _NUMBER, number)

    def arrive_and_compare(self, number: int, signature: CallSignature) -> bool:
        """Arrive, spin for a few microseconds, and return whether all have with the same call."""
        # One body, not three methods: this is part of every blocking sum.
        slot = number % RING
        if self._written[slot] is not signature:
            self._slots[slot][...] = signature.values
            self._written[slot] = signature
        values, digest = self._values, signature.digest
        with _FENCE:
            pass
        values[self._numbers[slot]] = number
        offset = 8 * slot + 15  # of the slot's number; constants of the class take longer to find
        for start in self._others:
            index = start + offset
            if values[index] < number and not _soon_reaches(values, index, number):
                return False
            if values[index - 1] != digest:
                return False
        return True

    def missing(self, number: int) -> list[int]:
        """Return the ranks of the node that have not arrived at operation `number`."""
        offset = self._SLOT * (1 + number % RING) + _NUMBER
        return [
            rank
            for rank, start in enumerate(self._starts)
            if self._values[start + offset] != number
        ]

    def same(self, number: int, signature: CallSignature) -> bool:
        """Whether all arrived with this signature."""
        values, offset = self._values, self._SLOT * (1 + number % RING) + _DIGEST
        digest = signature.digest
        for start in self._others:  # noqa: SIM110  # part of every operation
            if values[start + offset] != digest:
                return False
        return True

    def balanced(self, number: int) -> bool:
        """Whether the balances of all ranks add up to 0."""
        offset = self._SLOT * (1 + number % RING) + _BALANCE
        return sum(self._values[start + offset] for start in self._starts) % 2**64 == 0

    def breaks(self, number: int) -> bool:
        """Whether any rank made a call of which a part is under way."""
        offset = self._SLOT * (1 + number % RING) + _BREAKS
        return any(self._values[start + offset] for start in self._starts)

    def finish(self, number: int) -> None:
        """Publish that this rank has finished operation `number` and all before it (release)."""
        with _FENCE:
            pass
        self._values[self._own] = number
        # Last: where another thread drives this operation, the next one may be over as soon as this
        # is finished here, and the number in shared memory must not go back.
        self.finished = number

    def all_finished(self, number: int) -> bool:
        """Whether the other ranks have finished operation `number`."""
        return self._all_at(0, number)

    def soon_finished(self, number: int) -> bool:
        """Spin for a few microseconds, and return whether the other ranks have finished it."""
        return self._soon_at(0, number)

    def least_finished(self) -> int:
        """Return the number of the last operation that all ranks have finished."""
        return min(self._values[start] for start in self._starts)

    def unfinished(self, number: int) -> list[int]:
        """Return the ranks of the node that have not finished operation `number`."""
        return [rank for rank, start in enumerate(self._starts) if self._values[start] < number]

    # -- phases inside an operation, counted over all operations ---------------------------------

    def reach(self, phase: int) -> None:
        """Publish that this rank has reached a phase, after all earlier writes (release)."""
        with _FENCE:
            pass
        self._values[self._own + 1] = phase

    def all_reached(self, phase: int) -> bool:
        """Whether the other ranks have reached a phase."""
        return self._all_at(1, phase)

    def soon_reached(self, phase: int) -> bool:
        """Spin for a few microseconds, and return whether the other ranks have reached it."""
        return self._soon_at(1, phase)

    def not_reached(self, phase: int) -> list[int]:
        """Return the ranks of the node that have not reached a phase."""
        return [rank for rank, start in enumerate(self._starts) if self._values[start + 1] < phase]

    # -- memory ----------------------------------------------------------------------------------

    def _all_at(self, offset: int, number: int) -> bool:
        """Whether this word of all others is at least `number`."""
        values = self._values
        for start in self._others:  # noqa: SIM110  # this is polled
            if values[start + offset] < number:
                return False
        return True

    def _soon_at(self, offset: int, number: int) -> bool:
        """Whether it is, or becomes so soon."""
        values = self._values
        for start in self._others:
            index = start + offset
            if values[index] < number and not _soon_reaches(values, index, number):
                return False
        return True

    def small_buffers(self) -> list[memoryview]:
        """Return `2 * SMALL_NBYTES` bytes of each rank, for small arrays."""
        starts = [8 * start + self._BUFFERS for start in self._starts]
        return [self._bytes[start : start + 2 * SMALL_NBYTES] for start in starts]


def _soon_reaches(values: memoryview, index: int, number: int) -> bool:
    """Whether a word reaches a number within a few microseconds."""
    for polls in range(_POLLS):
        if polls >= _SPINS:
            sched_yield()
        if values[index] >= number:
            return True
    return False


def fence() -> None:
    """Make what this rank has written visible before what it writes from now on."""
    with _FENCE:
        pass
