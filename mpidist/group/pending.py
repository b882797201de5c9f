"""What a group has under way: plans of collectives, waits with a deadline, and their Work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NoReturn, TypeVar

from mpidist._arguments import seconds
from mpidist.backends.device.base import DeviceWork
from mpidist.backends.node.signatures import Described
from mpidist.backends.verbs import Collective
from mpidist.backends.work import Waiter, WaitTimeout, Work, wait_until
from mpidist.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DistributedError,
    PeerLostError,
    SizeMismatchError,
    TransportError,
)
from mpidist.group.state import GroupState, PendingWork
from mpidist.observe.recorder import caller

__all__ = [
    "EVERYBODY",
    "DeviceGroupWork",
    "GroupWaiter",
    "GroupWork",
    "Peers",
]

T = TypeVar("T")

_LONGEST_PAUSE = 10.0
"""Seconds between two looks at what the others have called."""

GRACE = 3.0
"""Seconds that a wait for a rank goes on after it has left: its last messages may be on the way."""


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
    """Waits for one operation with its group's deadline, warnings and losses.

    Parameters
    ----------
    state : GroupState
        Of the group whose operation it is.
    verb : str
        For messages.
    record : int
        The operation's, in the recorder.
    number : int, optional
        Of the operation; that of the collective when omitted.
    collective : (int, int), optional
        The group's identity and the number of the operation among its collectives.
    peers : Peers, optional
        The ranks it depends on; all when omitted.
    digest : int, optional
        Of what has to be the same on all ranks.
    call : Collective, optional
        What is performed, if it is one.
    """

    # One is made for every blocking call, most of which never have to wait for long.
    __slots__ = (
        "_lost_since",
        "_missing",
        "_next_look",
        "_next_warning",
        "_number",
        "_verb",
        "breaks",
        "call",
        "collective",
        "digest",
        "own_timeout",
        "peers",
        "record",
        "state",
        "timeout",
    )

    def __init__(
        self,
        state: GroupState,
        verb: str,
        record: int,
        *,
        number: int = 0,
        collective: tuple[int, int] | None = None,
        peers: Peers = EVERYBODY,
        digest: int = 0,
        call: Collective | None = None,
    ) -> None:
        self.state = state
        self.digest = digest
        self.call = call
        self.breaks = call is not None and call.breaks
        self.record = record
        self.collective = collective
        self.peers = peers
        self.own_timeout: float | None = None
        self.timeout = state.timeout
        self._missing: Callable[[], Sequence[int]] | None = None
        self._verb = verb
        self._number = number

    @property
    def operation(self) -> str:
        """What is being waited for, for messages."""
        number = self._number if self.collective is None else self.collective[1]
        return f"{self._verb} #{number}"

    def limit(self, timeout: float) -> None:
        """Let this operation have another deadline than the group's."""
        self.timeout = self.own_timeout = timeout

    # -- the signature of a collective -----------------------------------------------------------

    @property
    def balance(self) -> int | None:
        """What has to add up to 0 over all ranks, where something has to."""
        return None if self.call is None else self.call.balance(self.state.rank)

    def describe(self) -> Described:
        """Return the description of the call."""
        site, call = self.state.watch.call_site(self.record), self.call
        if call is None:
            return Described(self._verb, site)
        immediate = "i" * (self._verb != call.verb)
        return Described(immediate + call.describe(), site, call.fits, self.balance or 0)

    # -- waiting ---------------------------------------------------------------------------------

    def wait_for(
        self, ready: Callable[[], bool], *, missing: Callable[[], Sequence[int]] | None = None
    ) -> None:
        """Wait as `Waiter` says; a missed deadline and a lost rank break the group."""
        state = self.state
        self._missing = missing
        self._next_warning, self._next_look = state.warn_after, 0.0
        self._lost_since: float | None = None
        try:
            wait_until(
                ready,
                timeout=self.timeout,
                progress=state.drive,
                patrol=self._patrol,
            )
        except WaitTimeout:
            raise self.expire() from None
        except (TransportError, PeerLostError) as error:
            state.break_by(error)
            raise
        finally:
            # It may hold the operation, which holds this: its arrays would wait for the collector.
            self._missing = None

    def expire(self) -> CollectiveTimeoutError:
        """Break the group and report, as `Waiter` says."""
        setting = (
            "init(timeout=...)" if self.timeout == self.state.timeout else "the call's own timeout"
        )
        error = CollectiveTimeoutError(
            f"{self.told}: not complete after {self.timeout:g} s{self._who()}. The group is "
            "broken: let this error end the job, and look at what the missing ranks were "
            f"doing; {setting} sets the deadline"
        )
        self.state.break_by(error)
        self.report(f"not complete after {self.timeout:g} s", error=error)
        return error

    @property
    def hopeless(self) -> bool:
        """Whether the group is broken."""
        return self.state.reason is not None

    @property
    def _key(self) -> tuple[int, int] | None:
        """The collective as the recorders know it; all groups that are being made have number 0."""
        return self.collective if self.collective and self.collective[0] else None

    @property
    def told(self) -> str:
        """The operation, its group and where it was called."""
        site = self.state.watch.call_site(self.record)
        return f"{self.operation} on {self.state}, called at {site}"

    def _who(self) -> str:
        """Describe the ranks that have not arrived, and where they are instead."""
        stall = self.state.watch.describe_stall(self.state.ranks, self._key, self._absent())
        return f". {stall}" if stall else ""

    def _absent(self) -> list[int]:
        """Return the ranks of the world that are known not to have arrived."""
        members = self.state.ranks
        missing = self._missing() if self._missing is not None else ()
        if not missing and self.collective is None:
            missing = sorted(self.peers.ranks or ())
        return [members[rank] for rank in missing]

    def report(self, why: str, *, dump: bool = True, error: DistributedError | None = None) -> None:
        """Report what all ranks are doing, because of an error, unless another rank reports it."""
        if error is not None:
            site = self.state.watch.call_site(self.record)
            group = f"group {self.state.name!r}"
            error._reported = f"{self.operation} on {group}, called at {site}: {why}"
        self.state.watch.report(
            f"{self.told}: {why}",
            members=self.state.ranks,
            key=self._key,
            missing=self._absent(),
            dump=dump,
        )

    def _look_for_differences(self, waited: float) -> None:
        """Raise if all ranks have arrived, with calls some of which can never complete."""
        if self._key is None or waited < self._next_look:
            return
        self._next_look = min(2 * waited, waited + _LONGEST_PAUSE)
        state = self.state
        differences = state.watch.differences(
            state.ranks, self._key, compared=state.backend.compares_calls
        )
        if differences:
            error = CollectiveMismatchError(
                f"{self.told}: the ranks called different things: {differences}. The group is "
                "broken: let this error end the job; all ranks must make the same calls in the "
                "same order"
            )
            error.usable = False
            self.state.break_by(error)
            self.report("will never be complete", error=error)
            raise error

    def _lost(self) -> dict[int, str]:
        """Return the ranks on which this depends that are gone, and how they went."""
        state, needed = self.state, self.peers.ranks
        killed = set(state.watch.killed())
        gone = {
            rank: "was killed: its process has ended without a word"
            for rank, world in enumerate(state.ranks)
            if world in killed
        } | dict(state.backend.lost(self.collective))
        return {rank: reason for rank, reason in gone.items() if needed is None or rank in needed}

    def _patrol(self, waited: float) -> None:
        if self.hopeless:  # an operation that was driven meanwhile has broken the group
            self.state.check_usable(self.operation)
        self._look_for_differences(waited)
        if waited >= self._next_warning:
            self._next_warning *= 2
            why = f"has waited for {waited:.0f} s, the deadline is at {self.timeout:g} s"
            self.report(why, dump=False)
        lost = self._lost()
        if len(lost) <= self.peers.spare:
            return
        if self._lost_since is None:
            self._lost_since = waited
        if waited - self._lost_since >= GRACE:
            reasons = "; ".join(f"rank {rank} {reason}" for rank, reason in sorted(lost.items()))
            error = PeerLostError(
                f"{self.told}: {reasons}. The group is broken: let this error end the job; every "
                "rank must call the same collectives"
            )
            self.report(reasons, error=error)
            raise error


