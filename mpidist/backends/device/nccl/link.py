"""Ranks that NCCL has connected: their streams, what is under way, and what goes wrong.

The caller computes on the stream that is current, NCCL works on the side stream. An operation
begins behind what is on the current stream when it is called (`SideStream.wait_for_current`), and a
reader of its result puts the current stream behind its event (`NcclWork.order`). The memory of an
array goes back to CuPy's pool as soon as the last reference is dropped, and may be given to the
next computation while NCCL still reads it: so a work holds its arrays until its event has happened.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from functools import cache
from typing import Any

from mpidist._threads import run_in_thread
from mpidist.arrays.namespaces import device_module
from mpidist.backends.device.base import DeviceWork
from mpidist.backends.device.nccl.communicator import (
    DEVICE_FAILED,
    NcclCommunicator,
    translate,
    vendor_errors,
)
from mpidist.backends.work import Waiter
from mpidist.errors import DistributedError, GroupBrokenError, TransportError

_GOODBYE, _ANSWER = 10.0, 1.0
"""Seconds that NCCL gets to end or to release a communicator, and to say whether it is well."""

_ROUND = 0.1
"""Seconds between two looks of the watchdog."""

_SUCCESS, _NOT_READY = 0, 600
"""Codes of ``cudaError_t``."""


class SideStream:
    """The stream of a group on the current device on which NCCL works, and its events.

    Events that have happened, and for which nothing waits any more, are used again (`spare`).
    """

    def __init__(self) -> None:
        cuda = device_module().cuda
        self._cuda = cuda
        self.stream = cuda.Stream(non_blocking=True)
        self.handle: int = self.stream.ptr
        self.current_device: Callable[[], int] = cuda.runtime.getDevice
        self.spare: list[Any] = []
        self._ready = cuda.Event(disable_timing=True)

    def wait_for_current(self) -> None:
        """Make the side stream wait for the work that is on the current stream now."""
        # One event serves all: a wait is for what it recorded when the wait was put there.
        self._ready.record()
        self.stream.wait_event(self._ready)

    def mark(self) -> Any:
        """Return an event behind all that is on the side stream."""
        event = self.spare.pop() if self.spare else self._cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def check(self, event: Any) -> None:
        """Raise CUDARuntimeError if the device has failed, such as by an illegal access.

        An event does not happen then, and its `done` is just False.
        """
        runtime = self._cuda.runtime
        code = runtime.eventQuery(event.ptr)
        if code not in (_SUCCESS, _NOT_READY):
            raise runtime.CUDARuntimeError(code)

    def fence(self) -> Callable[[], bool]:
        """Return a function that says whether the current stream has done its work up to now."""
        event = self._cuda.Event(disable_timing=True)
        event.record()
        return lambda: bool(event.done)


class Link:
    """A communicator, its side stream, and the operations that are on it.

    Attributes
    ----------
    communicator : NcclCommunicator or None
        The communicator of this rank, which the link releases; None when it has been released.
    side : SideStream
        The stream on which its operations are put.
    device : int
        The device of both.
    under_way : list of NcclWork
        Operations not yet known to have ended, in the order of the calls.
    """

    def __init__(self, communicator: NcclCommunicator, side: SideStream, device: int) -> None:
        self.communicator: NcclCommunicator | None = communicator
        self.side = side
        self.device = device
        self.under_way: list[NcclWork] = []
        # What a call of the library is for that has not returned yet, and when it began.
        self._inside: tuple[Callable[[], Waiter], float] | None = None
        self._failure: DistributedError | None = None
        # The watchdog may find an error while a rank does: a communicator is aborted once, and
        # nobody may ask for errors of what another thread is freeing.
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
        except vendor_errors() as problem:
            self.fail(translate(waiter().told, problem))
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

    def release(self, work: NcclWork) -> None:
        """Release a finished operation."""
        self.under_way.remove(work)
        self.side.spare.append(work.event)

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
                waited = time.monotonic() - work.began
                if waited > work.waiter().timeout and not work.reached():
                    self.fail(work.waiter().expire())

    def give_up(self, error: Exception) -> None:
        """Fail because the device does; by the watchdog's thread.

        What has not happened there never will.
        """
        operation = self.under_way[0].waiter().told if self.under_way else "NCCL"
        message = f"{operation}: device {self.device} has failed: {type(error).__name__}: {error}"
        self.fail(TransportError(message, DEVICE_FAILED))

    def look(self, waiter: Callable[[], Waiter]) -> None:
        """Raise what NCCL has found by itself since the communicator was made, if anything.

        The error names the operation of `waiter`.
        """
        problem = None
        if self._asking.acquire(timeout=_ANSWER):
            try:
                communicator = self.communicator  # None if it is being released
                if self._failure is None and communicator is not None:
                    problem = communicator.problem()
            finally:
                self._asking.release()
        if problem is not None:
            message = f"{waiter().told}: {problem}; let this error end the job"
            self.fail(TransportError(message, problem.code))
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
        watchdog().unwatch(self)
        communicator, self.communicator = self.communicator, None
        if communicator is None or self._failure is not None:
            return
        # Only a broken group still has operations under way; some ranks may never call them.
        self._leave(communicator.destroy if self.idle() else communicator.abort)


class NcclWork(DeviceWork):
    """An operation of NCCL under way: over when the device has reached `event`.

    It holds what the device reads and writes until then. `waiter` is called only if something is
    wrong.
    """

    def __init__(
        self, link: Link, event: Any, held: tuple[Any, ...], waiter: Callable[[], Waiter]
    ) -> None:
        self.event = event
        self.waiter = waiter
        self.began = time.monotonic()
        self._link = link
        self._held = held
        self._over = False

    def done(self) -> bool:
        """Return whether the device is done with it."""
        if not self._over:
            self._link.check()
            self._over = bool(self.event.done)
            if self._over:
                self._held = ()
                self._link.release(self)
                if self._then is not None:
                    self._then()
                # What NCCL has given up is over for the device, too.
                self._link.look(self.waiter)
        return self._over

    def reached(self) -> bool:
        """Whether the device is done with it, without any consequences; from any thread."""
        # In this order: when it is over, its event may be another operation's already.
        return bool(self.event.done) or self._over

    def order(self) -> None:
        """Let the current stream go on only behind this operation."""
        self._link.check()
        if not self._over:
            device_module().cuda.get_current_stream().wait_event(self.event)

    def wait(self, timeout: float | None = None) -> None:
        """Order the current stream; the group's waits have the deadline."""
        self.order()


