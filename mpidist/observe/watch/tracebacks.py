"""Exceptions that nobody caught, in words: without this package's own frames."""

from __future__ import annotations

import re
import traceback
from types import TracebackType

from mpidist.errors import CollectiveMismatchError, DistributedError
from mpidist.observe.recorder import is_inside
from mpidist.observe.recorder.recording import Site
from mpidist.observe.watch.report import place

__all__ = ["callers_of", "lines_of", "reason_of", "summary_of"]

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


def lines_of(
    error: BaseException, trace: TracebackType | None, *, whole: bool = False
) -> list[str]:
    """Return the traceback, whose last line is left out if it is `summary_of` alone.

    Parameters
    ----------
    error : BaseException
        The exception.
    trace : TracebackType or None
        Where it came from.
    whole : bool, optional
        Whether to keep the frames of this package's own files. They are kept in any case where
        there are no others.
    """
    told = traceback.TracebackException(type(error), error, trace)
    if not whole:
        _leave_out(told, set())
    lines = "".join(told.format()).splitlines()
    if lines[-1] == summary_of(error):
        del lines[-1]
    return lines


def _leave_out(told: traceback.TracebackException, seen: set[int]) -> None:
    """Drop the frames of this package from an exception, and from those that led to it."""
    if id(told) in seen:
        return
    seen.add(id(told))
    outside = [frame for frame in told.stack if not is_inside(frame.filename)]
    if outside:
        told.stack = traceback.StackSummary.from_list(outside)
    group = getattr(told, "exceptions", None) or ()  # from Python 3.11 on
    for other in (told.__cause__, told.__context__, *group):
        if other is not None:
            _leave_out(other, seen)


def callers_of(trace: TracebackType | None) -> str:
    """Return the innermost lines of the program that led to an exception, on one line."""
    frames = [frame for frame in _frames(trace) if not is_inside(frame.filename)]
    sites = [Site(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)]
    return " < ".join(map(place, sites[:_FRAMES]))


def _frames(trace: TracebackType | None) -> traceback.StackSummary:
    return traceback.StackSummary.extract(traceback.walk_tb(trace), lookup_lines=False)
