"""A board in node-shared memory on which each rank marks how many collectives it has come to."""

from __future__ import annotations

__all__ = ["ArrivalBoard"]

_STRIDE = 8
"""Counters of 8 bytes from one rank's to the next's: a cache line each, so that none shares."""


class ArrivalBoard:
    """One counter per rank; a rank writes its own and reads the others'.

    A counter only grows, and nothing but itself is read because of it, so that its eventual
    visibility is all that is asked of the memory.

    Parameters
    ----------
    memory : memoryview
        At least `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank, and the number of ranks.
    """

    def __init__(self, memory: memoryview, rank: int, size: int) -> None:
        self._counters = memory.cast("Q")
        self._mine = rank * _STRIDE
        self._others = tuple(other * _STRIDE for other in range(size) if other != rank)
        self._arrivals = 0

    @staticmethod
    def nbytes(size: int) -> int:
        """Return the memory that a board for this many ranks takes."""
        return size * _STRIDE * 8

    def arrive(self) -> None:
        """Mark that this rank has come to its next collective."""
        self._arrivals += 1
        self._counters[self._mine] = self._arrivals

    def all_here(self) -> bool:
        """Return whether the others have come to it, too."""
        counters, arrivals = self._counters, self._arrivals
        for other in self._others:  # noqa: SIM110  # twice as fast as all(): this is polled
            if counters[other] < arrivals:
                return False
        return True

    def missing(self) -> list[int]:
        """Return the ranks that have not come."""
        return [
            other // _STRIDE for other in self._others if self._counters[other] < self._arrivals
        ]
