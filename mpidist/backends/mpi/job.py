"""The start and the end of a job over MPI."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np

from mpidist._types import Array
from mpidist.backends.job import ExitNotices
from mpidist.backends.mpi.backend import MpiBackend
from mpidist.backends.mpi.library import abort_job, library_name, load_mpi, world_ranks
from mpidist.errors import LaunchError

__all__ = ["MpiJob"]


class MpiJob:
    """MPI, as the start and the end of a job see it; see `JobTransport`. It initialises MPI."""

    name = MpiBackend.name

    def __init__(self) -> None:
        self._mpi = mpi = load_mpi()
        self.rank: int = mpi.COMM_WORLD.rank
        self.size: int = mpi.COMM_WORLD.size
        self.library = library_name(mpi)

    def world(self, comm: Any) -> _World:
        """Return the ranks of a communicator, all when it is None."""
        mpi = self._mpi
        if comm is None:
            return _World(mpi, mpi.COMM_WORLD)
        if isinstance(comm, mpi.Intracomm) and comm != mpi.COMM_NULL:
            return _World(mpi, comm)
        null = isinstance(comm, mpi.Comm) and comm == mpi.COMM_NULL
        got = "COMM_NULL: this rank is no member of it, and does not call init"
        raise LaunchError(
            "init: comm must be a communicator of mpi4py, such as MPI.COMM_WORLD or what Split "
            f"returns; got {got if null else repr(comm)}"
        )

    def abort(self, code: int) -> NoReturn:
        """End the whole job now, with this exit code."""
        abort_job(self._mpi, code)

    def ended(self) -> bool:
        """Whether MPI has been finalised."""
        return bool(self._mpi.Is_finalized())

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call a function, once, when the program finalises MPI."""
        _call_at_finalize(self._mpi, callback)

    def alive(self) -> Sequence[MpiBackend]:
        """Return the open groups of this process."""
        return MpiBackend.alive()

    def held(self) -> set[object]:
        """Return the operations that are outstanding on all groups of this process."""
        return MpiBackend.held()

    def nap(self, seconds: float) -> None:
        """Sleep: MPI cannot wake anybody."""
        time.sleep(seconds)


@cache
def _call_at_finalize(mpi: Any, callback: Callable[[], None]) -> None:
    def ended(*_: Any) -> None:
        callback()

    # The library deletes what is attached here before anything else that it finalises.
    mpi.COMM_SELF.Set_attr(mpi.Comm.Create_keyval(delete_fn=ended), ended)


class _World:
    """The ranks of a communicator; see `JobWorld`.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : mpi4py.MPI.Intracomm
        Duplicated for each purpose.
    """

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._comm = comm
        self._own: Any = None
        self.ranks = world_ranks(mpi, comm)

    def mailbox(self) -> _Mailbox:
        """Make a mailbox of these ranks, whose communicator is freed with the process."""
        return _Mailbox(self._comm.Dup())

    def connect(self) -> None:
        """Duplicate the communicator for the group."""
        self._own = self._comm.Dup()

    def all_gather(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, which have one length."""
        everyone = np.empty((self._own.size, len(message)), np.uint8)
        self._own.Allgather(np.frombuffer(message, np.uint8), everyone)
        return [row.tobytes() for row in everyone]

    def backend(self, notices: ExitNotices | None) -> MpiBackend:
        """Make the transport of these ranks' group."""
        return MpiBackend(self._own, notices=notices)


class _Mailbox:
    """Messages on a communicator that is used for nothing else; see `Mailbox`.

    Each message goes as two: the sender and the length of the second, and the whole numbers.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Not used for anything else.
    """

    def __init__(self, comm: Any) -> None:
        self.rank: int = comm.rank
        self.size: int = comm.size
        self._comm = comm

    def send(self, message: Array, peer: int) -> Callable[[], bool]:
        """Start sending whole numbers; return a function that polls whether they are sent."""
        header = np.array([self.rank, message.size], np.int64)
        requests = [self._comm.Isend(array, peer) for array in (header, message)]

        def sent() -> bool:
            # Not with `Testall`, which needs statuses to say why a request has failed.
            return all(request.Test() for request in requests)

        return sent

    def receive(self) -> Array | None:
        """Return the next message of any rank, or None if there is none yet."""
        matched = self._comm.Improbe()
        if matched is None:
            return None
        header = np.empty(2, np.int64)
        matched.Recv(header)
        rank, length = header.tolist()
        message: Array = np.empty(length, np.int64)
        self._comm.Recv(message, source=rank)
        return message
