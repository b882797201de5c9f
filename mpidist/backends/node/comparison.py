"""How the ranks of a group compare their calls: on a board in shared memory, or by a small sum.

Both are the arrival of a collective at the same time: a rank knows that the calls are the same when
it knows that all ranks have come.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np

from mpidist._types import Array
from mpidist.backends.node.meetings import DirectBoard, Record, fence
from mpidist.backends.work import Work

__all__ = ["Add", "BoardComparison", "Comparison", "SumComparison"]

Add: TypeAlias = Callable[[Array], Work[Any]]
"""Starts adding up the uint64 words of all ranks, in place and modulo 2**64."""

_MASK = 2**64 - 1


class Comparison(Protocol):
    """The arrivals of one group, by number of the operation."""

    def enter(self, number: int, record: Record) -> None:
        """Make known that this rank has come to an operation with this record."""

    def arrived(self, number: int) -> bool:
        """Whether all ranks have come to it; polled."""

    def missing(self, number: int) -> list[int]:
        """Return the places on the node of the ranks that have not come, as far as is known."""

    def equal(self, number: int, record: Record) -> bool:
        """Whether all came with the same; asked once, when all have arrived."""

    def breaks(self, number: int) -> bool:
        """Whether any rank has begun what cannot be taken back; asked where they are not equal."""


class BoardComparison:
    """Compares on a board that all ranks of the group share.

    Parameters
    ----------
    board : DirectBoard
        Theirs.
    """

    def __init__(self, board: DirectBoard) -> None:
        self.enter = board.enter
        self.arrived = board.all_entered
        self.missing = board.absent
        self.breaks = board.breaks
        self._board = board

    def equal(self, number: int, record: Record) -> bool:
        """Whether all came with the same."""
        same = self._board.same(number, record)
        return same and (record.balance is None or self._board.balanced(number))


class SumComparison:
    """Compares by one all-reduce of 32 bytes.

    Each rank gives two hashes of its record, whether a difference breaks the group, and its
    balance. If the ranks have the same record, the sums of the hashes are the size of the group
    times this rank's own. If they have not, the sums tell so as surely as the digests of the calls
    do, which are a CRC-32 of their words.

    Parameters
    ----------
    add : callable
        Starts the all-reduce.
    size : int
        Number of ranks.
    """

    def __init__(self, add: Add, size: int) -> None:
        self._add = add
        self._size = size
        self._sums: dict[int, tuple[Array, Work[Any]]] = {}

    def enter(self, number: int, record: Record) -> None:
        """Start the all-reduce; at the call, so that its order is the same on all ranks."""
        words = (*_hashes(record.digest), int(record.breaks), record.balance or 0)
        sums = np.array(words, np.uint64)
        fence()  # what lies in memory that the node shares counts as given from now on
        self._sums[number] = sums, self._add(sums)

    def arrived(self, number: int) -> bool:
        """Whether the sum is complete."""
        return self._sums[number][1].done()

    def missing(self, number: int) -> list[int]:
        """Return none: a sum does not tell who is missing."""
        return []

    def equal(self, number: int, record: Record) -> bool:
        """Whether all came with the same."""
        first, second, _, balance = self._sums[number][0].tolist()
        mine = tuple(each * self._size & _MASK for each in _hashes(record.digest))
        same = (first, second) == mine and balance == 0
        if same:
            del self._sums[number]
        return same

    def breaks(self, number: int) -> bool:
        """Whether any rank has begun what cannot be taken back."""
        sums, _ = self._sums.pop(number)
        return bool(sums[2])


@lru_cache(1024)
def _hashes(digest: int) -> tuple[int, int]:
    """Return two independent hashes of a digest (outputs of SplitMix64)."""
    return _mixed(digest), _mixed(digest ^ 0x5851F42D4C957F2D)


def _mixed(x: int) -> int:
    x = x + 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
