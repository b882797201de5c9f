"""cupy.cuda's streams and events, which do nothing until somebody waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from tests.nccl_stub.stand_in import devices, queues
from tests.nccl_stub.stand_in.queues import Queue

__all__ = ["Event", "Stream", "current_stream", "event_query", "get_elapsed_time", "reset"]


_events: WeakValueDictionary[int, Event] = WeakValueDictionary()


def event_query(event: int) -> int:
    """Return cudaSuccess or cudaErrorNotReady for the pointer of an event."""
    return 0 if _events[event].done else 600


class Event:
    """cupy.cuda.Event."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr = queues.next_pointer()
        _events[self.ptr] = self
        self._timed = not disable_timing
        self._device = devices.current()
        self._at: tuple[Queue, int] | None = None
        self._ran_at = [0.0]

    def record(self, stream: Stream | None = None) -> None:
        queue = (stream or current_stream()).queue
        if queue.device != self._device:
            raise devices.CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid handle")
        ran_at = self._ran_at = [0.0]

        def note() -> None:
            ran_at[0] = time.perf_counter()

        self._at = queue, queue.push(note)

    @property
    def done(self) -> bool:
        return self._at is None or self._at[0].attempt(self._at[1])

    def synchronize(self) -> None:
        if self._at is not None:
            self._at[0].drive(self._at[1])

    def make_wait(self, queue: Queue) -> None:
        """Let the next steps of a queue wait for the last record; there may be none."""
        if self._at is not None:
            queue.push_wait(self._at)

    def time(self) -> float:
        """Return when it was reached, in seconds."""
        if not self._timed or self._at is None:
            raise devices.CUDARuntimeError("cudaErrorInvalidResourceHandle: no timing")
        if not self.done:
            raise devices.CUDARuntimeError("cudaErrorNotReady: device not ready")
        return self._ran_at[0]


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return the milliseconds between the moments at which two events were reached."""
    return (end_event.time() - start_event.time()) * 1e3


class Stream:
    """cupy.cuda.Stream."""

    null: Stream

    def __init__(
        self,
        null: bool = False,
        non_blocking: bool = False,
        ptds: bool = False,
        *,
        priority: int | None = None,
    ) -> None:
        if ptds:
            raise NotImplementedError("the stand-in has no per-thread default streams")
        self.is_non_blocking = non_blocking
        self.priority = priority or 0
        # The null stream is that of whatever device is current.
        self._queue = None if null else Queue(devices.usable(), blocking=not non_blocking)
        self.ptr = 0 if self._queue is None else self._queue.pointer
        self.device_id = -1 if self._queue is None else self._queue.device

    @property
    def queue(self) -> Queue:
        return queues.null(devices.current()) if self._queue is None else self._queue

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __repr__(self) -> str:
        return f"<Stream {self.ptr} (device {self.device_id})>"

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> Stream:
        device = self._check_device()
        _of_thread().entered.append(device)
        _of_thread().stack(device).append(self)
        _of_thread().current[device] = self
        return self

    def __exit__(self, *_: object) -> None:
        device = _of_thread().entered.pop()
        stack = _of_thread().stack(device)
        stack.pop()
        _of_thread().current[device] = stack[-1]  # as CuPy: not what `use` had chosen before

    def use(self) -> Stream:
        _of_thread().current[self._check_device()] = self
        return self

    def _check_device(self) -> int:
        device = devices.current()
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match "
                f"with the current device ({device})"
            )
        return device

    def synchronize(self) -> None:
        queue = self.queue
        queue.drive(queue.end())

    @property
    def done(self) -> bool:
        queue = self.queue
        return queue.attempt(queue.end())

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.make_wait(self.queue)

    def launch_host_func(self, callback: Callable[[Any], Any], arg: Any) -> None:
        def call() -> None:
            callback(arg)

        self.queue.push(call)


Stream.null = Stream(null=True)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.current: dict[int, Stream] = {}
        self.entered: list[int] = []
        self._stacks: dict[int, list[Stream]] = {}

    def stack(self, device: int) -> list[Stream]:
        return self._stacks.setdefault(device, [Stream.null])


_threads = [_OfThread()]


def _of_thread() -> _OfThread:
    return _threads[0]


def reset() -> None:
    """Make the null stream current in all threads."""
    _threads[:] = [_OfThread()]


def current_stream(device_id: int = -1) -> Stream:
    """cupy.cuda.get_current_stream."""
    device = devices.current() if device_id == -1 else device_id
    return _of_thread().current.get(device, Stream.null)
