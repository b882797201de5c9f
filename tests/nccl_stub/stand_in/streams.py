"""Streams and events that do nothing until somebody waits for them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.nccl_stub.stand_in import devices

__all__ = ["Event", "Stream", "current_stream", "drain", "get_elapsed_time", "queue_at", "reset"]

Step = Callable[[], bool]
"""Part of a queue: True if it is over, False to be asked again later."""

_RUNNING = threading.RLock()  # one for all queues, as driving one may drive others
_pointers = itertools.count(0x5000, 0x10)
_queues: dict[int, Queue] = {}
_null: dict[int, Queue] = {}
_local = threading.local()


class Queue:
    """What a stream has been asked to do and has not done.

    Parameters
    ----------
    device : int
        Whose stream it is.
    blocking : bool
        Whether it is ordered with the null stream of its device.
    """

    def __init__(self, device: int, *, blocking: bool, null: bool = False) -> None:
        self.device = device
        self.blocking = blocking
        self.null = null
        self.pointer = 0 if null else next(_pointers)
        self.pushed = 0
        self.ran = 0
        self._steps: deque[Step] = deque()
        if not null:
            _queues[self.pointer] = self

    def push(self, step: Step) -> int:
        """Append a step; return how many have been pushed, this one included."""
        with _RUNNING:
            for other in self._ordered_before():
                self._append(_until(other, other.pushed))
            return self._append(step)

    def _append(self, step: Step) -> int:
        self._steps.append(step)
        self.pushed += 1
        return self.pushed

    def _ordered_before(self) -> list[Queue]:
        """Return the queues that the null stream's implicit ordering puts before a new step."""
        if self.null:
            return [q for q in _queues.values() if self._is_tied_to(q) and q.ran < q.pushed]
        null = null_queue(self.device)
        return [null] if self.blocking and null.ran < null.pushed else []

    def _is_tied_to(self, other: Queue) -> bool:
        return other.blocking and other.device == self.device

    def attempt(self, position: int) -> bool:
        """Run what can be run without waiting, up to `position`; return whether it got there."""
        with _RUNNING:
            while self.ran < position:
                over = True
                try:
                    over = self._steps[0]()
                finally:  # a step that raises is over, too
                    if over:
                        self._steps.popleft()
                        self.ran += 1
                if not over:
                    return False
            return True

    def drive(self, position: int) -> None:
        """Run up to `position`, waiting for whoever has to come first."""
        pause = 20e-6
        while not self.attempt(position):
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)


def _until(queue: Queue, position: int) -> Step:
    return lambda: queue.attempt(position)


def once(fn: Callable[[], Any]) -> Step:
    """Return the step that calls `fn` and is over."""

    def step() -> bool:
        fn()
        return True

    return step


def null_queue(device: int) -> Queue:
    with _RUNNING:
        if device not in _null:
            _null[device] = Queue(device, blocking=True, null=True)
        return _null[device]


def queue_at(pointer: int) -> Queue:
    """Return the queue of a stream's pointer, as a C library gets it."""
    return _queues[pointer] if pointer else null_queue(devices.current())


def queues_of(device: int) -> list[Queue]:
    return [null_queue(device), *(q for q in _queues.values() if q.device == device)]


def reset() -> None:
    """Forget all streams, with what they have not done."""
    with _RUNNING:
        _queues.clear()
        _null.clear()
    vars(_local).clear()


class Event:
    """cupy.cuda.Event."""

    def __init__(
        self, block: bool = False, disable_timing: bool = False, interprocess: bool = False
    ) -> None:
        self.ptr = next(_pointers)
        self.timed = not disable_timing
        self._at: tuple[Queue, int] | None = None
        self.ran_at = [0.0]

    def record(self, stream: Stream | None = None) -> None:
        queue = (stream or current_stream()).queue
        ran_at = self.ran_at = [0.0]

        def note() -> None:
            ran_at[0] = time.perf_counter()

        self._at = queue, queue.push(once(note))

    @property
    def done(self) -> bool:
        return self._at is None or self._at[0].attempt(self._at[1])

    def synchronize(self) -> None:
        if self._at is not None:
            self._at[0].drive(self._at[1])

    def recorded(self) -> tuple[Queue, int] | None:
        return self._at


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Return the milliseconds between the moments at which two events were reached."""
    for event in (start_event, end_event):
        if not event.timed:
            raise devices.CUDARuntimeError("cudaErrorInvalidResourceHandle: no timing")
        if not event.done:
            raise devices.CUDARuntimeError("cudaErrorNotReady: device not ready")
    return (end_event.ran_at[0] - start_event.ran_at[0]) * 1e3


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
        self._queue = None if null else Queue(devices.current(), blocking=not non_blocking)
        self._before: list[Stream] = []

    @property
    def queue(self) -> Queue:
        return null_queue(devices.current()) if self._queue is None else self._queue

    @property
    def device_id(self) -> int:
        return -1 if self._queue is None else self._queue.device

    @property
    def ptr(self) -> int:
        return self.queue.pointer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.queue is other.queue

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def __enter__(self) -> Stream:
        self._before.append(current_stream())
        return self.use()

    def __exit__(self, *_: object) -> None:
        self._before.pop().use()

    def use(self) -> Stream:
        device = devices.current()
        if self.device_id not in (-1, device):
            raise RuntimeError(
                f"this stream is of device {self.device_id}, the current device is {device}"
            )
        _streams_of_thread()[device] = self
        return self

    def synchronize(self) -> None:
        self.queue.drive(self._end())

    @property
    def done(self) -> bool:
        return self.queue.attempt(self._end())

    def _end(self) -> int:
        # Waiting for the null stream is waiting for all blocking streams, too.
        queue = self.queue
        return queue.push(lambda: True) if queue.null else queue.pushed

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        recorded = event.recorded()
        if recorded is not None:
            self.queue.push(_until(*recorded))

    def launch_host_func(self, callback: Callable[[Any], Any], arg: Any) -> None:
        self.queue.push(once(lambda: callback(arg)))


Stream.null = Stream(null=True)


def _streams_of_thread() -> dict[int, Stream]:
    streams: dict[int, Stream] = vars(_local).setdefault("streams", {})
    return streams


def current_stream(device_id: int | None = None) -> Stream:
    """cupy.cuda.get_current_stream."""
    device = devices.current() if device_id is None else device_id
    return _streams_of_thread().get(device, Stream.null)


def drain() -> Queue:
    """Run all that the current stream was asked for, and return its queue."""
    stream = current_stream()
    stream.synchronize()
    return stream.queue
