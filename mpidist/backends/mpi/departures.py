"""Who has left: at its exit each rank tells all others, so that nobody waits for it in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Departure", "Departures"]

_PAUSE = 0.01
"""Seconds between two looks in a wait that may last as long as the job."""

_PROBES = 64
"""Probes in one look: each takes in a message or two, and a notice is behind all that came before.

They take about 50 us, so that the wait costs little of a core.
"""


class Departure(NamedTuple):
    """What a rank said when it left.

    Attributes
    ----------
    operations : int
        How many operations it had begun.
    begun : mapping of int to int
        How many collectives of each group, by the group's identity.
    """

    operations: int
    begun: Mapping[int, int]


class Departures:
    """The notices of departure among the ranks of one communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Used for nothing else; freed with the process.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        As given.
    begun : dict of int to list of int
        How many collectives this rank has begun, by the group's identity; each number stands in a
        list of its own, which the group counts up.
    """

    def __init__(self, comm: Any) -> None:
        self.begun: dict[int, list[int]] = {}
        self.comm = comm
        self._left: dict[int, Departure] = {}
        self._sent: list[Any] = []
        self._notice: tuple[Any, ...] = ()
        self._reading = threading.Lock()

    def left(self) -> Mapping[int, Departure]:
        """Return the ranks of the communicator that have left; never blocks."""
        if self._reading.acquire(blocking=False):
            try:
                while (message := self.comm.Improbe()) is not None:
                    self._read(message)
            finally:
                self._reading.release()
        return self._left

    def _read(self, message: Any) -> None:
        # The first of a rank's two messages is the length of the second.
        length = np.empty(2, np.int64)
        message.Recv(length)
        rank, words = length.tolist()
        notice = np.empty(words, np.int64)
        self.comm.Recv(notice, source=rank)
        operations, *pairs = notice.tolist()
        self._left[rank] = Departure(operations, dict(zip(pairs[::2], pairs[1::2], strict=True)))

    def leave(self, operations: int) -> None:
        """Tell all others that this rank leaves.

        Parameters
        ----------
        operations : int
            How many operations it took part in.
        """
        comm = self.comm
        pairs = [number for group, begun in self.begun.items() for number in (group, begun[0])]
        notice = np.array([operations, *pairs], np.int64)
        length = np.array([comm.rank, notice.size], np.int64)
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        self._sent = [comm.Isend(data, rank) for rank in others for data in (length, notice)]
        self._notice = (length, notice)

    def wait_for_all(self, timeout: float, progress: Callable[[], bool]) -> list[int]:
        """Wait until all others have left, and have been told that this rank has.

        Parameters
        ----------
        timeout : float
            Seconds to wait.
        progress : callable
            Called again and again: what others may still be waiting for this rank to do. Returns
            whether it has brought anything to its end, so that it is called again at once.

        Returns
        -------
        list of int
            The ranks of the communicator that had not left by then.
        """
        deadline = time.monotonic() + timeout
        others = set(range(self.comm.size)) - {self.comm.rank}
        while not self._all_told(others) and time.monotonic() < deadline:
            if not progress():
                time.sleep(_PAUSE)
        return sorted(others - self._left.keys())

    def _all_told(self, others: set[int]) -> bool:
        """Whether all notices have come, and this rank's own need no more progress here."""
        come = any(others <= self.left().keys() for _ in range(_PROBES))
        # Not with `Testall`, which needs statuses to say why a request has failed.
        return come and all(request.Test() for request in self._sent)
