"""A board in node-shared memory: how many collectives each rank has come to, and with what."""

from __future__ import annotations

from mpidist.backends.meetings import supported

__all__ = ["ArrivalBoard"]

_STRIDE = 8
"""Words of 8 bytes from one rank's to the next's: a cache line each, so that none shares."""

_DIGESTS = 1
"""Where the digests of the last two arrivals stand.

Two are enough: nobody comes to the next but one before all have come to the next, and whoever has
has looked at this one.
"""


class ArrivalBoard:
    """One counter per rank; a rank writes its own and reads the others'.

    Parameters
    ----------
    memory : memoryview
        At least `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank, and the number of ranks.
    """

    def __init__(self, memory: memoryview, rank: int, size: int) -> None:
        self._words = memory.cast("Q")
        self._mine = rank * _STRIDE
        self._others = tuple(other * _STRIDE for other in range(size) if other != rank)
        self._arrivals = 0
        # Elsewhere the digest may be seen after the counter; see [Note: memory order] in meetings.
        self._compares = supported()

    @staticmethod
    def nbytes(size: int) -> int:
        """Return the memory that a board for this many ranks takes."""
        return size * _STRIDE * 8

    def arrive(self, digest: int) -> None:
        """Mark that this rank has come to its next collective, with a call of this digest."""
        self._arrivals += 1
        self._words[self._mine + _DIGESTS + self._arrivals % 2] = digest
        self._words[self._mine] = self._arrivals

    def all_here(self) -> bool:
        """Return whether the others have come to it, too."""
        words, arrivals = self._words, self._arrivals
        for other in self._others:  # noqa: SIM110  # twice as fast as all(): this is polled
            if words[other] < arrivals:
                return False
        return True

    def alike(self) -> bool:
        """Return whether all who have come have come with the same call."""
        words, place = self._words, _DIGESTS + self._arrivals % 2
        digest = words[self._mine + place]
        return not self._compares or all(words[other + place] == digest for other in self._others)

    def missing(self) -> list[int]:
        """Return the ranks that have not come."""
        return [other // _STRIDE for other in self._others if self._words[other] < self._arrivals]
