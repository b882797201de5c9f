"""Where the ranks of a node meet: counters in shared memory, and what each rank came with.

[Note: memory order] A meeting is a counter per rank, written by its owner and read by the others.
On x86-64 stores become visible in the order in which they were made and loads are not reordered
with loads (Intel SDM, volume 3, section 9.2.2), so that whoever sees the counter sees what was
written before it; only non-temporal stores, which a large memcpy may use, need a fence, and taking
a lock is one (any locked instruction is). Other processors promise less, and have no direct path.
"""

from __future__ import annotations

import mmap
import platform
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

import numpy as np

from mpidist._types import Array, DType
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Work

__all__ = ["RING", "SMALL", "DirectBoard", "Meetings", "Until", "supported"]

T = TypeVar("T")

RING = 64
"""Operations that may be under way at once; a further one is delayed."""

SMALL = 16 << 10
"""Bytes of the largest array that the ranks can give each other together with their arrival."""

_FENCE = threading.Lock()


def supported() -> bool:
    """Whether this processor orders memory as the direct path needs; see [Note: memory order]."""
    return platform.machine() in ("x86_64", "AMD64")


class DirectBoard:
    """Where the ranks of a node meet: counters, what each came with, and room for small arrays.

    Parameters
    ----------
    memory : buffer
        `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank, and the number of ranks.
    """

    # In words of 8 bytes. A slot holds a record, a number where somebody objects, and the number
    # of its operation; a rank's part begins with a slot of its counters: finished, reached.
    _SLOT = 8
    _OBJECTION, _NUMBER = 6, 7
    _ROOM = _SLOT * (RING + 1) * 8
    _PART = -(-(_ROOM + 2 * SMALL) // mmap.PAGESIZE) * mmap.PAGESIZE

    def __init__(self, memory: Any, rank: int, size: int) -> None:
        self._bytes = memoryview(memory).cast("B")
        self._words = self._bytes.cast("Q")
        self._starts = tuple(other * self._PART // 8 for other in range(size))
        self._others = tuple(s for other, s in enumerate(self._starts) if other != rank)
        self._mine = self._starts[rank]

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Return the memory that so many ranks need."""
        return size * cls._PART

    # -- operations, by their number -------------------------------------------------------------

    def enter(self, number: int, record: bytes) -> None:
        """Come to operation `number` with these arguments; what was written before is visible."""
        slot = self._mine + self._SLOT * (1 + number % RING)
        self._bytes[8 * slot : 8 * slot + len(record)] = record
        with _FENCE:
            pass
        self._words[slot + 7] = number

    def all_entered(self, number: int) -> bool:
        """Whether the others have come to it."""
        words, place = self._words, self._SLOT * (1 + number % RING) + 7
        for start in self._others:  # noqa: SIM110  # this is polled
            if words[start + place] != number:
                return False
        return True

    def absent(self, number: int) -> list[int]:
        """Return the places of the ranks that have not come to operation `number`."""
        place = self._SLOT * (1 + number % RING) + self._NUMBER
        return [at for at, start in enumerate(self._starts) if self._words[start + place] != number]

    def same(self, number: int, record: bytes) -> bool:
        """Whether all came to it with this record."""
        place, length = 8 * self._SLOT * (1 + number % RING), len(record)
        for start in self._others:
            at = 8 * start + place
            if self._bytes[at : at + length] != record:
                return False
        return True

    def records(self, number: int) -> list[bytes]:
        """Return what each rank came with."""
        place = 8 * self._SLOT * (1 + number % RING)
        places = [8 * start + place for start in self._starts]
        return [bytes(self._bytes[at : at + 8 * self._OBJECTION]) for at in places]

    def object(self, number: int) -> None:
        """Say to the others, before `finish`, that an operation was not performed."""
        self._words[self._mine + self._SLOT * (1 + number % RING) + self._OBJECTION] = number

    def objected(self, number: int) -> bool:
        """Whether anybody did."""
        place = self._SLOT * (1 + number % RING) + self._OBJECTION
        return any(self._words[start + place] == number for start in self._starts)

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
        words = self._words
        for start in self._others:  # noqa: SIM110  # this is polled
            if words[start + 1] < stage:
                return False
        return True

    def behind(self, stage: int) -> list[int]:
        """Return the places of the ranks that have not come to a stage."""
        return [at for at, start in enumerate(self._starts) if self._words[start + 1] < stage]

    # -- room for small arrays -------------------------------------------------------------------

    def small(self, half: int, dtype: DType, count: int) -> list[Array]:
        """Return room of each rank for an array of at most `SMALL` bytes, in one of two halves."""
        return [
            np.frombuffer(self._bytes, dtype, count, 8 * start + self._ROOM + half * SMALL)
            for start in self._starts
        ]


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
        """Wait until it holds, without driving anything else."""
        wait_until(self.condition, timeout=float("inf") if timeout is None else timeout)


Meetings: TypeAlias = Generator[Until, None, T]
"""Steps of an operation on the direct path: it yields each meeting that it has to wait for."""
