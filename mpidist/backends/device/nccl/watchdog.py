"""A thread that looks after the communicators of this process: errors, and missed deadlines.

Operations on a device run without the host: no thread may be waiting when one fails or hangs. This
thread ends its communicator then, so that what waits for the device goes on, and the group's next
operation raises.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from functools import cache
from typing import Protocol

__all__ = ["Watchdog", "watchdog"]

_ROUND = 0.1
"""Seconds between two looks."""


class _Watched(Protocol):
    def patrol(self) -> None:
        """Look for what is wrong, and end what cannot be completed."""

    def give_up(self, error: Exception) -> None:
        """Take what `patrol` has raised as the end."""

    def end(self) -> None:
        """Wait for what is under way, with a deadline, and release what is held."""


class Watchdog:
    """The watchdog of this process; it runs while there is something to watch."""

    def __init__(self) -> None:
        self._watched: list[_Watched] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        # What is left when the interpreter ends would be destroyed in no order.
        atexit.register(self._on_exit)

    def watch(self, communicator: _Watched) -> None:
        """Watch a communicator until `unwatch`."""
        with self._changed:
            self._watched.append(communicator)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="mpidist-nccl-watchdog", daemon=True
                )
                self._thread.start()

    def unwatch(self, communicator: _Watched) -> None:
        """Stop watching a communicator."""
        with self._changed:
            if communicator in self._watched:
                self._watched.remove(communicator)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watched:
                    self._thread = None
                    return
                watched = tuple(self._watched)
                self._changed.wait(_ROUND)
            for communicator in watched:
                try:
                    communicator.patrol()
                except Exception as error:  # noqa: BLE001  # of a device that has failed
                    # The others still need this thread.
                    self.unwatch(communicator)
                    communicator.give_up(error)

    def _on_exit(self) -> None:
        if os.getpid() != self._pid:  # a child that was forked can neither use nor release them
            return
        for communicator in tuple(self._watched):
            try:
                communicator.end()
            except Exception as error:  # noqa: BLE001  # of a device that has failed; see `_run`
                sys.stderr.write(f"mpidist: at the exit, NCCL could not be released: {error}\n")


@cache
def watchdog() -> Watchdog:
    """Return the watchdog of this process."""
    return Watchdog()
