"""What is under way between ranks: messages, the work that waits for them, and how it waits.

mpidist yields the core at once, sleeps only after milliseconds, and never waits for ever.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar

from mpidist._arguments import seconds
from mpidist._types import Array
from mpidist.errors import CollectiveTimeoutError

if TYPE_CHECKING:
    from mpidist.backends.node.signatures import Described

__all__ = [
    "ANY_SOURCE",
    "Condition",
    "ConditionSteps",
    "Deadline",
    "Engine",
    "Message",
    "PersistentExchange",
    "PolledWork",
    "Steps",
    "StepsWork",
    "WaitTimeout",
    "Waiter",
    "Work",
    "conditions",
    "then",
    "wait_until",
]

T = TypeVar("T")
U = TypeVar("U")

ANY_SOURCE = -1
"""The `peer` of a receive that takes the next message from any rank."""


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


class Deadline:
    """By when several waits, one after the other, have to be over.

    Parameters
    ----------
    timeout : float or datetime.timedelta, optional
        Seconds from now on for all of them; when omitted, each has its group's timeout.
    what : str, optional
        What the timeout is given to; named in the error if it is no number of seconds.
    """

    def __init__(
        self, timeout: float | timedelta | None = None, what: str = "Work.wait: timeout"
    ) -> None:
        self._end: float | None = None
        if timeout is not None:
            self._end = time.monotonic() + seconds(timeout, what, least=0.0)

    @property
    def left(self) -> float | None:
        """Seconds for the next wait; None is its group's timeout."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)


class Work(ABC, Generic[T]):
    """An operation under way.

    Between the call that returned it and the end of `wait`, the arrays given to that call belong
    to the operation: neither read nor write them.
    """

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError(
            "an operation under way cannot be copied or pickled: wait for it, and copy its result. "
            "A model is copied between two steps, when its gradients have been waited for"
        )

    @abstractmethod
    def done(self) -> bool:
        """Poll: make progress, and return whether the operation is complete.

        Raises
        ------
        DistributedError
            If the operation failed.
        """

    @abstractmethod
    def wait(self, timeout: float | None = None) -> T:
        """Wait, and return the result, ready for the caller's next operation.

        Parameters
        ----------
        timeout : float or datetime.timedelta, optional
            Seconds; the group's timeout when omitted.

        Returns
        -------
        T
            What the blocking verb returns. A second call returns it again.

        Raises
        ------
        CollectiveTimeoutError
            If the operation was not complete in time; the group is broken then.
        DistributedError
            If the operation failed; a second call raises it again.

        Notes
        -----
        Host arrays: blocks until the operation is complete. Device arrays: orders the current
        stream after it.
        """

    def synchronize(self, timeout: float | None = None) -> T:
        """Block the host until the operation is complete, and return the result.

        For host arrays this is `wait`.
        """
        return self.wait(timeout)

    def missing(self) -> Sequence[int]:
        """Return the ranks for which it waits, where they are known; else none."""
        return ()

    @staticmethod
    def all(works: Iterable[Work[T]]) -> Work[list[T]]:
        """Return what is complete when all of these are; its result is the list of theirs."""
        return _AllWork(tuple(works))

    def then(self, finish: Callable[[T], U]) -> Work[U]:
        """Return the same operation with another result: what `finish` makes of this one's.

        It is called by the first `wait`.
        """
        return _ThenWork(self, finish)


class _AllWork(Work[list[T]]):
    """Complete when several operations are."""

    def __init__(self, works: Sequence[Work[T]]) -> None:
        self._works = works

    def done(self) -> bool:
        """Poll all of them, so that all make progress."""
        states = [work.done() for work in self._works]
        return all(states)

    def wait(self, timeout: float | None = None) -> list[T]:
        """Wait for one after the other."""
        deadline = Deadline(timeout)
        return [work.wait(deadline.left) for work in self._works]

    def synchronize(self, timeout: float | None = None) -> list[T]:
        """Block the host until all are complete."""
        deadline = Deadline(timeout)
        return [work.synchronize(deadline.left) for work in self._works]

    def missing(self) -> Sequence[int]:
        """Return the ranks for which any of them waits."""
        return sorted({rank for work in self._works for rank in work.missing()})