class GroupWork(PendingWork[T]):
    """An operation under way on a group; see `Work`.

    Parameters
    ----------
    waiter : GroupWaiter
        What waits for it; its group holds it until it is complete, also if the program does not.
    inner : Work
        The transport's part.
    finish : callable
        Called once on completion; returns the result.
    """

    def __init__(self, waiter: GroupWaiter, inner: Work[Any], finish: Callable[[], T]) -> None:
        self._waiter = waiter
        self.state = waiter.state
        self._inner = inner
        self._finish = finish
        self._over = False
        self.error: BaseException | None = None
        self._result: list[T] = []
        # Any thread that waits on the group polls what the others have started.
        self._polled = Lock()
        self.state.outstanding[self] = None
        self.state.backend.engine.held.add(self)

    def complete(self) -> bool:
        """Poll the transport's part, and finish when it has ended."""
        if self._over:
            return True
        if not self._polled.acquire(blocking=False):
            return self._over
        try:
            return self._over or self._poll()
        finally:
            self._polled.release()

    def _poll(self) -> bool:
        try:
            if not self._inner.done():
                return False
            self._arrived()
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._end()
        return True

    def _fail(self, error: BaseException) -> None:
        """End with an error of the transport, to which the group's name is added."""
        if isinstance(error, CollectiveMismatchError):
            self.state.add_operation(error, self._waiter.operation)
            self._end(error, broken=not error.usable)
        elif isinstance(error, SizeMismatchError):
            self._end(error)
        elif isinstance(error, TransportError) and str(self.state) not in str(error):
            message = f"{self._waiter.operation} on {self.state}: {error}"
            located = TransportError(message, error.code)
            located.__cause__ = error
            self._end(located, broken=True)
        else:
            self._end(error, broken=True)

    def _arrived(self) -> None:
        """Take the result, once, after the transport's part has ended."""
        self._result.append(self._finish())
        del self._finish

    def _end(self, error: BaseException | None = None, *, broken: bool = False) -> None:
        """Be over; the arrays of a broken group are held for ever, see `Engine.held`."""
        # In this order: what is over has its result or its error, whichever thread asks.
        self.error, self._over = error, True
        self._waiter.call = None  # it has the caller's arrays
        state = self.state
        state.outstanding.pop(self, None)
        state.journal.end(self._waiter.record, failed=error is not None)
        if broken and error is not None:
            state.break_by(error)
            return
        if error is not None and state.unseen is None:
            state.unseen = self  # for `close`, if no wait raises its error
        engine = state.backend.engine
        engine.held.discard(self)
        engine.running.pop(self._inner, None)  # else it stays there until the next wait
        del self._inner

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise the error with which it ended: `close` need not."""
        if self.state.unseen is self:
            self.state.unseen = None
        raise error

    def missing(self) -> Sequence[int]:
        """Return the ranks for which it waits, where they are known; else none."""
        return () if self._over else self._inner.missing()

    def done(self) -> bool:
        """Make progress on the whole group, and return whether this operation is complete."""
        if not self._over:
            self.state.check_usable(self._waiter.operation)
            self.state.backend.progress()
        if not self.complete():
            return False
        if self.error is not None:
            self._raise(self.error)
        return True

    def wait(self, timeout: float | None = None) -> T:
        """Wait for the result; see `Work.wait`."""
        if timeout is not None:
            timeout = self._seconds(timeout)
        if not self._over:
            self.state.check_usable(self._waiter.operation)
            self._wait(timeout)
        if self.error is not None:
            self._raise(self.error)
        return self._result[0]

    def _seconds(self, timeout: Any) -> float:
        """Return the timeout of a wait as a number; what is over is asked with `done`."""
        return seconds(timeout, f"{self._waiter.operation} on {self.state}: timeout", least=0.0)

    def _wait(self, timeout: float | None) -> None:
        waiter, journal = self._waiter, self.state.journal
        if timeout is None:
            timeout = waiter.own_timeout
        waiter.timeout = self.state.timeout if timeout is None else timeout
        journal.wait(waiter.record, caller(2))
        try:
            waiter.wait_for(self.complete, missing=self.missing)
        except (CollectiveTimeoutError, CollectiveMismatchError, PeerLostError) as error:
            self._end(error, broken=True)
        finally:
            journal.waited()


class DeviceGroupWork(GroupWork[T]):
    """An operation under way on device arrays; see `Work`.

    `wait` orders the current stream behind it, and the host goes on; `synchronize` waits.
    """

    _inner: DeviceWork

    def _arrived(self) -> None:
        """Leave the result to `wait`: it is finished on the stream that is current then."""

    def wait(self, timeout: float | None = None) -> T:
        """Order the current stream behind the operation, and return the result.

        Does not block; `timeout` is that of the group, which a watchdog keeps.
        """
        if timeout is not None:
            self._seconds(timeout)
        if not self._over:
            self.state.check_usable(self._waiter.operation)
            try:
                self._inner.order()
            except Exception as error:  # noqa: BLE001  # kept, and raised below
                self._fail(error)
        if self.error is not None:
            self._raise(self.error)
        if not self._result:
            super()._arrived()
        return self._result[0]

    def synchronize(self, timeout: float | None = None) -> T:
        """Block the host until the result is there, and return it."""
        result = self.wait(timeout)
        device = self.state.backend.device
        assert device is not None, "it carried this operation"
        # Behind the operation there may be copies that make the result the caller's.
        arrived = device.fence()
        if not self._over:
            self._wait(None if timeout is None else self._seconds(timeout))
            if self.error is not None:
                self._raise(self.error)
        self._waiter.wait_for(arrived)
        return result
