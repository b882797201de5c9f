"""How communicators are made and released: an MPI library has a limited number of them."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from mpidist.errors import BackendUnavailableError

__all__ = ["drop", "make"]

T = TypeVar("T")

_DROPPED: deque[Any] = deque()
"""Persistent requests and communicators of groups that were dropped without being closed."""


def drop(*handles: Any) -> None:
    """Free these, in their order, when no communicator is left: now may be inside a call of MPI."""
    _DROPPED.extend(handles)


def make(
    mpi: Any,
    attempt: Callable[[], T],
    *,
    agree: Callable[[bool], bool],
    undo: Callable[[T], None],
    operation: str,
) -> T:
    """Make a communicator on all ranks, or on none.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    attempt, undo : callable
        Makes it, and releases what it has made.
    agree : callable
        Returns whether all ranks succeeded; collective.
    operation : str
        For the error.

    Raises
    ------
    BackendUnavailableError
        If the library has no communicator left on some rank, also when those of the groups that
        nobody holds any more are released; on all ranks. Nothing has been made.
    """
    problem: Any = None
    for _ in range(2):
        made: list[T] = []
        try:
            made.append(attempt())
        except mpi.Exception as error:
            problem = error
        if agree(bool(made)):
            return made[0]
        for one in made:
            undo(one)
        gc.collect()  # dropped groups refer to themselves
        # In an order that may differ between ranks: releasing is collective by the standard, which
        # expects it to be local all the same (MPI 4.0, section 7.4.3), and both libraries do so.
        while _DROPPED:
            _DROPPED.popleft().Free()
    reason = "another rank could make none"
    if problem is not None:
        # MPICH's last line says why, behind the function that noticed it.
        line = problem.Get_error_string().strip().splitlines()[-1]
        reason = line.rpartition("): ")[2].strip()
    raise BackendUnavailableError(
        f"{operation}: {reason}: the MPI library made no communicator. MPICH has 2,048 for each "
        "process, and a group takes one or two until it is closed: close those that are no longer "
        "needed (group.close(), or a with block), and make groups once, not in every step. This "
        "group can still be used"
    ) from problem
