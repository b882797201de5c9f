"""What a group and its operations share: the transport, deadlines, what is pending, and an error.

The operations of a group need it, and it needs none of them: so a wait or a Work holds this, not
the group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mpidist.backends.base import Backend
from mpidist.backends.work import Work
from mpidist.errors import CollectiveMismatchError, GroupBrokenError
from mpidist.group.journal import Journal

if TYPE_CHECKING:
    from mpidist.observe.watch import Watch

__all__ = ["GroupState", "PendingWork", "broken_states"]

T = TypeVar("T")

_MANY = 32
"""Operations on host arrays that may be outstanding before a call polls them.

A poll costs about a tenth of a small operation: programs that wait for theirs should not pay it.
"""

_BROKEN: list[GroupState] = []
# The buffers of a broken group may still be written by the transport. They live here, with what
# the group has pending, until the process ends, and the exit handler sees that the job has to be
# aborted.


def broken_states() -> Sequence[GroupState]:
    """Return those of the groups that an error has broken in this process."""
    return tuple(_BROKEN)


class PendingWork(Work[T]):
    """An operation that a group has pending."""

    error: BaseException | None

    @abstractmethod
    def complete(self) -> bool:
        """Poll the transport's part, and finish when it is over; never raises."""


class GroupState:
    """What a group and its operations share.

    Parameters
    ----------
    backend : Backend
        The transport.
    watch : Watch
        Sees what the ranks of the world are doing.
    ranks : sequence of int
        The rank in the world of each member.
    name : str
        Of the group, for messages.
    timeout, warn_after : float
        Seconds after which a wait fails, and after which it is reported.
    identity : int
        The same on all ranks, and on no other group.

    Attributes
    ----------
    journal : Journal
        Writes the group's operations into the rank's recorder.
    outstanding : OrderedDict of PendingWork to None
        The operations under way, in the order in which `release` polls them.
    unseen : PendingWork or None
        An operation that failed and that no wait has reported.
    reason : str or None
        Why the group cannot be used any more.
    """

    def __init__(
        self,
        backend: Backend,
        watch: Watch,
        ranks: Sequence[int],
        *,
        name: str,
        timeout: float,
        warn_after: float,
        identity: int,
    ) -> None:
        self.backend = backend
        self.watch = watch
        self.rank = backend.rank
        self.size = backend.size
        self.ranks = tuple(ranks)
        self.name = name
        self.timeout = timeout
        self.warn_after = warn_after
        self.identity = identity
        self.journal = Journal(backend.recorder, name, identity)
        self.outstanding: OrderedDict[PendingWork[Any], None] = OrderedDict()
        self.unseen: PendingWork[Any] | None = None
        self.reason: str | None = None
        self._limit = _MANY

    def __repr__(self) -> str:
        """Return name, rank and size, as messages show them."""
        return f"group {self.name!r}, rank {self.rank} of {self.size}"

    # -- what is pending -------------------------------------------------------------------------

    def release(self, most: int) -> None:
        """Release finished operations, which hold their arrays: a program need not wait for them.

        Polls them in turn, also those behind one that lasts, until `most` in a row are not over.
        """
        outstanding, unfinished = self.outstanding, 0
        while unfinished < min(most, len(outstanding)):
            try:
                work = next(iter(outstanding))
                if work.complete():
                    unfinished = 0
                else:
                    outstanding.move_to_end(work)
                    unfinished += 1
            except (StopIteration, RuntimeError, KeyError):
                return  # another thread has begun or ended one: it looks after the others

    def release_many(self) -> None:
        """Do so where many are outstanding, and again when half as many more have begun.

        That makes two polls of an unfinished one for each that begins, and none in a program that
        waits for its operations.
        """
        if len(self.outstanding) >= self._limit:
            self.backend.progress()
            self.release(_MANY)
            self._limit = max(_MANY, len(self.outstanding) + _MANY // 2)

    def drive(self) -> None:
        """Make progress while this rank waits; local, never blocks."""
        self.backend.progress()
        if self.outstanding:
            self.release(1)

    def progress(self) -> None:
        """Drive all that is pending as far as it can go now; local, never blocks."""
        self.check_usable("progress")
        self.backend.progress()
        if self.backend.device is not None:
            self.backend.device.idle()
        for work in tuple(self.outstanding):
            work.complete()

    # -- errors ----------------------------------------------------------------------------------

    def check_usable(self, operation: str) -> None:
        """Raise if the group is closed or broken."""
        if self.reason is not None:
            raise GroupBrokenError(
                f"{operation} on {self}: the group cannot be used any more: {self.reason}"
            )

    def break_by(self, error: BaseException) -> None:
        """Make the group unusable: `error` has left its ranks at different places."""
        if self.reason is None:
            self.reason = str(error) or type(error).__name__
            _BROKEN.append(self)
            if self.backend.device is not None:
                self.backend.device.abandon(error)

    def add_operation(self, error: CollectiveMismatchError, operation: str) -> None:
        """Add operation and group to an error of the transport."""
        if self.reason is None:
            error.args = (f"{operation} on {self}: {error}",)
