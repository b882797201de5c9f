"""How mpidist waits: yield the core at once, sleep only after milliseconds, never for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

__all__ = ["WaitTimeout", "wait_until"]

_YIELDING = 0.004
"""Seconds of waiting during which the core is only yielded; later waits sleep."""

_SLEEP = 0.0002
"""Seconds of one sleep in a long wait."""

_PATROL = 0.1
"""Seconds between two patrols in a long wait."""


class WaitTimeout(Exception):  # noqa: N818  # an event between layers, not an error for users
    """The time is over; the caller knows the operation and raises the error that names it."""


def _nothing() -> None:
    """Do nothing."""


def wait_until(
    ready: Callable[[], bool],
    *,
    timeout: float,
    progress: Callable[[], None] = _nothing,
    patrol: Callable[[float], None] | None = None,
) -> None:
    """Wait until `ready` says so.

    Parameters
    ----------
    ready : callable
        Polled; returns whether the wait is over.
    timeout : float
        Seconds after which the wait fails.
    progress : callable, optional
        Called between two polls: whatever others may be waiting for this rank to do.
    patrol : callable, optional
        Called about ten times a second in a long wait, with the seconds waited; it may log, or
        end the wait by raising.

    Raises
    ------
    WaitTimeout
        If `ready` was still false after `timeout` seconds.

    Notes
    -----
    Where ranks share cores, a rank that spins keeps the one it waits for from running, and one
    that sleeps wakes too late for a microsecond's work. Yielding the core does neither.
    """
    if ready():
        return
    start = time.monotonic()
    next_patrol = _PATROL
    while True:
        progress()
        if ready():
            return
        waited = time.monotonic() - start
        if waited < _YIELDING:
            os.sched_yield()
            continue
        if waited >= next_patrol:
            next_patrol = waited + _PATROL
            if patrol is not None:
                patrol(waited)
        if waited >= timeout:
            raise WaitTimeout
        time.sleep(_SLEEP)
