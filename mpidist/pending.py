"""What a group has under way: plans of collectives, waits with a deadline, and their Work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mpidist.backends.waiting import WaitTimeout, wait_until
from mpidist.backends.work import Waiter, Work
from mpidist.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    PeerLostError,
    SizeMismatchError,
    TransportError,
)

if TYPE_CHECKING:
    from mpidist.group import ProcessGroup

__all__ = ["EVERYBODY", "GroupWaiter", "GroupWork", "Peers", "Plan"]

T = TypeVar("T")

GRACE = 3.0
"""Seconds that a wait for a rank goes on after it has left: its last messages may be on the way."""


@dataclass(slots=True)  # not frozen: that doubles the cost of making one
class Plan(Generic[T]):
    """One collective, checked and ready to go.

    Attributes
    ----------
    verb : str
        Name of the transport's method.
    args : tuple
        Its arguments: flat arrays, counts, op, root.
    finish : callable
        Called once when the operation is complete; returns the verb's result.
    """

    verb: str
    args: tuple[Any, ...]
    finish: Callable[[], T]


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that an operation depends on.

    Attributes
    ----------
    ranks : frozenset of int or None
        In the group; None are all.
    spare : int
        How many of them may be lost before it cannot be completed.
    """

    ranks: frozenset[int] | None = None
    spare: int = 0


EVERYBODY = Peers()


class GroupWaiter(Waiter):
    """Waits for one operation with its group's deadline, warnings and losses."""

    # One is made for every blocking call, most of which never have to wait for long.
    __slots__ = (
        "_collective",
        "_group",
        "_lost_since",
        "_missing",
        "_next_warning",
        "_number",
        "_peers",
        "_verb",
        "timeout",
    )

    def __init__(
        self,
        group: ProcessGroup,
        verb: str,
        *,
        number: int | None = None,
        collective: tuple[int, int] | None = None,
        peers: Peers = EVERYBODY,
        timeout: float | None = None,
    ) -> None:
        self._verb = verb
        self._number = number
        self._collective = collective
        self.timeout = group.timeout if timeout is None else timeout
        self._group = group
        self._peers = peers

    @property
    def operation(self) -> str:
        """What is being waited for, for messages."""
        return self._verb if self._number is None else f"{self._verb} #{self._number}"

    def wait_for(
        self, ready: Callable[[], bool], *, missing: Callable[[], Sequence[int]] | None = None
    ) -> None:
        """Wait as `Waiter` says; a missed deadline and a lost rank break the group."""
        group = self._group
        self._missing = missing
        self._next_warning = group.warn_after
        self._lost_since: float | None = None
        try:
            wait_until(
                ready,
                timeout=self.timeout,
                progress=group._backend.progress,
                patrol=self._patrol,
            )
        except WaitTimeout:
            error = CollectiveTimeoutError(
                f"{self.operation} on {group}: not complete after {self.timeout:g} s"
                f"{self._who()}; a rank did not call it, called something else, or is gone. The "
                "group is broken: let this error end the job, and look at what the missing ranks "
                "were doing; init(timeout=...) sets the deadline"
            )
            group._break(error)
            raise error from None
        except (TransportError, PeerLostError) as error:
            group._break(error)
            raise

    def _who(self) -> str:
        """Return words for the ranks that have not come, where they are known."""
        missing = self._missing() if self._missing is not None else ()
        return f", waiting for rank {', '.join(map(str, missing))}" if missing else ""

    def _patrol(self, waited: float) -> None:
        group = self._group
        if waited >= self._next_warning:
            self._next_warning *= 2
            group.log.warning(
                "%s has been waiting for %.0f s%s; the deadline is at %.0f s",
                self.operation,
                waited,
                self._who(),
                self.timeout,
            )
        needed = self._peers.ranks
        lost = {
            rank: words
            for rank, words in group._backend.lost(self._collective).items()
            if needed is None or rank in needed
        }
        if len(lost) <= self._peers.spare:
            return
        if self._lost_since is None:
            self._lost_since = waited
        if waited - self._lost_since >= GRACE:
            told = "; ".join(f"rank {rank} {words}" for rank, words in sorted(lost.items()))
            raise PeerLostError(
                f"{self.operation} on {group}: {told}. The group is broken: let this error end "
                "the job; every rank must call the same collectives"
            )


class GroupWork(Work[T]):
    """An operation under way on a group; see `Work`.

    Parameters
    ----------
    group : ProcessGroup
        Whose operation it is; holds it until it is complete, also if nobody else does.
    operation : str
        Verb and number, for messages.
    inner : Work
        The transport's part.
    finish : callable
        Called once on completion; returns the result.
    collective : (int, int), optional
        The group's identity and the number of the operation among its collectives.
    peers : Peers, optional
        The ranks it depends on; all when omitted.
    """

    def __init__(
        self,
        group: ProcessGroup,
        operation: str,
        inner: Work[Any],
        finish: Callable[[], T],
        *,
        collective: tuple[int, int] | None = None,
        peers: Peers = EVERYBODY,
    ) -> None:
        self._group = group
        self._operation = operation
        self._inner = inner
        self._finish = finish
        self._collective = collective
        self._peers = peers
        self._over = False
        self._error: BaseException | None = None
        self._result: list[T] = []
        group._outstanding.append(self)
        group._backend.engine.held.add(self)

    def _complete(self) -> bool:
        """Poll the transport's part, and finish when it is over."""
        if self._over:
            return True
        try:
            if not self._inner.done():
                return False
            self._result.append(self._finish())
        except (SizeMismatchError, CollectiveMismatchError) as error:
            self._end(error)
        except TransportError as error:
            told = TransportError(f"{self._operation} on {self._group}: {error}", error.code)
            told.__cause__ = error
            self._end(told, broken=True)
        except BaseException as error:
            self._end(error, broken=True)
            if not isinstance(error, Exception):
                raise
        else:
            self._end()
        return True

    def _end(self, error: BaseException | None = None, *, broken: bool = False) -> None:
        """Be over; the arrays of a broken group are held for ever, see `Engine.held`."""
        self._over, self._error = True, error
        self._group._outstanding.remove(self)
        if broken and error is not None:
            self._group._break(error)
            return
        self._group._backend.engine.held.discard(self)
        del self._inner, self._finish

    def missing(self) -> Sequence[int]:
        """Return the ranks for which it waits, where they are known; else none."""
        return () if self._over else self._inner.missing()

    def done(self) -> bool:
        """Make progress on the whole group, and return whether this operation is complete."""
        if not self._over:
            self._group._check_usable(self._operation)
            self._group._backend.progress()
        if not self._complete():
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self, timeout: float | None = None) -> T:
        """Wait for the result; see `Work.wait`."""
        if not self._over:
            self._group._check_usable(self._operation)
            waiter = GroupWaiter(
                self._group,
                self._operation,
                collective=self._collective,
                peers=self._peers,
                timeout=timeout,
            )
            try:
                waiter.wait_for(self._complete, missing=self.missing)
            except (CollectiveTimeoutError, PeerLostError) as error:
                self._end(error, broken=True)
        if self._error is not None:
            raise self._error
        return self._result[0]
