"""What streams have been asked to do, run when somebody waits for it."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.nccl_stub.stand_in import devices

__all__ = ["Queue", "any_tickets", "at", "next_pointer", "null", "of_device", "reset"]

Step = Callable[[], object]
"""Part of a queue: it is over unless it returns False; then it is asked again later."""

Position = tuple["Queue", int]
"""How far a queue has run, or shall."""

IDLE_SECONDS = 0.1
"""How long an NCCL call may lie in its queue before the device goes on without being asked.

On a GPU it would run while this rank's host waits for another host, which waits for its result.
"""

_PATROL_SECONDS = 0.025

# Pushing never waits for what runs: whoever pushes may hold locks that a step wants. One lock for
# running all queues, as one may run others.
_PUSHING = threading.RLock()
_RUNNING = threading.RLock()
_pointers = itertools.count(0x5000, 0x10)
_queues: dict[int, Queue] = {}
_null: dict[int, Queue] = {}
_unordered: list[Position] = []  # of calls of NCCL, until they have been tried
_idle: list[_Idle] = []


@dataclass(frozen=True)
class _Entry:
    step: Step
    late: bool = False  # does it depend on others, or read memory when it runs?
    issued: float | None = None  # when it was pushed, if it is a call of NCCL
    behind: Position | None = None  # what it waits for, if that is all it does


def _wait(behind: Position) -> _Entry:
    return _Entry(lambda: behind[0].attempt(behind[1]), late=True, behind=behind)


class Queue:
    """The steps of one stream.

    Parameters
    ----------
    device : int
        Whose stream it is.
    blocking : bool
        Whether it is ordered with the null stream of its device.
    is_null : bool
        Whether it is that one's.
    """

    def __init__(self, device: int, *, blocking: bool, is_null: bool = False) -> None:
        self.device = device
        self.blocking = blocking
        self.is_null = is_null
        self.pointer = 0 if is_null else next_pointer()
        self.pushed = 0
        self.ran = 0
        self._entries: deque[_Entry] = deque()
        self._running = False
        if not is_null:
            _queues[self.pointer] = self

    def push(self, step: Step, *, late: bool = False, ticket: bool = False) -> int:
        """Append a step; return how many have been pushed, this one included.

        Parameters
        ----------
        step : callable
            What to do.
        late : bool
            Whether it depends on other streams, or reads device memory when it runs.
        ticket : bool
            Whether it is a call of NCCL.
        """
        unordered = ticket and not any(entry.behind for entry in list(self._entries))
        issued = time.monotonic() if ticket else None
        position = self._push(_Entry(step, late or ticket, issued))
        if unordered:
            _unordered.append((self, position))
        if ticket:
            _start_device()
        return position

    def end(self) -> int:
        """Return how many steps the next one would be behind, those of other queues included."""
        with _PUSHING:
            return self.push(lambda: None) if self._ordered_before() else self.pushed

    def push_wait(self, behind: Position) -> None:
        """Let the next steps wait until another queue has run so far."""
        self._push(_wait(behind))

    def _push(self, entry: _Entry) -> int:
        with _PUSHING:
            for other in self._ordered_before():
                self._append(_wait((other, other.pushed)))
            self._append(entry)
            return self.pushed

    def _append(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self.pushed += 1

    def _ordered_before(self) -> list[Queue]:
        """Return the queues that the null stream's implicit ordering puts before a new step."""
        if self.is_null:
            return [q for q in list(_queues.values()) if q.blocking and self._is_behind(q)]
        other = null(self.device)
        return [other] if self.blocking and self._is_behind(other) else []

    def _is_behind(self, other: Queue) -> bool:
        return other.device == self.device and other.ran < other.pushed

    @property
    def has_late_steps(self) -> bool:
        return any(entry.late for entry in list(self._entries))

    def tickets(self) -> Iterator[tuple[int, float]]:
        """Yield the position, and the time of issue, of each call of NCCL that has not run."""
        for position, entry in enumerate(list(self._entries), self.ran + 1):
            if entry.issued is not None:
                yield position, entry.issued

    def attempt(self, position: int) -> bool:
        """Run what can be run without waiting, up to `position`; return whether it got there.

        What other queues have to have run goes first, even before steps of this one that it ought
        to wait for and does not: a device is free to do so. And before anything else go calls of
        NCCL that wait for nothing.
        """
        with _RUNNING:
            while _unordered:
                queue, end = _unordered.pop(0)
                queue.attempt(end)
            ahead = itertools.islice(list(self._entries), max(position - self.ran, 0))
            for queue, end in [entry.behind for entry in ahead if entry.behind is not None]:
                if not queue.attempt(end):
                    break
            while self.ran < position and self._run_first():
                pass
            return self.ran >= position

    def _run_first(self) -> bool:
        if self._running:  # a finalizer of anything may ask while a step runs
            return False
        self._running = over = True
        try:
            over = self._entries[0].step() is not False
        finally:  # a step that raises is over, too
            self._running = False
            if over:
                self._entries.popleft()
                self.ran += 1
        return over

    def drive(self, position: int) -> None:
        """Run up to `position`, waiting for whoever has to come first."""
        pause = 20e-6
        while not self.attempt(position):
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)


def _start_device() -> None:
    with _PUSHING:
        if not _idle:
            _idle.append(_Idle())


class _Idle:
    """A thread that runs the calls of NCCL that nobody of this process waits for."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="stand-in-device", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        pause = _PATROL_SECONDS
        while not self._ended.wait(pause):
            overdue = False
            with _RUNNING:
                for queue in list(_queues.values()) + list(_null.values()):
                    for position, since in list(queue.tickets()):
                        if time.monotonic() - since > IDLE_SECONDS and not self._ended.is_set():
                            overdue |= not queue.attempt(position)
            pause = 1e-3 if overdue else _PATROL_SECONDS


def next_pointer() -> int:
    return next(_pointers)


def null(device: int) -> Queue:
    """Return the queue of a device's null stream."""
    with _PUSHING:
        if device not in _null:
            _null[device] = Queue(device, blocking=True, is_null=True)
        return _null[device]


def at(pointer: int) -> Queue:
    """Return the queue of a stream's pointer, as a C library gets it."""
    return _queues[pointer] if pointer else null(devices.current())


def of_device(device: int) -> list[Queue]:
    return [null(device), *(q for q in list(_queues.values()) if q.device == device)]


def any_tickets() -> bool:
    """Whether a call of NCCL has not run, and may still write to where it was told to."""
    everything = list(_queues.values()) + list(_null.values())
    return any(True for queue in everything for _ in queue.tickets())


def reset() -> None:
    """Forget all queues, with what they have not done."""
    while _idle:
        _idle.pop().end()
    with _RUNNING, _PUSHING:
        _queues.clear()
        _null.clear()
        _unordered.clear()
