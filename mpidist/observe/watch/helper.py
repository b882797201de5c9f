"""The helper thread of a process: it answers other ranks while the main thread is in a library.

A Python signal handler runs when the main thread returns to Python, which may be never if it is in
an MPI call. But the interpreter writes the signal's number to a descriptor at once
(`signal.set_wakeup_fd`), and this thread waits for that. It calls no MPI.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable, Sequence

from mpidist._threads import act_in_thread
from mpidist.observe.watch.watch import Watch

_ROUND = 0.2
"""Seconds between two rounds of the thread."""


class Helper:
    """Serves the watches of one process; calls what is in `rounds` five times a second."""

    def __init__(self) -> None:
        self.rounds: list[Callable[[], None]] = []
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._adding, self._reporting = threading.Lock(), threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._next_wakeup = -1
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._drop_files)
        threading.Thread(target=self._run, name="mpidist-helper", daemon=True).start()

    def is_of_this_process(self) -> bool:
        """Whether its thread runs in this process, which may have been forked since."""
        return os.getpid() == self._pid

    def serve(self, watch: Watch, nodes: Sequence[int]) -> None:
        """Answer for the watch of a world, as long as somebody else holds it.

        `nodes` has the node of each of its ranks.
        """
        watch.listen(nodes)
        with self._adding:
            self._watches.add(watch)

    def _served(self) -> list[Watch]:
        with self._adding:
            return list(self._watches)

    def catch(self) -> bool:
        """Report at SIGUSR2 from now on; return False if this cannot be, and nothing is changed.

        That is so where this is not the main thread, or somebody else handles the signal.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        if signal.getsignal(signal.SIGUSR2) is not signal.SIG_DFL:
            return False
        signal.signal(signal.SIGUSR2, self._on_signal)
        # Whoever has asked to be woken before, such as an event loop, still is.
        self._next_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return True

    def _on_signal(self, number: int, frame: object) -> None:
        """Wake the helper, if the interpreter has not: others may have taken its descriptor.

        Event loops do so, and give it up without giving it back. Called when the main thread is in
        Python.
        """
        if not self.is_of_this_process():
            return
        taken = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if taken == self._writer:
            return
        self._next_wakeup = -1
        if taken >= 0:
            signal.set_wakeup_fd(taken)
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, bytes([number]))

    def _drop_files(self) -> None:
        """Give up, in a forked child, the wake-up descriptor and the listeners of its parent."""
        with contextlib.suppress(ValueError):  # not in the main thread of the main interpreter
            taken = signal.set_wakeup_fd(-1)
            if taken not in (-1, self._writer):
                signal.set_wakeup_fd(taken)
        for watch in tuple(self._watches):  # no other thread is here, and the lock may be held
            if watch.listener is not None:
                watch.listener.close()

    def _run(self) -> None:
        while self.is_of_this_process():
            self._round()

    def _round(self) -> None:
        """Answer what arrives within a fifth of a second, and then do what is due."""
        opened = [watch.listener for watch in self._served()]
        listeners = {listener.fileno(): listener for listener in opened if listener is not None}
        poll = select.poll()  # not select, which takes descriptors below 1024 only
        for descriptor in (self._reader, *listeners):
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(_ROUND * 1000):
            if descriptor == self._reader:
                self._take_signals()
            else:
                listeners[descriptor].serve()
        for watch in self._served():
            watch.answer()
        for act in tuple(self.rounds):
            act()

    def _take_signals(self) -> None:
        numbers = os.read(self._reader, 4096)
        if self._next_wakeup >= 0:
            with contextlib.suppress(OSError):
                os.write(self._next_wakeup, numbers)
        # One report at a time, however many signals arrive.
        if signal.SIGUSR2 in numbers and self._reporting.acquire(blocking=False):
            # In a thread of its own: this one has to answer meanwhile.
            act_in_thread(self._report, "mpidist-report")

    def _report(self) -> None:
        try:
            for watch in self._served():
                watch.report_signal()
        finally:
            self._reporting.release()


_helper: Helper | None = None


def helper() -> Helper:
    """Return the helper of this process, which starts when it is asked for first."""
    global _helper  # noqa: PLW0603  # one thread per process
    if _helper is None or not _helper.is_of_this_process():
        _helper = Helper()
    return _helper