class Watchdog:
    """A thread that looks for errors and missed deadlines; it runs while there is a link to watch.

    Operations on a device run without the host: no thread may be waiting when one fails or hangs.
    This thread ends its communicator then, so that what waits for the device goes on, and the
    group's next operation raises.
    """

    def __init__(self) -> None:
        self._watched: list[Link] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        # What is left when the interpreter ends would be destroyed in no order.
        atexit.register(self._on_exit)

    def watch(self, link: Link) -> None:
        """Watch a link until `unwatch`."""
        with self._changed:
            self._watched.append(link)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="mpidist-nccl-watchdog", daemon=True
                )
                self._thread.start()

    def unwatch(self, link: Link) -> None:
        """Stop watching a link."""
        with self._changed:
            if link in self._watched:
                self._watched.remove(link)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watched:
                    self._thread = None
                    return
                watched = tuple(self._watched)
                self._changed.wait(_ROUND)
            for link in watched:
                try:
                    link.patrol()
                except Exception as error:  # noqa: BLE001  # of a device that has failed
                    # The others still need this thread.
                    self.unwatch(link)
                    link.give_up(error)

    def _on_exit(self) -> None:
        if os.getpid() != self._pid:  # a child that was forked can neither use nor release them
            return
        for link in tuple(self._watched):
            try:
                link.end()
            except Exception as error:  # noqa: BLE001  # of a device that has failed; see `_run`
                sys.stderr.write(f"mpidist: at the exit, NCCL could not be released: {error}\n")


@cache
def watchdog() -> Watchdog:
    """Return the watchdog of this process."""
    return Watchdog()
