"""End this process at a deadline, even where its interpreter cannot: as MPI starts, and at the end.

No thread of Python runs while mpi4py starts MPI, since it holds the interpreter lock, or once the
interpreter is being finalised. So this is done by timers of the operating system
(``timer_create``), each of which calls a function of the C library in a native thread. A process
may have many of them, so that alarms and ``faulthandler`` timers of the program are not touched,
and a child that is forked inherits none.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

_SIGNAL, _THREAD = 0, 2
"""What a timer does, as <signal.h> has it: SIGEV_SIGNAL, SIGEV_THREAD."""

_SIGNAL_AFTER, _END_AFTER = 0.2, 0.3
"""Seconds from the message to the signal, and to the end of the process."""

_LONGEST = 1e9
"""Seconds; no deadline is longer."""

_EXIT_CODE = 1


class _Value(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("pointer", ctypes.c_void_p))


class _Event(ctypes.Structure):
    """``struct sigevent``, which has 64 bytes."""

    _fields_ = (
        ("value", _Value),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 40),
    )


class _Times(ctypes.Structure):
    """``struct itimerspec``: the period, and the time until the timer expires."""

    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("every", "every_ns", "seconds", "nanoseconds")
    )


class ProcessDeadline:
    """A time, so many seconds from now, at which this process says why, and ends with code 1.

    After the message the process gets `signal`, if there is one; a handler of it in C can say more.
    Where the C library has no such timers nothing happens at the deadline.
    """

    def __init__(self, seconds: float, message: str, signal: int | None = None) -> None:
        self._timers: list[tuple[Any, float]] = []
        try:
            self._libc = libc = ctypes.CDLL(None)
            # A copy that is never freed: the thread of a timer may still read it after `cancel`.
            libc.strdup.restype = ctypes.c_void_p
            text = libc.strdup(message.replace("%", "%%").encode())
            self._add(0.0, _THREAD, function=libc.warnx, value=_Value(pointer=text))
            if signal is not None:
                self._add(_SIGNAL_AFTER, _SIGNAL, signal=signal)
            self._add(_END_AFTER, _THREAD, function=libc._exit, value=_Value(number=_EXIT_CODE))
        except (AttributeError, OSError):
            self.cancel()
        self.start(seconds)

    def _add(self, delay: float, notify: int, *, signal: int = 0, **action: Any) -> None:
        """Make a timer that expires so many seconds after the deadline."""
        event, timer = _Event(signal=signal, notify=notify), ctypes.c_void_p()
        if action:
            event.value = action["value"]
            event.function = ctypes.cast(action["function"], ctypes.c_void_p)
        if self._libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
            raise OSError("timer_create")
        self._timers.append((timer, delay))

    def start(self, seconds: float) -> None:
        """Set the deadline to so many seconds from now."""
        for start in self._starts(self._timers, seconds):
            start()

    def _starts(
        self, timers: Sequence[tuple[Any, float]], seconds: float
    ) -> list[Callable[[], object]]:
        """Return calls that start the timers without any module: at the very end there are none."""
        starts: list[Callable[[], object]] = []
        for timer, delay in timers:
            full_seconds, part = divmod(min(max(seconds, 0.001), _LONGEST) + delay, 1.0)
            times = _Times(seconds=int(full_seconds), nanoseconds=int(part * 1e9))
            starts.append(partial(self._libc.timer_settime, timer, 0, ctypes.byref(times), None))
        return starts

    def start_anew_at_finalization(self, seconds: float) -> None:
        """Set the deadline anew, without the signal, when the interpreter has ended all but MPI.

        It is so many seconds from then.
        """
        if not self._timers:
            return
        message, *signal, end = self._timers
        actions = self._starts([message, end], seconds)
        actions += [partial(self._libc.timer_delete, timer) for timer, _ in signal]
        # The interpreter deletes the attributes of sys last.
        vars(sys)["_mpidist_last"] = _Last(actions)

    def cancel(self) -> None:
        """Let nothing happen at the deadline."""
        while self._timers:
            self._libc.timer_delete(self._timers.pop()[0])


class _Last:
    """Calls functions, in this order, when it is deleted."""

    def __init__(self, actions: Sequence[Callable[[], object]]) -> None:
        self._actions = actions

    def __del__(self) -> None:
        for action in self._actions:
            action()


_STUCK_INTERPRETER = 2.0
"""Seconds after the helper thread's deadline at which the process ends without that thread."""

_FINALIZING = 6.0
"""Seconds after that deadline for a rank that waits for the others in MPI_Finalize."""


def limit_loading(rank: int, size: int | None, timeout: float) -> ProcessDeadline:
    """Return a deadline in `timeout` seconds for the start of MPI, in which the ranks wait.

    `rank` and `size` are the launcher's; where it does not say, the size is None.
    """
    ranks = f"rank {rank}" if size is None else f"rank {rank} of {size}"
    return ProcessDeadline(
        timeout,
        f"[world {rank}/{'?' if size is None else size}] mpidist: this rank has waited {timeout:g} "
        f"s in mpidist.init for MPI to start; ending the job. It is {ranks}, "
        f"{os.uname().nodename}:{os.getpid()}. MPI starts when all ranks have called init, and "
        "another one has not: look for its traceback in the output of the job (an import that "
        "fails, sys.exit), or for a process that is stopped or still at work before init (ps -o "
        "pid,stat,etime,args). If it only needs longer: init(timeout=...)",
    )


def limit_finalization(name: str, timeout: float, *, stacks: bool) -> None:
    """Give what follows this rank's exit handler, up to MPI_Finalize, `timeout` seconds.

    First come the exit handlers that were registered before `init`, which the helper thread watches
    as long as it can, then finalisers, and MPI_Finalize, which waits for the other ranks. A rank
    that is in the last does not keep the others waiting, so its deadline is later than theirs.

    If SIGUSR2 is free (`stacks`), it writes the stack without the interpreter from now on. `name`
    is this rank's, for messages.
    """
    if stacks:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)  # or the interpreter does so at its end
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=False)
    seconds = timeout + _STUCK_INTERPRETER
    message = (
        f"{name} mpidist: this rank has left, and its process has not ended for {seconds:g} s: a "
        "finaliser (__del__), an exit handler that was registered before mpidist.init, or "
        "MPI_Finalize does not return; ending the job. Where it is, if in Python:"
    )
    deadline = ProcessDeadline(seconds, message, signal.SIGUSR2 if stacks else None)
    deadline.start_anew_at_finalization(timeout + _FINALIZING)


def main_stack() -> str:
    """Return the stack of the main thread as in a traceback; begins with a colon."""
    number = threading.main_thread().ident
    frame = None if number is None else sys._current_frames().get(number)
    return "" if frame is None else ":\n" + "".join(traceback.format_stack(frame)).rstrip()
