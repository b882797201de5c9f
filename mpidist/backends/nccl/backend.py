"""NCCL between the ranks of a group: the verbs on device arrays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from mpidist._types import Array, ReduceOp
from mpidist.arrays import device_module
from mpidist.backends.base import Backend, Capabilities
from mpidist.backends.device import DeviceBackend
from mpidist.backends.nccl import calls
from mpidist.backends.nccl.communicator import NcclCommunicator
from mpidist.backends.nccl.dtypes import REDUCTIONS
from mpidist.backends.nccl.identity import check_devices, gather_facts, own_facts
from mpidist.backends.nccl.plans import Operation, Plans
from mpidist.backends.nccl.streams import Side
from mpidist.backends.nccl.unique_id import NcclUniqueId
from mpidist.backends.nccl.watchdog import watchdog
from mpidist.backends.nccl.work import NcclWork
from mpidist.backends.work import Message, Waiter
from mpidist.errors import (
    DistributedError,
    GroupBrokenError,
    TransportError,
    UnsupportedOperationError,
)

__all__ = ["NcclBackend"]

T = TypeVar("T")

_GOODBYE = 10.0
"""Seconds that NCCL gets to end or to release a communicator."""


def _begin_all(operations: Sequence[Operation], communicator: NcclCommunicator) -> None:
    """Make the calls of operations; several begin as one."""
    if len(operations) == 1 and not operations[0].several:
        operations[0].call(communicator)
        return
    with communicator.together():
        for operation in operations:
            operation.call(communicator)


class NcclBackend(DeviceBackend):
    """Device arrays of one group over NCCL.

    The first operation connects the ranks, on the device that is current then.

    Parameters
    ----------
    host : Backend
        The transport of host arrays between the same ranks.
    """

    name = "nccl"

    def __init__(self, host: Backend) -> None:
        super().__init__()
        self.rank, self.size = host.rank, host.size
        self.capabilities = Capabilities(
            reductions=REDUCTIONS,
            max_tag=0,
            any_source=False,
            unknown_shapes=False,
            halves_rounded_once=False,
        )
        self._host = host
        self._plans = Plans(host.rank)
        self._communicator: NcclCommunicator | None = None
        self._side: Side | None = None
        self._device = -1
        self.under_way: list[NcclWork] = []
        # What a call of the library is for that has not returned yet, and when it began.
        self._inside: tuple[Callable[[], Waiter], float] | None = None
        self._failure: DistributedError | None = None
        # The watchdog may find an error while a rank does: a communicator is aborted once.
        self._failing = threading.Lock()

    @property
    def chosen(self) -> int | None:
        """The device on which the ranks were connected; None before that."""
        return None if self._communicator is None else self._device

    # -- connecting ----------------------------------------------------------------------------

    def prepare(self, waiter: Waiter) -> None:
        """Connect the ranks, the first time; see `DeviceBackend.prepare`.

        Raises
        ------
        LaunchError
            If two ranks use one device.
        BackendUnavailableError
            If they have different releases of NCCL.
        CollectiveTimeoutError
            If they are not connected within the group's timeout.
        TransportError
            If NCCL fails on this rank.
        """
        if self._communicator is not None:
            return
        facts = gather_facts(own_facts(self._host.node()), self._host, waiter)
        check_devices(facts)
        unique_id = NcclUniqueId.share(self._host, waiter)
        device: int = device_module().cuda.Device().id
        stream = self._open(device)
        made = self._beside(
            lambda: NcclCommunicator(self.size, self.rank, unique_id, device, stream), waiter
        )
        self._connected(made)

    def _open(self, device: int) -> int:
        """Make the side stream on a device, and return its handle."""
        self._device = device
        with device_module().cuda.Device(device):
            self._side = Side()
        return self._side.handle

    def _connected(self, communicator: NcclCommunicator) -> None:
        self._communicator = communicator
        watchdog().watch(self)

    def _beside(self, function: Callable[[], T], waiter: Waiter) -> T:
        """Call what may block in the library from a thread, and wait for it with a deadline."""
        result: list[T] = []
        error: list[BaseException] = []
        device = self._device

        def call() -> None:
            try:
                device_module().cuda.Device(device).use()
                result.append(function())
            except BaseException as problem:  # noqa: BLE001  # raised below, in the caller's thread
                error.append(problem)

        # A daemon: where the library never comes back, the process has to end all the same.
        thread = threading.Thread(target=call, name="mpidist-nccl", daemon=True)
        thread.start()
        waiter.wait_for(lambda: not thread.is_alive())
        for problem in error:
            if isinstance(problem, TransportError):
                raise TransportError(f"{waiter.told}: {problem}", problem.code) from problem
            raise problem
        return result[0]

    def split(
        self, color: int | None, key: int, host: Backend | None, waiter: Waiter
    ) -> NcclBackend | None:
        """Make the transport of a new group; see `DeviceBackend.split`.

        Where the ranks are connected and NCCL can, the new communicators come of this one; else
        they are connected when they are used first.
        """
        child = None if host is None else NcclBackend(host)
        communicator = self._communicator
        if communicator is None or not calls.can_split():
            return child
        # The library wants nothing to be outstanding on the parent.
        waiter.wait_for(self.idle)
        stream = 0 if child is None else child._open(self._device)
        made = self._beside(lambda: communicator.split(color, key, stream), waiter)
        if child is not None and made is not None:
            child._connected(made)
        return child

    def create(self, host: Backend) -> NcclBackend:
        """Make the transport of some ranks; it is connected when it is used first."""
        return NcclBackend(host)

    # -- operations ----------------------------------------------------------------------------

    def begin(self, verb: str, args: tuple[Any, ...], waiter: Waiter) -> NcclWork:
        """Start a collective; see `DeviceBackend.begin`."""
        pairs = args if verb == "together" else ((verb, args),)
        operations = [getattr(self._plans, each)(*some) for each, some in pairs]
        return self._perform(operations, args, waiter)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], waiter: Waiter
    ) -> NcclWork:
        """Start several messages; see `DeviceBackend.exchange`."""
        if self._communicator is None:
            raise UnsupportedOperationError(
                f"{waiter.operation}: messages of device arrays need the ranks to be connected, "
                "which takes all of them: let all perform a collective on a device array of this "
                "group first, such as all_reduce(cupy.zeros(1), group)"
            )
        return self._perform([self._plans.messages(sends, receives)], (sends, receives), waiter)

    def _perform(
        self, operations: Sequence[Operation], held: tuple[Any, ...], waiter: Waiter
    ) -> NcclWork:
        """Put operations on the side stream, behind the current one."""
        communicator, side = self._communicator, self._side
        assert communicator is not None, "prepared before"
        assert side is not None, "made with it"
        self._call(lambda: waiter, _begin_all, operations, communicator)
        for operation in operations:
            if operation.after is not None:
                with side.stream:
                    operation.after()
        return self._hold((held, operations), lambda: waiter)

    def _hold(self, held: tuple[Any, ...], waiter: Callable[[], Waiter]) -> NcclWork:
        """Return what has just been put on the side stream as a work, and hold it."""
        assert self._side is not None, "something is on it"
        work = NcclWork(self, self._side.mark(), held, waiter)
        # Nobody may ever wait for those: two for each that begins, so they do not pile up.
        for earlier in self.under_way[:2]:
            earlier.done()
        self.under_way.append(work)
        return work

    def repeat_sum(self, x: Array, op: ReduceOp, waiter: Callable[[], Waiter]) -> NcclWork | None:
        """Begin an all_reduce in place if its array needs no preparation; else do nothing.

        The shortest way to the library: a plan and its checks take longer than a small sum.
        """
        if self._communicator is None or self._side is None:
            return None
        wire = self._plans.direct_sum(x, op)
        lies: int = x.data.device_id  # type: ignore[attr-defined]  # cupy's
        if wire is None or not lies == self._device == self._side.current_device():
            return None
        self._call(waiter, self._communicator.all_reduce, x, x, wire, op)
        return self._hold((x,), waiter)

    def _call(self, waiter: Callable[[], Waiter], call: Callable[..., None], *args: Any) -> None:
        """Make calls of the library behind what is on the current stream.

        Mostly they return at once. But the library connects two ranks when they first have
        something for each other, and waits in the call for both to come: the watchdog ends that.
        """
        assert self._side is not None, "made with the communicator"
        self.check()
        self._side.follow()
        self._inside = (waiter, time.monotonic())
        try:
            call(*args)
        except calls.vendor_errors() as problem:
            self.fail(calls.translate(waiter().told, problem))
            # The watchdog may have ended the call, and its error says why.
            assert self._failure is not None, "by now"
            raise self._failure from problem
        finally:
            self._inside = None

    def idle(self) -> bool:
        """Let go of what is over; return whether nothing is under way."""
        while self.under_way and self.under_way[0].done():
            pass
        return not self.under_way

    def fence(self) -> Callable[[], bool]:
        """Return what tells whether the current stream has come to here."""
        side = self._side
        return (lambda: True) if side is None else side.fence()

    def release(self, work: NcclWork, event: Any) -> None:
        """Forget an operation that is over."""
        self.under_way.remove(work)
        if self._side is not None:
            self._side.take_back(event)

    # -- failures ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what has ended the communicator, if anything has."""
        if self._failure is not None:
            raise self._failure

    def abandon(self, error: BaseException) -> None:
        """End what is under way; see `DeviceBackend.abandon`."""
        if self.under_way:
            if not isinstance(error, DistributedError):
                error = GroupBrokenError(f"an error has broken the group: {error}")
            self.fail(error)

    def fail(self, error: DistributedError) -> None:
        """End all that is under way; every operation raises this error from now on."""
        with self._failing:
            if self._failure is not None:
                return
            self._failure = error
        if self._communicator is not None:
            self._leave(self._communicator.abort)

    def _leave(self, call: Callable[[], None]) -> None:
        """Make a communicator's last call, and go on after a while if it does not return.

        Some releases of NCCL wait there for the other ranks of the node, or for their own threads.
        """

        def leave() -> None:
            # A device that has failed says so again, and whoever uses it knows.
            with suppress(Exception):
                # Without this the first call of CUDA in a thread would open a context on device 0.
                device_module().cuda.Device(self._device).use()
                call()

        thread = threading.Thread(target=leave, name="mpidist-nccl", daemon=True)
        thread.start()
        thread.join(_GOODBYE)

    def patrol(self) -> None:
        """Look for errors that NCCL reports, and for missed deadlines; by the watchdog's thread."""
        side, under_way = self._side, tuple(self.under_way)
        if side is None or self._communicator is None or self._failure is not None:
            return
        device_module().cuda.Device(self._device).use()  # as in `_leave`
        inside = self._inside
        if inside is not None and time.monotonic() - inside[1] > inside[0]().timeout:
            self.fail(inside[0]().expire())
        elif under_way:
            # Those that the device is done with wait for somebody to see it, who may be waiting
            # for the device.
            work = next((each for each in under_way if not each.reached()), under_way[0])
            try:
                self.look(work.waiter)
            except DistributedError as error:
                work.waiter().report(str(error))
            else:
                side.check(work.event)
                if work.overdue() and not work.reached():
                    self.fail(work.waiter().expire())

    def give_up(self, error: Exception) -> None:
        """Fail because the device does; by the watchdog's thread.

        What has not happened there never will.
        """
        told = self.under_way[0].waiter().told if self.under_way else "NCCL"
        words = f"{told}: device {self._device} has failed: {type(error).__name__}: {error}"
        self.fail(TransportError(words, calls.DEVICE_FAILED))

    def look(self, waiter: Callable[[], Waiter]) -> None:
        """Raise what NCCL has found by itself since the communicator was made, if anything.

        Parameters
        ----------
        waiter : callable
            Returns that of the operation which this concerns.
        """
        problem = None if self._communicator is None else self._communicator.problem()
        if problem is not None:
            told = f"{waiter().told}: {problem}; let this error end the job"
            self.fail(TransportError(told, problem.code))
        self.check()

    def end(self) -> None:
        """Release the communicator as the process ends, whatever is under way.

        Others may need this rank's part of it, so it gets the rest of its time.
        """
        waiter = self.under_way[-1].waiter() if self.under_way else None
        if waiter is not None and not waiter.hopeless:
            # A missed deadline has been reported then, and the group is broken.
            with suppress(DistributedError):
                waiter.wait_for(self.idle)
        self.close()

    def close(self) -> None:
        """Release the communicator; nothing is under way any more."""
        watchdog().forget(self)
        communicator, self._communicator = self._communicator, None
        if communicator is None or self._failure is not None:
            return
        # What is under way is a broken group's, and others may not even come to it.
        self._leave(communicator.destroy if self.idle() else communicator.abort)
