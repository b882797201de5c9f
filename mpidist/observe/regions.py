"""Regions: parts of a program with a name, whose times are kept while a trace is on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from time import monotonic_ns
from types import TracebackType
from typing import Protocol

__all__ = ["region"]

STEP = "step"
"""Name of the region that is one training step: a summary of a trace counts by it."""


class Marks(Protocol):
    """Something that records regions, such as a trace."""

    def mark(self, name: str, began: int, ended: int) -> None:
        """Receive a region that has ended; times in nanoseconds of `time.monotonic_ns`."""

    def transfer(self, name: str, began: int, ended: int, exposed: int) -> None:
        """Receive what was under way, and how many nanoseconds the program waited for it."""


listener: ContextVar[Marks | None] = ContextVar("mpidist_listener", default=None)
"""The trace that keeps the regions of this thread. Ranks may be threads of one process."""

_NOTHING: AbstractContextManager[None] = nullcontext()


def region(name: str) -> AbstractContextManager[None]:
    """Give a part of the program a name in the trace.

    Parameters
    ----------
    name : str
        What is being done. ``"step"`` is one training step: ``python -m mpidist trace summary``
        finds the slowest rank of each.

    Returns
    -------
    context manager
        The part is what stands inside. Regions may be nested.

    Notes
    -----
    Local. Costs a fraction of a microsecond while no trace is on, and about one while one is. Only
    the thread that began the trace is listened to.

    Examples
    --------
    >>> with region("load"):
    ...     x = [1.0, 2.0]
    """
    marks = listener.get()
    return _NOTHING if marks is None else _Region(name, marks)


class _Region:
    """A region while there is a listener."""

    __slots__ = ("_began", "_marks", "_name")

    def __init__(self, name: str, marks: Marks) -> None:
        self._name = name
        self._marks = marks

    def __enter__(self) -> None:
        self._began = monotonic_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._marks.mark(self._name, self._began, monotonic_ns())
