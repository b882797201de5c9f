"""Who has left: at its exit each rank tells all others, so that nobody waits for it in vain."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Departures"]

_TAG = 0
_PAUSE = 0.01
"""Seconds between two looks in a wait that may last as long as the job."""


class Departures:
    """The notices of departure among the ranks of one communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Used for nothing else; freed with the process.
    world_ranks : sequence of int
        The rank in MPI's world of each of its ranks.
    """

    def __init__(self, comm: Any, world_ranks: Sequence[int]) -> None:
        self._comm = comm
        self._world_ranks = world_ranks
        self._left: dict[int, str] = {}
        self._sent: list[Any] = []

    def left(self) -> Mapping[int, str]:
        """Return the ranks of MPI's world that have left, and what they said; never blocks."""
        notice = np.empty(2, np.int64)
        while self._comm.Iprobe(tag=_TAG):
            self._comm.Recv(notice, tag=_TAG)
            rank, operations = notice.tolist()
            self._left[self._world_ranks[rank]] = f"left after operation {operations}"
        return self._left

    def leave(self, operations: int, timeout: float, progress: Callable[[], None]) -> list[int]:
        """Tell all that this rank leaves, and wait until all others do.

        Parameters
        ----------
        operations : int
            How many operations it took part in.
        timeout : float
            Seconds to wait.
        progress : callable
            Called again and again: what others may still be waiting for this rank to do.

        Returns
        -------
        list of int
            The ranks of MPI's world that had not left by then.
        """
        comm = self._comm
        notice = np.array([comm.rank, operations], np.int64)
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        self._sent = [comm.Isend(notice, rank, _TAG) for rank in others]
        deadline = time.monotonic() + timeout
        while len(self.left()) < len(others) and time.monotonic() < deadline:
            progress()
            time.sleep(_PAUSE)
        return [
            rank for rank in map(self._world_ranks.__getitem__, others) if rank not in self._left
        ]
