"""The helper thread of a process: it answers while the main thread is inside a library.

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

from mpidist.watch.watch import Watch

__all__ = ["Helper", "helper"]

_ROUND = 0.2
"""Seconds between two looks at whether anybody has asked."""


class Helper:
    """Serves the watches of one process.

    Attributes
    ----------
    rounds : list of callable
        Called about five times a second.
    """

    def __init__(self) -> None:
        self.rounds: list[Callable[[], None]] = []
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._next_wakeup = -1
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="mpidist-helper", daemon=True).start()

    def serve(self, watch: Watch, nodes: Sequence[int]) -> None:
        """Answer for this watch, as long as somebody else holds it.

        Parameters
        ----------
        watch : Watch
            Of a world.
        nodes : sequence of int
            The node of each of its ranks.
        """
        watch.listen(nodes)
        self._watches.add(watch)

    def catch(self) -> bool:
        """Report at SIGUSR2, unless this is not the main thread or somebody else handles it.

        Returns
        -------
        bool
            Whether it does so now.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        if signal.getsignal(signal.SIGUSR2) is not signal.SIG_DFL:
            return False
        signal.signal(signal.SIGUSR2, _nothing)
        # Whoever has asked to be woken before, such as an event loop, still is.
        self._next_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return True

    def _run(self) -> None:
        while os.getpid() == self._pid:  # not in a child that was forked
            self._round()

    def _round(self) -> None:
        """Wait for a moment, and do what there is to do."""
        found = [watch.listener for watch in self._watches]
        listeners = {each.fileno(): each for each in found if each is not None}
        ready, _, _ = select.select([self._reader, *listeners], [], [], _ROUND)
        if self._reader in ready:
            self._take_signals()
        for descriptor in ready:
            if descriptor in listeners:
                listeners[descriptor].serve()
        for watch in tuple(self._watches):
            watch.answer()
        for act in tuple(self.rounds):
            act()

    def _take_signals(self) -> None:
        numbers = os.read(self._reader, 4096)
        if self._next_wakeup >= 0:
            with contextlib.suppress(OSError):
                os.write(self._next_wakeup, numbers)
        if signal.SIGUSR2 in numbers:
            for watch in tuple(self._watches):
                # In a thread of its own: this one has to answer meanwhile.
                threading.Thread(
                    target=watch.report_signal, name="mpidist-report", daemon=True
                ).start()


def _nothing(number: int, frame: object) -> None:
    """Do nothing: the helper thread has been woken."""


_helper: Helper | None = None


def helper() -> Helper:
    """Return the helper of this process, which starts when it is asked for first."""
    global _helper  # noqa: PLW0603  # one thread per process
    if _helper is None:
        _helper = Helper()
    return _helper
