"""What the ranks of a group do together: operations are recorded, end, or break the group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias, TypeVar, cast

from mpidist._arguments import seconds
from mpidist._closing import Closing
from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import is_device
from mpidist.backends.base import Backend
from mpidist.backends.device.base import DeviceBackend, DeviceWork
from mpidist.backends.verbs import AllReduce, Collective
from mpidist.backends.work import Message, Steps
from mpidist.errors import (
    BackendUnavailableError,
    CollectiveMismatchError,
    LaunchError,
    UnsupportedOperationError,
)
from mpidist.group.pending import DeviceGroupWork, GroupWaiter, GroupWork, Peers
from mpidist.group.state import GroupState
from mpidist.observe.recorder import Kind, caller

if TYPE_CHECKING:
    from types import FrameType

    from mpidist.observe.recorder.recorder import Site
    from mpidist.observe.watch import Watch

__all__ = ["Operations", "Service", "Timeout", "abandon_groups", "services"]

T = TypeVar("T")

Timeout: TypeAlias = "float | timedelta | None"
"""Seconds for one call; None stands for those of the group."""

_STATES: weakref.WeakSet[GroupState] = weakref.WeakSet()
"""Of the groups, and of those of which the program has kept an operation only."""


def abandon_groups(transport: str, reason: str) -> None:
    """Let no group of a transport be used any more, in a process that is no rank of it.

    Parameters
    ----------
    transport : str
        The name of its backend.
    reason : str
        Why, for the error that every verb raises from now on.
    """
    for state in tuple(_STATES):
        if state.backend.name == transport and state.reason is None:
            state.reason = reason


class Service(Protocol):
    """What a subsystem keeps with a group: its state and its operations under way."""

    def progress(self) -> None:
        """Drive what is under way; must not block."""

    def close(self) -> None:
        """Wait for what is under way, and release what is held."""


C = TypeVar("C", bound=Service)

_SERVICES: list[tuple[Operations, Service]] = []


def services() -> Sequence[tuple[Operations, Service]]:
    """Return the open services of this process, each with its group."""
    return tuple(_SERVICES)


class Operations(Closing):
    """The operations of one group; the groups themselves are `ProcessGroup`.

    Parameters
    ----------
    backend : Backend
        The transport; closed with the group.
    watch : Watch
        Sees what the ranks of the world are doing.
    ranks : sequence of int
        The rank in the world of each member.
    name : str
        For messages.
    timeout, warn_after : float
        Seconds after which a wait fails, and after which it is reported.
    identity : int
        The same on all ranks, and on no other group.
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
        self._state = state = GroupState(
            backend,
            watch,
            ranks,
            name=name,
            timeout=timeout,
            warn_after=warn_after,
            identity=identity,
        )
        self.rank = state.rank
        self.size = state.size
        self.ranks = state.ranks
        self.name = name
        self._backend = backend
        self._watch = watch
        self._journal = state.journal
        self._identity = identity
        self._outstanding = state.outstanding
        self._messages = 0
        self._collectives = [0]
        backend.follow(identity, self._collectives)
        self._payloads = count(1)
        self._counting = Lock()
        # The thread that is inside of a collective; 0 where none is.
        self._inside = 0
        self._closed_with: list[Operations] = []
        self._services: dict[str, Service] = {}
        _STATES.add(state)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError(
            f"{self} cannot be copied or pickled, nor can what holds it: it connects processes. "
            "Pass it on as it is, or make another with duplicate(); of a DDP copy its module, "
            "between two steps; of an optimizer its state_dict()"
        )

    def __repr__(self) -> str:
        """Return name, rank and size, as messages show them."""
        return repr(self._state)

    @property
    def timeout(self) -> float:
        """Seconds after which a wait fails and the group is broken."""
        return self._state.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._state.timeout = seconds

    @property
    def warn_after(self) -> float:
        """Seconds after which a wait logs a warning, and again at each doubling."""
        return self._state.warn_after

    @warn_after.setter
    def warn_after(self, seconds: float) -> None:
        self._state.warn_after = seconds

    def called_at(self, site: Site) -> AbstractContextManager[None]:
        """Let records and errors say that a line of the user has called what this thread calls.

        For adapters whose own code calls the verbs, where the user's line is not on the stack: one
        that a framework's thread or hook calls.

        Parameters
        ----------
        site : Site
            File, line and function, from `mpidist.observe.recorder.site_of` for one; never a frame,
            which would keep the user's arrays alive.

        Returns
        -------
        context manager
            Around the calls, of this thread on this group.
        """
        return self._journal.called_at(site)

    @property
    def operations(self) -> int:
        """How many operations this rank has begun on the group."""
        return self._collectives[0] + self._messages

    # -- operations ----------------------------------------------------------------------------

    def run(self, call: Collective, finish: Callable[[], T], timeout: Timeout = None) -> T:
        """Perform a collective and return its result.

        Parameters
        ----------
        call, finish : Collective, callable
            What is performed, and what returns the verb's result when it is complete.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.
        """
        if timeout is not None:
            timeout = self._seconds(timeout, call.verb)
        if self._backend.device is not None and call.on_device:
            inner, waiter = self._begin_on_device(call, Kind.BLOCKING, timeout)
            inner.when_over(partial(self._journal.end, waiter.record))
            try:
                inner.order()
            except BaseException as error:
                self._failed(error, waiter)
                raise
            return finish()
        number = self._count(call.verb)
        journal = self._journal
        name = journal.name_collective(Kind.BLOCKING, call)
        record = journal.begin(name, number, caller(2))
        waiter = self._waiter(call.verb, record, name.call, call)
        if timeout is not None:
            waiter.limit(timeout)
        self._inside = get_ident()
        try:
            if self._watch.debug:
                waiter.wait_for(self._backend.compare(waiter.describe()).done)
            self._backend.run(call, waiter=waiter)
        except BaseException as error:
            self._failed(error, waiter)
            raise
        finally:
            self._inside = 0
        journal.end(record)
        return finish()

    def repeat_sum(self, x: Array, op: ReduceOp) -> bool:
        """Perform an all_reduce in place if one like it has been prepared; else do nothing.

        Returns
        -------
        bool
            Whether it was done. A `Collective`, its checks and a waiter cost more than a small sum.
        """
        sums = self._backend.sums
        # In debug mode a rank whose array lies otherwise would compare, and wait for this one.
        if self._state.reason is not None or self._watch.debug or self._inside:
            return False
        if self._backend.device is not None and is_device(x):
            return self._repeat_on_device(self._backend.device, x, op)
        if sums is None:
            return False
        prepared = sums.find(x, op)
        if prepared is None:
            return False
        self._collectives[0] = number = self._collectives[0] + 1
        journal = self._journal
        name = prepared.name or journal.name_sum(prepared, x, op)
        record = journal.begin(name, number, caller(2))
        self._inside = get_ident()
        try:
            prepared.run(x, x, partial(self._sum_waiter, x, op, record))
        except BaseException as error:
            self._failed(error, self._waiter("all_reduce", record))
            raise
        finally:
            self._inside = 0
        journal.end(record)
        return True

    def _sum_waiter(self, x: Array, op: ReduceOp, record: int) -> GroupWaiter:
        """Return what waits for a sum in place that was repeated."""
        call = AllReduce(x, x, op, shape=x.shape)
        name = self._journal.name_collective(Kind.BLOCKING, call)
        return self._waiter(call.verb, record, name.call, call)

    def _repeat_on_device(self, device: DeviceBackend[Backend], x: Array, op: ReduceOp) -> bool:
        """Perform an all_reduce of a device array in place if it needs no preparation."""
        name = self._journal.name_device_sum(x, op)
        number, record = self._collectives[0] + 1, 0

        def waiter() -> GroupWaiter:
            return self._waiter("all_reduce", record, number=number)

        try:
            work = device.repeat_sum(x, op, waiter)
        except BaseException as error:
            self._failed(error, waiter())
            raise
        if work is None:
            return False
        self._collectives[0] = number
        record = self._journal.begin(name, number, caller(3))
        work.when_over(partial(self._journal.end, record))
        work.order()
        return True

    def start(
        self, call: Collective, finish: Callable[[], T], timeout: Timeout = None
    ) -> GroupWork[T]:
        """Start a collective and return at once; see `run`."""
        if timeout is not None:
            timeout = self._seconds(timeout, f"i{call.verb}")
        if self._backend.device is not None and call.on_device:
            begun, waiter = self._begin_on_device(call, Kind.IMMEDIATE, timeout)
            self._state.release(2)
            return DeviceGroupWork(waiter, begun, finish)
        verb = f"i{call.verb}"
        number = self._count(verb)
        name = self._journal.name_collective(Kind.IMMEDIATE, call)
        record = self._journal.begin(name, number, caller(2))
        waiter = self._waiter(verb, record, name.call, call)
        if timeout is not None:
            waiter.limit(timeout)
        try:
            if self._watch.debug:
                inner = self._backend.begin_compared(call, waiter.describe())
            else:
                inner = self._backend.begin(call, waiter)
        except BaseException as error:
            self._failed(error, waiter)
            raise
        self._state.release_many()
        return GroupWork(waiter, inner, finish)

    def _begin_on_device(
        self, call: Collective, kind: Kind, timeout: float | None
    ) -> tuple[DeviceWork, GroupWaiter]:
        """Put a collective on device arrays behind the current stream, and return at once."""
        device = self._backend.device
        assert device is not None, "asked before"
        verb = call.verb if kind is Kind.BLOCKING else f"i{call.verb}"
        number = self._count(verb)
        name = self._journal.name_collective(kind, call)
        record = self._journal.begin(name, number, caller(3))
        waiter = self._waiter(verb, record, name.call, call)
        if timeout is not None:
            waiter.limit(timeout)
        self._inside = get_ident()
        try:
            if self._watch.debug:
                # Compared now in both forms: what the device has begun cannot be undone.
                waiter.wait_for(self._backend.compare(waiter.describe()).done)
            device.prepare(waiter)
            begun = device.begin(call, waiter)
        except (BackendUnavailableError, LaunchError):
            # The ranks cannot be connected, all of them know, and nothing has begun.
            self._journal.end(record, failed=True)
            raise
        except BaseException as error:
            self._failed(error, waiter)
            raise
        finally:
            self._inside = 0
        if not device.compares_calls:
            waiter.call = None  # a long wait for the device need not hold the arrays
        return begun, waiter

    def start_messages(
        self,
        sends: Sequence[Message],
        receives: Sequence[Message],
        finish: Callable[[], T],
        timeout: Timeout = None,
    ) -> DeviceGroupWork[T]:
        """Put messages of device arrays behind the current stream, and return at once."""
        device = self._backend.device
        assert device is not None, "the arrays were checked"
        peers = Peers(frozenset(message.peer for message in (*sends, *receives)))
        waiter = self._message_waiter("exchange", "on the device", peers, caller(3), timeout)
        try:
            inner = device.exchange(sends, receives, waiter)
        except UnsupportedOperationError:
            # The ranks are not connected, on none of them, and nothing has begun.
            self._journal.end(waiter.record, failed=True)
            raise
        except BaseException as error:
            self._failed(error, waiter)
            raise
        self._state.release(2)
        return DeviceGroupWork(waiter, inner, finish)

    def start_steps(
        self,
        verb: str,
        steps: Callable[[Backend], Steps],
        finish: Callable[[], T],
        *,
        peers: Peers,
        detail: str = "",
        timeout: Timeout = None,
    ) -> GroupWork[T]:
        """Start an operation of several phases among some ranks and return at once.

        Parameters
        ----------
        verb : str
            For messages.
        steps, finish : callable
            Return the operation's steps, and its result when they are over.
        peers : Peers
            The ranks that it depends on.
        detail : str, optional
            Follows the verb in the records, such as the peers and the dtype.
        timeout : float or datetime.timedelta, optional
            Seconds for this operation; the group's when omitted.
        """
        waiter = self._message_waiter(verb, detail, peers, caller(2), timeout)
        try:
            inner = self._backend.start(steps(self._backend))
        except BaseException as error:
            self._failed(error, waiter)
            raise
        self._state.release_many()
        return GroupWork(waiter, inner, finish)

    def next_payload(self) -> int:
        """Return the number of the next lane for a message that follows its envelope."""
        return next(self._payloads)

    def _count(self, verb: str) -> int:
        """Return the number of the collective that begins; the same on all ranks."""
        if self._state.reason is not None or self._inside:
            self._state.check_usable(verb)
            self._check_thread(verb)
        self._collectives[0] = number = self._collectives[0] + 1
        return number

    def _waiter(
        self,
        verb: str,
        record: int,
        digest: int = 0,
        call: Collective | None = None,
        *,
        number: int | None = None,
    ) -> GroupWaiter:
        """Return what waits for a collective, the one that was begun last when it has no number."""
        collective = (self._identity, self._collectives[0] if number is None else number)
        return GroupWaiter(
            self._state, verb, record, collective=collective, digest=digest, call=call
        )

    def _message_waiter(
        self, verb: str, detail: str, peers: Peers, frame: FrameType, timeout: Timeout = None
    ) -> GroupWaiter:
        """Count an operation among some ranks, record it, and return what waits for it."""
        if timeout is not None:
            timeout = self._seconds(timeout, verb)
        self._state.check_usable(verb)
        with self._counting:
            self._messages = number = self._messages + 1
        name = self._journal.name(f"{verb} {detail}".strip(), Kind.MESSAGE)
        record = self._journal.begin(name, number, frame)
        waiter = GroupWaiter(self._state, verb, record, number=number, peers=peers)
        if timeout is not None:
            waiter.limit(timeout)
        return waiter

    def _seconds(self, timeout: float | timedelta, verb: str) -> float:
        """Return the deadline of a call as a number."""
        return seconds(timeout, f"{verb} on {self}: timeout", least=0.0)

    def _check_thread(self, verb: str) -> None:
        """Raise if another thread is inside of a collective of this group."""
        if self._inside not in (0, get_ident()):
            raise UnsupportedOperationError(
                f"{verb} on {self}: another thread of this process is inside of a collective of "
                "this group. The collectives of a group are called by one thread at a time, in the "
                "same order on all ranks: make a group for each thread, group.duplicate(name). "
                "Messages may be sent and received by any thread"
            )

    @contextmanager
    def _performing(self, what: str, among: Sequence[int] | None = None) -> Iterator[GroupWaiter]:
        """Count and record what blocks and is no `Collective`; yield what waits for it."""
        frame = caller(3)
        if among is None:
            number = self._count(what)
            # The rest of what it is differs legitimately, or is compared by itself.
            name = self._journal.name(what, Kind.BLOCKING, alike=what.partition(" ")[0])
            record = self._journal.begin(name, number, frame)
            waiter = self._waiter(what, record, name.call)
            self._inside = get_ident()
        else:
            waiter = self._message_waiter(what, "", Peers(frozenset(among)), frame)
        try:
            if self._watch.debug and among is None:
                waiter.wait_for(self._backend.compare(waiter.describe()).done)
            yield waiter
        except BaseException as error:
            self._failed(error, waiter)
            raise
        finally:
            if among is None:
                self._inside = 0
        self._journal.end(waiter.record)

    def _failed(self, error: BaseException, waiter: GroupWaiter) -> None:
        """Break the group on an error that may have left its ranks at different places."""
        self._journal.end(waiter.record, failed=True)
        # Of the latter all ranks know, and nothing has begun.
        usable = isinstance(error, BackendUnavailableError)
        if isinstance(error, CollectiveMismatchError):
            self._state.add_operation(error, waiter.operation)
            usable = error.usable
        if not usable:
            # Also an interrupt: the other ranks have gone on to the next operation.
            self._state.break_by(error)

    def service(self, name: str, make: Callable[[], C]) -> C:
        """Return the service of this name, which the first call makes.

        It is driven by `progress`, and closed before the group; collective if making it is.
        """
        if name not in self._services:
            self._services[name] = made = make()
            _SERVICES.append((self, made))
        return cast("C", self._services[name])

    def progress(self) -> None:
        """Drive what is under way as far as it can go now; local, never blocks.

        MPI makes no progress by itself: a loop that computes for long while operations are
        outstanding calls this now and then.
        """
        self._state.progress()
        for service in tuple(self._services.values()):
            service.progress()

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish what is under way within the deadline and release the group.

        Raises
        ------
        DistributedError
            If an operation failed, now or before, that no wait reported; the group is closed all
            the same.

        Notes
        -----
        Local, but waits for the group's outstanding operations and saves, if it has any. Closing
        twice is allowed; a broken group is not waited for.
        """
        if self._state.reason is not None:
            return
        failed = self._finish()
        if self._backend.device is not None and self._state.reason is None:
            try:
                with self._performing("close", among=[self.rank]) as waiter:
                    waiter.wait_for(self._backend.device.idle)
            except Exception as error:  # noqa: BLE001  # as above
                failed = failed or error
        for group in self._closed_with:
            group.close()
        if self._state.reason is None:
            self._state.reason = "it was closed"
            if self._backend.device is not None:
                self._backend.device.close()
            self._backend.close()
        if failed is not None:
            raise failed

    def _finish(self) -> BaseException | None:
        """Finish what is under way, and return the first error that was not raised yet."""
        failed: BaseException | None = None
        while self._services:
            _, service = self._services.popitem()
            _SERVICES.remove((self, service))
            try:
                service.close()
            except Exception as error:  # noqa: BLE001  # raised by `close`, when all are over
                failed = failed or error
        while self._outstanding and self._state.reason is None:
            try:
                next(iter(self._outstanding)).synchronize()
            except Exception as error:  # noqa: BLE001  # as above
                failed = failed or error
        if self._state.unseen is not None:
            failed, self._state.unseen = failed or self._state.unseen.error, None
        return failed