class _ThenWork(Work[U], Generic[T, U]):
    """An operation whose result is made of another's."""

    def __init__(self, work: Work[T], finish: Callable[[T], U]) -> None:
        self._work = work
        self._finish = finish
        self._result: list[U] = []

    def _made(self, result: T) -> U:
        if not self._result:
            self._result.append(self._finish(result))
        return self._result[0]

    def done(self) -> bool:
        """Poll it."""
        return self._work.done()

    def wait(self, timeout: float | None = None) -> U:
        """Wait for it, and return what is made of its result."""
        return self._made(self._work.wait(timeout))

    def synchronize(self, timeout: float | None = None) -> U:
        """Block the host until it is complete, and return what is made of its result."""
        return self._made(self._work.synchronize(timeout))

    def missing(self) -> Sequence[int]:
        """Return the ranks for which it waits."""
        return self._work.missing()


class PolledWork(Work[None]):
    """Work of a transport that is done when `done` says so; groups wait for it by polling that."""

    def wait(self, timeout: float | None = None) -> None:
        """Wait without driving anything else; groups wait through `Backend.progress`."""
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


class Message(NamedTuple):
    """One array on its way to or from a peer.

    Attributes
    ----------
    array : Array, 1-D and contiguous
        What is sent, or where it is received. A receive may offer more room than the message
        needs, up to 1 GiB; a message larger than the room is an error.
    peer : int
        The other rank; `ANY_SOURCE` in a receive takes the next message of any.
    lane : int
        Messages between two ranks match by lane, in the order in which they were sent.
    """

    array: Array
    peer: int
    lane: int


class PersistentExchange(Protocol):
    """The same messages between the same ranks, again and again, in arrays that are used again."""

    def start(self, nbytes: int) -> None:
        """Start sending so many bytes, and receiving; what was started before is complete."""

    def done(self) -> bool:
        """Poll: whether what was started has been sent and received."""


Steps: TypeAlias = Generator["Work[Any]", None, None]
"""An operation of several phases: it yields each piece of work that it has to wait for."""


def then(first: Work[Any], second: Steps) -> Steps:
    """Return the steps of an operation that goes on when a piece of work is complete."""
    yield first
    yield from second


class StepsWork(PolledWork):
    """Runs an operation of several phases as far as it can go at each poll.

    [Note: phases] MPI makes no progress by itself, and starts nothing on its own. An operation of
    several phases therefore starts its second phase when this rank notices that the first is over,
    which may be at another time, and after other operations, than on another rank. So its messages
    travel in a lane of their own, numbered when the operation starts (the same number on all
    ranks, since all start their collectives in the same order), and it never starts one of the
    library's collectives. Inside the lane messages between two ranks match in order, and each rank
    goes through the phases in order; so no message can be taken for another.

    Parameters
    ----------
    steps : Steps
        The generator; it runs to its first `yield` at once.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._error: BaseException | None = None
        self._current: Work[Any] | None = None
        self._driven = threading.Lock()
        self._advance()

    def _advance(self) -> None:
        try:
            self._current = next(self._steps, None)
        except BaseException as error:  # noqa: BLE001  # raised again, see `_fail`
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep an error for `done`; an interrupt is also passed on at once.

        Either way the operation is over: a generator that raised cannot be continued.
        """
        self._error, self._current = error, None
        self._steps.close()
        if not isinstance(error, Exception):
            raise error

    def done(self) -> bool:
        """Run on until a phase is not complete."""
        if self._current is not None:
            # Another thread, waiting on another group, may be driving this operation just now.
            if not self._driven.acquire(blocking=False):
                return False
            try:
                self._run()
            finally:
                self._driven.release()
        if self._error is not None:
            raise self._error
        return self._current is None

    def _run(self) -> None:
        while self._current is not None:
            try:
                if not self._current.done():
                    return
            except BaseException as error:  # noqa: BLE001  # raised again, see `_fail`
                self._fail(error)
                return
            self._advance()

    @property
    def over(self) -> bool:
        """Whether it has ended, or failed, as far as it has been driven."""
        return self._current is None

    def missing(self) -> Sequence[int]:
        """Return the ranks for which the phase under way waits."""
        current = self._current
        return () if current is None else current.missing()


