"""Ranks of a node that end for the same reason: one of them says so for all.

Each rank writes a checksum of its reason, and when, into its part of the recorder's memory, and
waits for a moment. The first of those with the same reason speaks, the others wait until it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic_ns
from zlib import crc32

from mpidist.observe.recorder import Head
from mpidist.observe.recorder.recording import Recording

__all__ = ["Ending", "Failures"]

_PAUSE = 0.15
"""Seconds after which no further rank is waited for, from the last one that has come."""

_LONGEST = 1.0
"""Seconds after which it is not, however many come."""

_SPEAKING = 3.0
"""Seconds that the first rank has to say it."""

_POLL = 0.005


@dataclass(frozen=True, slots=True)
class Ending:
    """Who ends for the same reason.

    Attributes
    ----------
    ranks : tuple of int
        For whom this rank speaks, itself among them; none if another one speaks for it.
    first : int
        The rank that speaks, or has spoken already before this one came.
    others : bool
        Whether ranks of this node are alive that do not end, or end for another reason.
    earlier : int
        How many other reasons have been listed on this node before.
    """

    ranks: tuple[int, ...]
    first: int
    others: bool
    earlier: int = 0


class Failures:
    """Why ranks of this node end.

    Parameters
    ----------
    rank : int
        This rank, in the world.
    recordings : mapping of int to Recording
        Of the ranks of this node.
    alive : callable
        Returns whether the process of a rank can still say something.
    """

    def __init__(
        self, rank: int, recordings: Mapping[int, Recording], alive: Callable[[int], bool]
    ) -> None:
        self._rank = rank
        self._recordings = recordings
        self._alive = alive

    def join(self, reason: str) -> Ending:
        """Write why this rank ends, and return who ends for the same reason; takes up to 4 s.

        Whoever is to speak calls `spoken` afterwards.
        """
        words = self._recordings[self._rank].words
        words[Head.FAILED_AT] = monotonic_ns()
        words[Head.FAILED] = digest = digest_of(reason)
        self._wait_for_others()
        deadline = time.monotonic() + _SPEAKING
        while True:
            same = self._same(digest)
            first = min(same, key=lambda rank: (self._words(rank)[Head.FAILED_AT], rank))
            if first == self._rank:
                words[Head.LISTED] = monotonic_ns()
                time.sleep(_POLL)  # one that has taken its time before that has written it now
                same = self._same(digest)
                others = len(same) < len(self._all_alive())
                return Ending(tuple(same), first, others=others, earlier=self._earlier(digest))
            if self._words(first)[Head.TOLD]:
                late = words[Head.FAILED_AT] > self._words(first)[Head.LISTED]
                return Ending((self._rank,) if late else (), first, others=True)
            if time.monotonic() > deadline:
                return Ending((self._rank,), self._rank, others=True)
            time.sleep(_POLL)

    def spoken(self) -> None:
        """Let the others end: it has been said."""
        self._words(self._rank)[Head.TOLD] = monotonic_ns()

    def _wait_for_others(self) -> None:
        """Wait until all have come, or nobody comes any more."""
        began = last = time.monotonic()
        count = 0
        while (now := time.monotonic()) < min(last + _PAUSE, began + _LONGEST):
            here = self._all_alive()
            came = sum(bool(self._words(rank)[Head.FAILED]) for rank in here)
            if came == len(here):
                return
            if came > count:
                last, count = now, came
            time.sleep(_POLL)

    def _earlier(self, digest: int) -> int:
        """Return how many other reasons were listed before this one."""
        now = self._words(self._rank)[Head.LISTED]
        heads = map(self._words, self._recordings)
        return len({head[Head.FAILED] for head in heads if 0 < head[Head.LISTED] < now} - {digest})

    def _words(self, rank: int) -> memoryview:
        return self._recordings[rank].words

    def _all_alive(self) -> list[int]:
        return [rank for rank in self._recordings if rank == self._rank or self._alive(rank)]

    def _same(self, digest: int) -> list[int]:
        """Return the living ranks with this reason, this one among them."""
        return [rank for rank in self._all_alive() if self._words(rank)[Head.FAILED] == digest]


def digest_of(reason: str) -> int:
    """Return a number for a reason; never 0, which stands for a rank that does not end."""
    return 1 << 32 | crc32(reason.encode(errors="replace"))
