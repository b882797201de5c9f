"""Whether a process of this node is alive."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from enum import Enum
from pathlib import Path

__all__ = ["Process", "Status"]


class Status(str, Enum):
    """What is known of a rank."""

    ALIVE = "alive"
    STOPPED = "stopped"
    DEAD = "dead"
    LEAVING = "at its exit"
    SILENT = "silent"
    UNKNOWN = "?"

    def __str__(self) -> str:
        """Return the word."""
        return self.value


class Process:
    """A process of this node, held so that its number cannot come to stand for another one.

    Parameters
    ----------
    pid : int
        Its number, in this process's namespace.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except OSError:
            self._descriptor = None

    def status(self) -> Status:
        """Return whether it is alive, stopped or dead."""
        if self._descriptor is None:
            return Status.UNKNOWN
        if self.ended():
            return Status.DEAD
        return Status.STOPPED if self._state() in ("T", "t") else Status.ALIVE

    def ended(self) -> bool:
        """Return whether it is known to be dead."""
        if self._descriptor is None:
            return False
        poll = select.poll()  # not select, which takes descriptors below 1024 only
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def _state(self) -> str:
        """Return the letter for what the kernel does with it (proc(5), /proc/pid/stat)."""
        try:
            text = Path(f"/proc/{self._pid}/stat").read_text()
        except OSError:
            return "?"
        return text.rpartition(")")[2].split()[0]  # the name, in parentheses, may hold anything

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Let go of the process."""
        # No other name of this module: an interpreter that ends has emptied it when the last ones
        # go. Whoever has closed all descriptors has closed this one, too.
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            self._descriptor = None
            try:  # noqa: SIM105
                close(descriptor)
            except OSError:
                pass
