"""What the ranks of a group do together: how operations begin, and what becomes of those that fail.

Every operation is counted, recorded and given what waits for it: `_begin`. A blocking one is
performed inside of a `_Blocking`, an immediate one becomes a `GroupWork`: `_start`. Both end their
record, or break the group, see `_fail`. The one short cut is a blocking sum that has been prepared
before, `_sum`, since what waits for it would cost more than the sum does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import count
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast

from mpidist._arguments import seconds
from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import is_device
from mpidist.backends.base import Backend
from mpidist.backends.device.base import DeviceBackend, DeviceWork
from mpidist.backends.verbs import AllReduce, Collective
from mpidist.backends.work import Work
from mpidist.errors import (
    BackendUnavailableError,
    CollectiveMismatchError,
    LaunchError,
    UnsupportedOperationError,
)
from mpidist.group.pending import EVERYBODY, DeviceGroupWork, GroupWaiter, GroupWork, Peers
from mpidist.group.state import GroupState, PendingWork
from mpidist.observe.recorder import Kind, caller

if TYPE_CHECKING:
    from types import FrameType

    from mpidist.backends.node.sums import Sum
    from mpidist.observe.recorder import Name

__all__ = ["Operations", "Service", "Timeout", "services"]

T = TypeVar("T")

Timeout: TypeAlias = "float | timedelta | None"
"""Seconds for one call; None stands for those of the group."""


class Service(Protocol):
    """What a subsystem keeps with a group: its state and its operations under way."""

    def progress(self) -> None:
        """Drive what is under way; must not block."""

    def close(self) -> None:
        """Wait for what is under way, and release what is held."""


C = TypeVar("C", bound=Service)

_SERVICES: list[tuple[GroupState, Service]] = []


def services() -> Sequence[tuple[GroupState, Service]]:
    """Return the open services of this process, each with the state of its group."""
    return tuple(_SERVICES)


class Operations:
    """The operations of one group.

    Parameters
    ----------
    state : GroupState
        What they share.

    Attributes
    ----------
    state : GroupState
        What they share.
    collectives : list of int
        One number: how many collectives this rank has begun.
    inside : int
        The identity of the thread that is inside of a collective; 0 where none is.
    """

    def __init__(self, state: GroupState) -> None:
        self.state = state
        self.collectives = [0]
        self.inside = 0
        self._backend = state.backend
        self._journal = state.journal
        self._watch = state.watch
        self._messages = 0
        self._payloads = count(1)
        self._counting = Lock()
        self._services: dict[str, Service] = {}
        state.backend.follow(state.identity, self.collectives)

    @property
    def begun(self) -> int:
        """How many operations this rank has begun on the group."""
        return self.collectives[0] + self._messages

    @property
    def outstanding(self) -> Collection[PendingWork[Any]]:
        """The operations under way."""
        return self.state.outstanding

    # -- collectives -----------------------------------------------------------------------------

    def run(self, call: Collective, finish: Callable[[], T], timeout: Timeout = None) -> T:
        """Perform a collective and return its result.

        Parameters
        ----------
        call, finish : Collective, callable
            What is performed, and what returns the verb's result when it is complete.
        timeout : float or datetime.timedelta, optional
            Seconds for this call; the group's when omitted.
        """
        backend, debug = self._backend, self._watch.debug
        if backend.device is not None and call.on_device:
            self._run_on_device(call, self._collective(call, Kind.BLOCKING, caller(2), timeout))
            return finish()
        if backend.sums is not None and isinstance(call, AllReduce) and timeout is None:
            prepared = None if debug else backend.sums.prepared(call)
            if prepared is not None:
                number = self._count(call.verb)
                name = prepared.name or self._journal.name_sum(prepared, call)
                record = self._journal.begin(name, number, caller(2))
                self._sum(
                    prepared, call.x, call.out, record, partial(self._waiter_of_sum, call, record)
                )
                return finish()
        with _Blocking(self, self._collective(call, Kind.BLOCKING, caller(2), timeout)) as waiter:
            if debug:
                waiter.wait_for(backend.compare(waiter.describe()).done)
            backend.run(call, waiter=waiter)
        return finish()

    def repeat_sum(self, x: Array, op: ReduceOp) -> bool:
        """Perform an all_reduce in place if one like it has been prepared; else do nothing.

        Returns
        -------
        bool
            Whether it was done. A `Collective`, its checks and a waiter cost more than a small sum.
        """
        backend = self._backend
        # In debug mode a rank whose array lies otherwise would compare, and wait for this one.
        if self.state.reason is not None or self._watch.debug or self.inside:
            return False
        if backend.device is not None and is_device(x):
            return self._repeat_on_device(backend.device, x, op)
        if backend.sums is None:
            return False
        prepared = backend.sums.find(x, op)
        if prepared is None:
            return False
        self.collectives[0] = number = self.collectives[0] + 1
        name = prepared.name or self._journal.name_sum(prepared, _in_place(x, op))
        record = self._journal.begin(name, number, caller(2))
        self._sum(prepared, x, x, record, partial(self._waiter_of_repeat, x, op, record))
        return True

    def start(
        self, call: Collective, finish: Callable[[], T], timeout: Timeout = None
    ) -> GroupWork[T]:
        """Start a collective and return at once; see `run`."""
        waiter = self._collective(call, Kind.IMMEDIATE, caller(2), timeout)
        if self._backend.device is not None and call.on_device:
            return self._start(waiter, partial(self._begin_on_device, call), finish)
        return self._start(waiter, partial(self._begin_on_host, call), finish)

    def _collective(
        self, call: Collective, kind: Kind, frame: FrameType, timeout: Timeout
    ) -> GroupWaiter:
        """Begin a collective, whose number is the same on all ranks."""
        verb = call.verb if kind is Kind.BLOCKING else f"i{call.verb}"
        limit = None if timeout is None else self._seconds(timeout, verb)
        number = self._count(verb)
        name = self._journal.name_collective(kind, call)
        return self._begin(verb, name, number, frame, call=call, timeout=limit)

    def _count(self, verb: str) -> int:
        """Return the number of the collective that begins; the same on all ranks."""
        if self.state.reason is not None or self.inside:
            self.state.check_usable(verb)
            self._check_thread(verb)
        self.collectives[0] = number = self.collectives[0] + 1
        return number

    def _check_thread(self, verb: str) -> None:
        """Raise if another thread is inside of a collective of this group."""
        if self.inside not in (0, get_ident()):
            raise UnsupportedOperationError(
                f"{verb} on {self.state}: another thread of this process is inside of a collective "
                "of this group. The collectives of a group are called by one thread at a time, in "
                "the same order on all ranks: make a group for each thread, group.duplicate(name). "
                "Messages may be sent and received by any thread"
            )

    def _begin_on_host(self, call: Collective, waiter: GroupWaiter) -> Work[Any]:
        if self._watch.debug:
            return self._backend.begin_compared(call, waiter.describe())
        return self._backend.begin(call, waiter)

    # -- what every operation passes -------------------------------------------------------------

    def _begin(
        self,
        verb: str,
        name: Name,
        number: int,
        frame: FrameType,
        *,
        call: Collective | None = None,
        peers: Peers | None = None,
        timeout: float | None = None,
    ) -> GroupWaiter:
        """Record that an operation begins, of which `peers` are some ranks, and return its waiter.

        Without `peers` it is a collective.
        """
        record = self._journal.begin(name, number, frame)
        collective = (self.state.identity, number) if peers is None else None
        waiter = GroupWaiter(
            self.state,
            verb,
            record,
            number=number,
            collective=collective,
            peers=peers or EVERYBODY,
            digest=name.call,
            call=call,
        )
        if timeout is not None:
            waiter.limit(timeout)
        return waiter

    def _start(
        self,
        waiter: GroupWaiter,
        begin: Callable[[GroupWaiter], Work[Any]],
        finish: Callable[[], T],
    ) -> GroupWork[T]:
        """Return the Work of an operation that the transport begins now."""
        try:
            inner = begin(waiter)
        except BaseException as error:
            self.fail(error, waiter)
            raise
        if isinstance(inner, DeviceWork):
            self.state.release(2)
            return DeviceGroupWork(waiter, inner, finish)
        self.state.release_many()
        return GroupWork(waiter, inner, finish)

    def fail(self, error: BaseException, waiter: GroupWaiter) -> None:
        """Break the group on an error that may have left its ranks at different places."""
        self._journal.end(waiter.record, failed=True)
        # Of these all ranks know, and nothing has begun.
        usable = isinstance(error, BackendUnavailableError | LaunchError)
        if waiter.collective is None:
            usable |= isinstance(error, UnsupportedOperationError)
        if isinstance(error, CollectiveMismatchError):
            self.state.add_operation(error, waiter.operation)
            usable = error.usable
        if not usable:
            # Also an interrupt: the other ranks have gone on to the next operation.
            self.state.break_by(error)

    def _seconds(self, timeout: float | timedelta, verb: str) -> float:
        """Return the deadline of a call as a number."""
        return seconds(timeout, f"{verb} on {self.state}: timeout", least=0.0)

    # -- a sum that has been prepared ------------------------------------------------------------

    def _sum(
        self,
        prepared: Sum,
        x: Array,
        out: Array,
        record: int,
        waiters: Callable[[], GroupWaiter],
    ) -> None:
        """Perform a blocking sum, with a waiter only if it has to wait for long."""
        self.inside = get_ident()
        try:
            prepared.run(x, out, waiters)
        except BaseException as error:
            self.fail(error, waiters())
            raise
        finally:
            self.inside = 0
        self._journal.end(record)

    def _waiter_of_sum(self, call: AllReduce, record: int) -> GroupWaiter:
        """Return what waits for a sum that has begun."""
        name = self._journal.name_collective(Kind.BLOCKING, call)
        return GroupWaiter(
            self.state,
            call.verb,
            record,
            collective=(self.state.identity, self.collectives[0]),
            digest=name.call,
            call=call,
        )

    def _waiter_of_repeat(self, x: Array, op: ReduceOp, record: int) -> GroupWaiter:
        return self._waiter_of_sum(_in_place(x, op), record)

    # -- device arrays ---------------------------------------------------------------------------

    def _begin_on_device(self, call: Collective, waiter: GroupWaiter) -> DeviceWork:
        """Put a collective on device arrays behind the current stream, and return at once."""
        device = self._backend.device
        assert device is not None, "asked before"
        self.inside = get_ident()
        try:
            if self._watch.debug:
                # Compared now in both forms: what the device has begun cannot be undone.
                waiter.wait_for(self._backend.compare(waiter.describe()).done)
            device.prepare(waiter)
            begun = device.begin(call, waiter)
        finally:
            self.inside = 0
        if not device.compares_calls:
            waiter.call = None  # a long wait for the device need not hold the arrays
        return begun

    def _run_on_device(self, call: Collective, waiter: GroupWaiter) -> None:
        """Let the current stream go on behind a collective; the host does not wait for it."""
        try:
            begun = self._begin_on_device(call, waiter)
            begun.when_over(partial(self._journal.end, waiter.record))
            begun.order()
        except BaseException as error:
            self.fail(error, waiter)
            raise

    def _repeat_on_device(self, device: DeviceBackend[Backend], x: Array, op: ReduceOp) -> bool:
        """Perform an all_reduce of a device array in place if it needs no preparation."""
        name = self._journal.name_device_sum(x, op)
        number, record = self.collectives[0] + 1, 0

        def waiter() -> GroupWaiter:
            collective = (self.state.identity, number)
            return GroupWaiter(self.state, "all_reduce", record, collective=collective)

        try:
            work = device.repeat_sum(x, op, waiter)
        except BaseException as error:
            self.fail(error, waiter())
            raise
        if work is None:
            return False
        self.collectives[0] = number
        record = self._journal.begin(name, number, caller(3))
        work.when_over(partial(self._journal.end, record))
        work.order()
        return True

    # -- what is no collective -------------------------------------------------------------------

    def start_messages(
        self,
        verb: str,
        begin: Callable[[Backend, GroupWaiter], Work[Any]],
        finish: Callable[[], T],
        *,
        peers: Peers,
        detail: str = "",
        timeout: Timeout = None,
    ) -> GroupWork[T]:
        """Start an operation among some ranks and return at once.

        Parameters
        ----------
        verb : str
            For messages.
        begin, finish : callable
            Lets the transport begin it, given that and what waits for it; returns its result when
            it is over.
        peers : Peers
            The ranks that it depends on.
        detail : str, optional
            Follows the verb in the records, such as the peers and the dtype.
        timeout : float or datetime.timedelta, optional
            Seconds for this operation; the group's when omitted.
        """
        waiter = self._message(verb, detail, peers, caller(2), timeout)
        return self._start(waiter, partial(begin, self._backend), finish)

    def next_payload(self) -> int:
        """Return the number of the next lane for a message that follows its envelope."""
        return next(self._payloads)

    def _message(
        self, verb: str, detail: str, peers: Peers, frame: FrameType, timeout: Timeout = None
    ) -> GroupWaiter:
        """Begin an operation among some ranks, which is counted by this rank alone."""
        limit = None if timeout is None else self._seconds(timeout, verb)
        self.state.check_usable(verb)
        with self._counting:
            self._messages = number = self._messages + 1
        name = self._journal.name(f"{verb} {detail}".strip(), Kind.MESSAGE)
        return self._begin(verb, name, number, frame, peers=peers, timeout=limit)

    @contextmanager
    def performing(
        self, what: str, among: Sequence[int] | None = None, timeout: Timeout = None
    ) -> Iterator[GroupWaiter]:
        """Begin what blocks and is no `Collective`; yield what waits for it.

        Parameters
        ----------
        what : str
            For messages; of a collective the first word is the same on all ranks.
        among : sequence of int, optional
            The ranks that it depends on; all, as a collective, when omitted.
        timeout : float or datetime.timedelta, optional
            Seconds for this operation; the group's when omitted.
        """
        frame = caller(3)
        if among is not None:
            waiter = self._message(what, "", Peers(frozenset(among)), frame, timeout)
        else:
            limit = None if timeout is None else self._seconds(timeout, what)
            number = self._count(what)
            # The rest of what it is differs legitimately, or is compared by itself.
            name = self._journal.name(what, Kind.BLOCKING, alike=what.partition(" ")[0])
            waiter = self._begin(what, name, number, frame, timeout=limit)
        with _Blocking(self, waiter):
            if self._watch.debug and among is None:
                waiter.wait_for(self._backend.compare(waiter.describe()).done)
            yield waiter

    # -- services, and the end -------------------------------------------------------------------

    def service(self, name: str, make: Callable[[], C]) -> C:
        """Return the service of this name, which the first call makes.

        It is driven by `progress`, and closed before the group; collective if making it is.
        """
        if name not in self._services:
            self._services[name] = made = make()
            _SERVICES.append((self.state, made))
        return cast("C", self._services[name])

    def progress(self) -> None:
        """Drive what is under way as far as it can go now; local, never blocks."""
        self.state.progress()
        for service in tuple(self._services.values()):
            service.progress()

    def finish(self) -> BaseException | None:
        """Finish what is under way, and return the first error that was not raised yet."""
        state, failed = self.state, self._close_services()
        while state.outstanding and state.reason is None:
            try:
                next(iter(state.outstanding)).synchronize()
            except Exception as error:  # noqa: BLE001  # raised by `close`, when all are over
                failed = failed or error
        if state.unseen is not None:
            failed, state.unseen = failed or state.unseen.error, None
        if self._backend.device is not None and state.reason is None:
            try:
                with self.performing("close", among=[state.rank]) as waiter:
                    waiter.wait_for(self._backend.device.idle)
            except Exception as error:  # noqa: BLE001  # as above
                failed = failed or error
        return failed

    def _close_services(self) -> BaseException | None:
        failed: BaseException | None = None
        while self._services:
            _, service = self._services.popitem()
            _SERVICES.remove((self.state, service))
            try:
                service.close()
            except Exception as error:  # noqa: BLE001  # raised by `close`, when all are over
                failed = failed or error
        return failed

    def release(self) -> None:
        """Let no operation begin any more, and release the transport."""
        if self.state.reason is None:
            self.state.reason = "it was closed"
            if self._backend.device is not None:
                self._backend.device.close()
            self._backend.close()


class _Blocking:
    """Surrounds what blocks: its record ends with it, or it breaks its group."""

    __slots__ = ("_operations", "_waiter")

    def __init__(self, operations: Operations, waiter: GroupWaiter) -> None:
        self._operations = operations
        self._waiter = waiter

    def __enter__(self) -> GroupWaiter:
        if self._waiter.collective is not None:
            self._operations.inside = get_ident()
        return self._waiter

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        operations, waiter = self._operations, self._waiter
        if waiter.collective is not None:
            operations.inside = 0
        if error is None:
            operations.state.journal.end(waiter.record)
        else:
            operations.fail(error, waiter)


def _in_place(x: Array, op: ReduceOp) -> AllReduce:
    return AllReduce(x, x, op, shape=x.shape)