class Condition(PolledWork):
    """Complete when a condition holds.

    Parameters
    ----------
    condition : callable
        Polled; the work is complete when it returns True.
    missing : callable
        Returns the ranks that it waits for.
    """

    def __init__(self, condition: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        self.condition = condition
        self._missing = missing

    def done(self) -> bool:
        """Return whether the condition holds."""
        return self.condition()

    def missing(self) -> list[int]:
        """Return the ranks that it waits for."""
        return self._missing()


ConditionSteps: TypeAlias = Generator[Condition, None, T]
"""An operation on the direct path, as a generator of the conditions that it waits for."""


def conditions(steps: Steps) -> ConditionSteps[None]:
    """Return other steps as conditions."""
    for work in steps:
        yield Condition(work.done, list)


class Engine:
    """What a rank has under way on all its groups.

    A rank that waits on one group drives the operations of several phases on all: the rank it waits
    for may itself be waiting, on another group, for this one's next phase.

    Attributes
    ----------
    running : dict of Work to None
        What is driven, in the order in which it began.
    held : set
        Everything whose arrays the transport may still read or write, so that neither a dropped
        Work nor a dropped group gives their memory away; after a failure, until the process ends.
    """

    def __init__(self) -> None:
        self.running: dict[Work[Any], None] = {}
        self.held: set[object] = set()
        self._driving = threading.Lock()

    def drive(self) -> None:
        """Run each as far as it can go; leave it to the other thread if one is doing so."""
        if not self._driving.acquire(blocking=False):
            return
        try:
            for work in tuple(self.running):
                if _finished(work):
                    self.running.pop(work, None)  # unless its group has done so meanwhile
        finally:
            self._driving.release()


def _finished(work: Work[Any]) -> bool:
    # An operation that failed keeps its error, for `wait` to raise.
    try:
        return work.done()
    except Exception:  # noqa: BLE001
        return True


class Waiter(ABC):
    """How a blocking call waits: deadline, warnings and losses of its group in one place.

    Attributes
    ----------
    operation : str
        What is being waited for, for messages.
    timeout : float
        Seconds.
    digest, breaks : int, bool
        Of the call; see `mpidist.backends.node.signatures.ComparedCall`, which a waiter is.
    """

    __slots__ = ()

    timeout: float
    digest: int
    breaks: bool

    @property
    def balance(self) -> int | None:
        """What has to add up to 0 over all ranks, where something has to."""
        return None

    def describe(self) -> Described:
        """Return the description of the call."""
        raise NotImplementedError

    @property
    @abstractmethod
    def operation(self) -> str:
        """What is being waited for."""

    @property
    def told(self) -> str:
        """The same with its group, and where it was called, where these are known."""
        return self.operation

    @property
    def hopeless(self) -> bool:
        """Whether an error has broken the group, so that other ranks may not arrive."""
        return False

    @abstractmethod
    def wait_for(
        self, ready: Callable[[], bool], *, missing: Callable[[], Sequence[int]] | None = None
    ) -> None:
        """Poll `ready` until it is true, or raise the error that says why it will not be.

        Parameters
        ----------
        ready : callable
            Whether the wait is over.
        missing : callable, optional
            Returns the ranks that have not arrived, where that is known.
        """

    def expire(self) -> CollectiveTimeoutError:
        """Return the error of a missed deadline; a group breaks, and reports, too."""
        return CollectiveTimeoutError(f"{self.operation}: not complete after {self.timeout:g} s")

    def report(self, why: str) -> None:  # noqa: B027  # optional
        """Tell what all ranks are doing, since the job is about to be ended."""
