"""What starts and ends jobs; it is in the package, whose own soaks start jobs, too."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from mpidist.testing.launcher import (
    MARK,
    clean_environment,
    end_job,
    find_mpirun,
    marked_processes,
    vendor_arguments,
)

__all__ = [
    "MARK",
    "clean_environment",
    "default_dispositions",
    "end_job",
    "find_mpirun",
    "marked_processes",
    "vendor_arguments",
]


@contextlib.contextmanager
def default_dispositions() -> Iterator[None]:
    """Let processes that are started meanwhile take Ctrl-C and a closed terminal as usual.

    A shell lets what it runs in the background ignore SIGINT, and nohup SIGHUP. Processes inherit
    that, so that a test which sends one of them would wait in vain. For the main thread only.
    """
    defaults: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ignored = [number for number in defaults if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
