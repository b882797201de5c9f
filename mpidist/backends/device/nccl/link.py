"""Ranks that NCCL has connected: what is under way between them, and what goes wrong with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from typing import Any

from mpidist._threads import run_in_thread
from mpidist.arrays.namespaces import device_module
from mpidist.backends.device.base import DeviceWork
from mpidist.backends.device.nccl import calls
from mpidist.backends.device.nccl.communicator import NcclCommunicator
from mpidist.backends.device.nccl.streams import Side, order_behind
from mpidist.backends.device.nccl.watchdog import watchdog
from mpidist.backends.work import Waiter
from mpidist.errors import DistributedError, GroupBrokenError, TransportError

__all__ = ["Link", "NcclWork"]

_GOODBYE, _ANSWER = 10.0, 1.0
"""Seconds that NCCL gets to end or to release a communicator, and to say whether it is well."""


class Link:
    """A communicator, its side stream, and the operations that are on it.

    Parameters
    ----------
    communicator : NcclCommunicator
        Of this rank; the link releases it.
    side : Side
        The stream on which its operations are put.
    device : int
        Where both are.

    Attributes
    ----------
    communicator, side, device
        As given; the communicator is None when it has been released.
    under_way : list of NcclWork
        Operations not yet known to have ended, in the order of the calls.
    """

    def __init__(self, communicator: NcclCommunicator, side: Side, device: int) -> None:
        self.communicator: NcclCommunicator | None = communicator
        self.side = side
        self.device = device
        self.under_way: list[NcclWork] = []
        # What a call of the library is for that has not returned yet, and when it began.
        self._inside: tuple[Callable[[], Waiter], float] | None = None
        self._failure: DistributedError | None = None
        # The watchdog may find an error while a rank does: a communicator is aborted once, and
        # asked for errors only as long as it is there.
        self._failing = threading.Lock()
        self._asking = threading.Lock()
        watchdog().watch(self)

    # -- operations ----------------------------------------------------------------------------

    def call(self, waiter: Callable[[], Waiter], call: Callable[..., None], *args: Any) -> None:
        """Make calls of the library behind what is on the current stream.

        Mostly they return at once. But the library connects two ranks when they first have
        something for each other, and waits in the call for both to come: the watchdog ends that.
        """
        self.check()
        self.side.wait_for_current()
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

    def hold(self, held: tuple[Any, ...], waiter: Callable[[], Waiter]) -> NcclWork:
        """Return what has just been put on the side stream as a work, and hold it."""
        work = NcclWork(self, self.side.mark(), held, waiter)
        # Nobody may ever wait for those: two for each that begins, so they do not pile up.
        for earlier in self.under_way[:2]:
            earlier.done()
        self.under_way.append(work)
        return work

    def idle(self) -> bool:
        """Release finished operations; return whether none is pending."""
        while self.under_way and self.under_way[0].done():
            pass
        return not self.under_way

    def release(self, work: NcclWork, event: Any) -> None:
        """Release a finished operation."""
        self.under_way.remove(work)
        self.side.take_back(event)

    # -- failures ------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what has ended the communicator, if anything has."""
        if self._failure is not None:
            raise self._failure

    def abandon(self, error: BaseException) -> None:
        """End what is under way: the group is broken, by this error."""
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
        if self.communicator is not None:
            self._leave(self.communicator.abort)

    def _leave(self, call: Callable[[], None]) -> None:
        """Make a communicator's last call, and go on after a while if it does not return.

        Some releases of NCCL wait there for the other ranks of the node, or for their own threads.
        A device that has failed says so again: nobody looks at the result.
        """

        def leave() -> None:
            # Without this the first call of CUDA in a thread would open a context on device 0.
            device_module().cuda.Device(self.device).use()
            with self._asking:
                call()

        wait([run_in_thread(leave, name="mpidist-nccl")], _GOODBYE)

    def patrol(self) -> None:
        """Look for errors that NCCL reports, and for missed deadlines; by the watchdog's thread."""
        under_way = tuple(self.under_way)
        if self.communicator is None or self._failure is not None:
            return
        device_module().cuda.Device(self.device).use()  # as in `_leave`
        inside = self._inside
        if inside is not None and time.monotonic() - inside[1] > inside[0]().timeout:
            self.fail(inside[0]().expire())
        elif under_way:
            # An operation that the device has finished stays in the list until the host polls it,
            # and the host may be blocked on the device.
            work = next((work for work in under_way if not work.reached()), under_way[0])
            try:
                self.look(work.waiter)
            except DistributedError as error:
                work.waiter().report(str(error))
            else:
                self.side.check(work.event)
                if work.overdue() and not work.reached():
                    self.fail(work.waiter().expire())

    def give_up(self, error: Exception) -> None:
        """Fail because the device does; by the watchdog's thread.

        What has not happened there never will.
        """
        operation = self.under_way[0].waiter().told if self.under_way else "NCCL"
        message = f"{operation}: device {self.device} has failed: {type(error).__name__}: {error}"
        self.fail(TransportError(message, calls.DEVICE_FAILED))

    def look(self, waiter: Callable[[], Waiter]) -> None:
        """Raise what NCCL has found by itself since the communicator was made, if anything.

        Parameters
        ----------
        waiter : callable
            Returns that of the operation which this concerns.
        """
        problem = self._problem()
        if problem is not None:
            message = f"{waiter().told}: {problem}; let this error end the job"
            self.fail(TransportError(message, problem.code))
        self.check()

    def _problem(self) -> TransportError | None:
        """Ask NCCL what it has found; None, too, of a communicator that is being released."""
        if not self._asking.acquire(timeout=_ANSWER):
            return None
        try:
            communicator = None if self._failure is not None else self.communicator
            return None if communicator is None else communicator.problem()
        finally:
            self._asking.release()

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
        watchdog().unwatch(self)
        communicator, self.communicator = self.communicator, None
        if communicator is None or self._failure is not None:
            return
        # Only a broken group still has operations under way; some ranks may never call them.
        self._leave(communicator.destroy if self.idle() else communicator.abort)


