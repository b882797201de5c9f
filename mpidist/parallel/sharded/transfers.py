"""Transfers of units in the trace, under names such as ``unit 3: reduce``."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic_ns
from typing import TypeVar

from mpidist.backends.work import Work
from mpidist.observe.regions import Marks, listener

__all__ = ["traced"]

T = TypeVar("T")


def traced(name: str, work: Work[T]) -> Work[T]:
    """Give what is under way a name in the trace, which also has how long it is waited for.

    Parameters
    ----------
    name : str
        ``unit N: what``, N being the unit's place in `FSDP.units`.
    work : Work
        What has just been started.

    Returns
    -------
    Work
        To be polled and waited for in its place; `work` itself while no trace is on.
    """
    marks = listener.get()
    return work if marks is None else _TracedWork(name, work, marks)


class _TracedWork(Work[T]):
    """Tells a trace when it is found to be complete, and how long it has been waited for."""

    def __init__(self, name: str, work: Work[T], marks: Marks) -> None:
        self._name = name
        self._work = work
        self._marks: Marks | None = marks
        self._began = monotonic_ns()
        self._exposed = 0

    def done(self) -> bool:
        done = self._work.done()
        if done:
            self._report()
        return done

    def wait(self, timeout: float | None = None) -> T:
        began = monotonic_ns()
        result = self._work.wait(timeout)
        self._exposed += monotonic_ns() - began
        self._report()
        return result

    def missing(self) -> Sequence[int]:
        return self._work.missing()

    def _report(self) -> None:
        if self._marks is not None:
            self._marks.transfer(self._name, self._began, monotonic_ns(), self._exposed)
            self._marks = None
