"""What the start and the end of a job need of a transport, and the exit notices of its ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np

from mpidist._types import Array
from mpidist.backends.work import Waiter

if TYPE_CHECKING:
    from mpidist.backends.base import Backend

__all__ = ["ExitNotice", "ExitNotices", "JobTransport", "JobWorld", "Mailbox"]

_PAUSE = 0.01
"""Seconds between two polls in a wait that may last as long as the job."""

_PROBES = 64
"""Probes of one poll: each receives a message or two, and a notice is behind all earlier messages.

They take about 50 us, so that the wait costs little of a core.
"""


class Mailbox(Protocol):
    """Messages among the ranks of one world, apart from all others.

    Attributes
    ----------
    rank, size : int
        This rank, and the number of ranks.
    """

    rank: int
    size: int

    def send(self, message: Array, peer: int) -> Callable[[], bool]:
        """Start sending whole numbers; return a function that polls whether they are sent.

        The array must stay as it is until then.
        """

    def receive(self) -> Array | None:
        """Return the next message of any rank, or None if there is none yet; never blocks."""


class Running(Protocol):
    """An open group of this process.

    Attributes
    ----------
    inside : (Waiter, float) or None
        The blocking call of the transport's library under way, and when it began by
        `time.monotonic`.
    """

    inside: tuple[Waiter, float] | None


class JobTransport(Protocol):
    """A transport, as the start and the end of a job see it.

    Attributes
    ----------
    name : str
        Name of the transport, as `init` takes it.
    library : str
        Name and version of its library.
    rank, size : int
        This process among all that were started together, and their number.
    """

    name: str
    library: str
    rank: int
    size: int

    def world(self, comm: Any) -> JobWorld:
        """Return the ranks of a communicator, all when it is None."""

    def abort(self, code: int) -> NoReturn:
        """End the whole job now, with this exit code."""

    def ended(self) -> bool:
        """Whether the transport cannot be used any more, since the program has ended it."""

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call a function, once, before the program ends the transport."""

    def alive(self) -> Sequence[Running]:
        """Return the open groups of this process."""

    def held(self) -> set[object]:
        """Return the operations that are outstanding on all groups of this process."""

    def nap(self, seconds: float) -> None:
        """Sleep in a long wait, at most for so long."""


class JobWorld(Protocol):
    """The ranks that call `init` together.

    Attributes
    ----------
    ranks : tuple of int
        The rank among all processes of each; `JobTransport.rank` counts the same.
    """

    ranks: tuple[int, ...]

    def mailbox(self) -> Mailbox:
        """Make a mailbox of these ranks; collective, blocks."""

    def connect(self) -> None:
        """Make the connection that `all_gather` and `backend` use; collective, blocks."""

    def all_gather(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, which have one length; collective, blocks."""

    def backend(self, notices: ExitNotices | None) -> Backend:
        """Make the transport of these ranks' group; collective, blocks."""


class ExitNotice(NamedTuple):
    """What a rank sends to all others as it exits.

    Attributes
    ----------
    operations : int
        The number of operations that it has begun.
    begun : mapping of int to int
        The number of collectives that it has begun on each group, by the group's identity.
    """

    operations: int
    begun: Mapping[int, int]


class ExitNotices:
    """The exit notices among the ranks of one world, so that no rank waits for one that has left.

    Parameters
    ----------
    mailbox : Mailbox
        Used for nothing else.
    ranks : sequence of int
        The rank in the job of each rank of the mailbox.
    nap : callable
        See `JobTransport.nap`.

    Attributes
    ----------
    begun : dict of int to list of int
        The number of collectives that this rank has begun, by the group's identity. Each number
        stands in a list of its own, which the group counts up.
    """

    def __init__(
        self, mailbox: Mailbox, ranks: Sequence[int], nap: Callable[[float], None] = time.sleep
    ) -> None:
        self.begun: dict[int, list[int]] = {}
        self._mailbox = mailbox
        self._ranks = ranks
        self._nap = nap
        self._received: dict[int, ExitNotice] = {}
        self._sent: list[Callable[[], bool]] = []
        self._notice: Array | None = None
        self._reading = threading.Lock()

    def received(self) -> Mapping[int, ExitNotice]:
        """Return the notices of the ranks of the mailbox that have left; never blocks."""
        if self._reading.acquire(blocking=False):
            try:
                while (message := self._mailbox.receive()) is not None:
                    rank, operations, *pairs = message.tolist()
                    begun = dict(zip(pairs[::2], pairs[1::2], strict=True))
                    self._received[rank] = ExitNotice(operations, begun)
            finally:
                self._reading.release()
        return self._received

    def lost(
        self, members: Sequence[int], collective: tuple[int, int] | None = None
    ) -> Mapping[int, str]:
        """Return the ranks of a group that have left; see `Backend.lost`.

        Parameters
        ----------
        members : sequence of int
            The rank in the job of each rank of the group.
        collective : (int, int), optional
            A group's identity and the number of one of its collectives: ranks that had begun it
            before they left are not lost to it.
        """
        lost = {}
        for index, notice in self.received().items():
            if collective is not None and notice.begun.get(collective[0], 0) >= collective[1]:
                continue
            rank = self._ranks[index]
            if rank in members:
                lost[members.index(rank)] = f"left after operation {notice.operations}"
        return lost

    def send(self, operations: int) -> None:
        """Notify all other ranks that this one exits.

        Parameters
        ----------
        operations : int
            The number of operations in which it took part.
        """
        mailbox = self._mailbox
        pairs = [number for group, begun in self.begun.items() for number in (group, begun[0])]
        self._notice = notice = np.array([mailbox.rank, operations, *pairs], np.int64)
        others = [rank for rank in range(mailbox.size) if rank != mailbox.rank]
        self._sent = [mailbox.send(notice, rank) for rank in others]

    def wait_for_all(self, timeout: float, progress: Callable[[], bool]) -> list[int]:
        """Wait until the notices of all other ranks are here, and this rank's own are sent.

        Parameters
        ----------
        timeout : float
            Seconds to wait.
        progress : callable
            Called repeatedly: drives what others may still be waiting for. Returns whether it has
            completed anything, so that it is called again at once.

        Returns
        -------
        list of int
            The ranks of the mailbox whose notices are missing.
        """
        deadline = time.monotonic() + timeout
        others = set(range(self._mailbox.size)) - {self._mailbox.rank}
        while not self._complete(others) and time.monotonic() < deadline:
            if not progress():
                self._nap(_PAUSE)
        return sorted(others - self._received.keys())

    def _complete(self, others: set[int]) -> bool:
        """Whether all notices are here, and this rank's own need no more progress."""
        arrived = any(others <= self.received().keys() for _ in range(_PROBES))
        return arrived and all(sent() for sent in self._sent)