class NcclWork(DeviceWork):
    """An operation of NCCL under way.

    Parameters
    ----------
    link : Link
        The connection of the ranks that perform it.
    event : cupy.cuda.Event
        Recorded behind it.
    held : tuple
        The arrays that it reads and writes.
    waiter : callable
        Returns what waits for it; called only if something is wrong.
    """

    def __init__(
        self, link: Link, event: Any, held: tuple[Any, ...], waiter: Callable[[], Waiter]
    ) -> None:
        self.event = event
        self.waiter = waiter
        self._began = time.monotonic()
        self._link = link
        self._held = held
        self._over = False
        self._then: Callable[[], None] | None = None

    def when_over(self, then: Callable[[], None]) -> None:
        """Call this when it is seen to be over."""
        self._then = then

    def done(self) -> bool:
        """Return whether the device is done with it."""
        if not self._over:
            self._link.check()
            self._over = bool(self.event.done)
            if self._over:
                self._held = ()
                self._link.release(self, self.event)
                if self._then is not None:
                    self._then()
                # What NCCL has given up is over for the device, too.
                self._link.look(self.waiter)
        return self._over

    def reached(self) -> bool:
        """Whether the device is done with it, without any consequences; from any thread."""
        # In this order: when it is over, its event may be another operation's already.
        return bool(self.event.done) or self._over

    def overdue(self) -> bool:
        """Whether its deadline is over; from any thread."""
        return time.monotonic() - self._began > self.waiter().timeout

    def order(self) -> None:
        """Let the current stream go on only behind this operation."""
        self._link.check()
        if not self._over:
            order_behind(self.event)

    def wait(self, timeout: float | None = None) -> None:
        """Order the current stream; groups bring the deadline."""
        self.order()
