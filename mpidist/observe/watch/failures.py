"""Uncaught exceptions as text: one rank writes for all that end alike.

Each rank writes a checksum of its reason, and when, into its part of the recorder's memory, and
waits for a moment. The first of those with the same reason writes it for all of them, and the
others wait until it has.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic_ns
from types import TracebackType
from zlib import crc32

from mpidist.errors import CollectiveMismatchError, DistributedError
from mpidist.observe.recorder import Head, is_inside
from mpidist.observe.recorder.recorder import Site
from mpidist.observe.recorder.recording import Recording
from mpidist.observe.watch.report import format_site

_PAUSE = 0.15
"""Seconds after which no further rank is waited for, from the arrival of the last one."""

_LONGEST = 1.0
"""Seconds after which it is not, however many arrive."""

_SPEAKING = 3.0
"""Seconds that the first rank has to write it."""

_POLL = 0.005


@dataclass(frozen=True, slots=True)
class Ending:
    """Which ranks end for the same reason.

    Attributes
    ----------
    ranks : tuple of int
        The ranks for which this one writes the reason, itself among them; none if another does.
    first : int
        The rank that writes it, or has written it before this one came.
    others : bool
        Whether ranks of this node are alive that do not end, or end for another reason.
    earlier : int
        How many other reasons have been written on this node before.
    """

    ranks: tuple[int, ...]
    first: int
    others: bool
    earlier: int = 0


class Failures:
    """Why ranks of this node end; `rank` is this one, and all are in `recordings`.

    `alive` returns whether a rank may still fail, or say that it has.
    """

    def __init__(
        self, rank: int, recordings: Mapping[int, Recording], alive: Callable[[int], bool]
    ) -> None:
        self._rank = rank
        self._cells = {other: recording.cells for other, recording in recordings.items()}
        self._alive = alive

    def join(self, reason: str) -> Ending:
        """Record why this rank ends, and return who ends for the same reason; takes up to 4 s.

        The rank that writes the reason calls `spoken` afterwards.
        """
        cells = self._cells[self._rank]
        cells[Head.FAILED_AT] = monotonic_ns()
        cells[Head.FAILED] = digest = digest_of(reason)
        self._wait_for_others()
        deadline = time.monotonic() + _SPEAKING
        while True:
            same = self._same(digest)
            first = min(same, key=lambda rank: (self._cells[rank][Head.FAILED_AT], rank))
            if first == self._rank:
                cells[Head.LISTED] = monotonic_ns()
                time.sleep(_POLL)  # one that has taken its time before that has written it now
                same = self._same(digest)
                others = len(same) < len(self._all_alive())
                return Ending(tuple(same), first, others=others, earlier=self._earlier(digest))
            if self._cells[first][Head.SPOKEN]:
                late = cells[Head.FAILED_AT] > self._cells[first][Head.LISTED]
                return Ending((self._rank,) if late else (), first, others=True)
            if time.monotonic() > deadline:
                return Ending((self._rank,), self._rank, others=True)
            time.sleep(_POLL)

    def spoken(self) -> None:
        """Let the others end: the reason has been written."""
        self._cells[self._rank][Head.SPOKEN] = monotonic_ns()

    def _wait_for_others(self) -> None:
        """Wait until all have arrived, or no more arrive."""
        began = last = time.monotonic()
        count = 0
        while (now := time.monotonic()) < min(last + _PAUSE, began + _LONGEST):
            alive = self._all_alive()
            came = sum(bool(self._cells[rank][Head.FAILED]) for rank in alive)
            if came == len(alive):
                return
            if came > count:
                last, count = now, came
            time.sleep(_POLL)

    def _earlier(self, digest: int) -> int:
        """Return how many other reasons were listed before this one."""
        now = self._cells[self._rank][Head.LISTED]
        heads = self._cells.values()
        return len({head[Head.FAILED] for head in heads if 0 < head[Head.LISTED] < now} - {digest})

    def _all_alive(self) -> list[int]:
        return [rank for rank in self._cells if rank == self._rank or self._alive(rank)]

    def _same(self, digest: int) -> list[int]:
        """Return the living ranks with this reason, this one among them."""
        return [rank for rank in self._all_alive() if self._cells[rank][Head.FAILED] == digest]


def digest_of(reason: str) -> int:
    """Return a checksum of a reason; never 0, which stands for a rank that does not end."""
    return 1 << 32 | crc32(reason.encode(errors="replace"))


_FRAMES = 6

_OWN = re.compile(r"\brank \d+ of \d+|\[\w+ \d+/\d+\]|\b0x[0-9a-f]+")
"""What differs between ranks that raise the same: a rank's own number, addresses in memory."""


def summary_of(error: BaseException) -> str:
    """Return an exception's class and the first line of its message."""
    return traceback.format_exception_only(error)[0].splitlines()[0]


def reason_of(error: BaseException, trace: TracebackType | None) -> str:
    """Return a text that is the same on ranks that raise the same."""
    if isinstance(error, DistributedError) and error._reported:
        return f"{type(error).__name__} {error._reported}"
    message = "".join(traceback.format_exception_only(error))
    if isinstance(error, CollectiveMismatchError):
        # Those that differ call at different lines, all of which the message has. It begins with
        # the operation and its group, then comes the rank.
        return message.partition(", rank ")[0]
    sites = [(frame.filename, frame.lineno) for frame in _frames(trace)]
    return f"{_OWN.sub('', message)} {sites}"


def lines_of(error: BaseException, trace: TracebackType | None, *, full: bool = False) -> list[str]:
    """Return the traceback, whose last line is left out if it is `summary_of` alone.

    The frames of this package's own files are left out unless it is `full`, or has no others.
    """
    formatted = traceback.TracebackException(type(error), error, trace)
    if not full:
        _leave_out(formatted, set())
    lines = "".join(formatted.format()).splitlines()
    if lines[-1] == summary_of(error):
        del lines[-1]
    return lines


def _leave_out(formatted: traceback.TracebackException, seen: set[int]) -> None:
    """Drop the frames of this package from an exception, and from those that led to it."""
    if id(formatted) in seen:
        return
    seen.add(id(formatted))
    outside = [frame for frame in formatted.stack if not is_inside(frame.filename)]
    if outside:
        formatted.stack = traceback.StackSummary.from_list(outside)
    group = getattr(formatted, "exceptions", None) or ()  # from Python 3.11 on
    for other in (formatted.__cause__, formatted.__context__, *group):
        if other is not None:
            _leave_out(other, seen)


def callers_of(trace: TracebackType | None) -> str:
    """Return the innermost lines of the program that led to an exception, on one line."""
    frames = [frame for frame in _frames(trace) if not is_inside(frame.filename)]
    sites = [Site(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)]
    return " < ".join(map(format_site, sites[:_FRAMES]))


def _frames(trace: TracebackType | None) -> traceback.StackSummary:
    return traceback.StackSummary.extract(traceback.walk_tb(trace), lookup_lines=False)
