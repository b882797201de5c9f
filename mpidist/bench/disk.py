"""Plain files, as peers of checkpoints, and what the kernel counts for this process."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from mpidist._types import Array

__all__ = ["Counter", "drop_cache", "peak_over", "read_plain", "write_plain"]

_SELF = Path("/proc/self")


def write_plain(path: Path, data: Array) -> None:
    """Write bytes, shape (n,) uint8, into a fresh file and wait until they are on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        left = data.data
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_plain(*files: tuple[Path, Array]) -> None:
    """Read whole files, each into memory of its length, shape (n,) uint8."""
    for path, memory in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            left = memory.data
            while left and (count := os.readv(descriptor, [left])):
                left = left[count:]
            if left:
                raise RuntimeError(f"{path}: {len(left)} of {memory.nbytes} bytes are missing")
        finally:
            os.close(descriptor)


def drop_cache(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget what it holds of files that have been synced."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Counter:
    """How many bytes this process has read, while it did some things.

    Attributes
    ----------
    asked : int
        By system calls, from files, wherever the kernel had them; ``rchar`` of /proc/self/io.
    fetched : int
        From disks; ``read_bytes`` of /proc/self/io.
    calls : int
        How often `counting` called.
    """

    def __init__(self) -> None:
        self.asked = self.fetched = self.calls = 0

    def counting(self, call: Callable[[], object]) -> None:
        """Call a function, and add what this process has read meanwhile."""
        asked, fetched = _read()
        call()
        asked_then, fetched_then = _read()
        self.asked += asked_then - asked
        self.fetched += fetched_then - fetched
        self.calls += 1


def _read() -> tuple[int, int]:
    lines = (_SELF / "io").read_text(encoding="ascii").splitlines()
    values = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return values["rchar"], values["read_bytes"]


def peak_over(call: Callable[[], object]) -> int:
    """Return how many bytes Python and numpy held at most, within a call, beyond those before.

    Notes
    -----
    Counted by tracemalloc: resident memory would not show what an earlier call has returned to the
    C library and this one takes again. What HDF5 and MPI allocate themselves is not seen.
    """
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
