"""Where the ranks of a node meet: counters in shared memory, and what each rank came with.

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
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Work

__all__ = ["RING", "DirectBoard", "Meetings", "Until", "supported"]

T = TypeVar("T")

RING = 64
"""Operations that may be under way at once; a further one is delayed."""

_FENCE = threading.Lock()


def supported() -> bool:
    """Whether this processor orders memory as the direct path needs; see [Note: memory order]."""
    return platform.machine() in ("x86_64", "AMD64")


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
        self._stride = self._SLOT * (RING + 1)
        self._starts = tuple(other * self._stride for other in range(size))
        self._others = tuple(s for r, s in enumerate(self._starts) if r != rank)
        self._mine = self._starts[rank]

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Return the memory that so many ranks need."""
        return size * cls._SLOT * (RING + 1) * 8

    def _slot(self, start: int, number: int) -> int:
        return start + self._SLOT * (1 + number % RING)

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
        """Wait until it holds, without driving anything else."""
        wait_until(self.condition, timeout=float("inf") if timeout is None else timeout)


Meetings: TypeAlias = Generator[Until, None, T]
"""Steps of an operation on the direct path: it yields each meeting that it has to wait for."""
