"""Files written so that a kill or a loss of power at any instant leaves the old or the new one."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from mpidist._types import Array
from mpidist.errors import CheckpointCorruptError

__all__ = [
    "exists",
    "open_regular",
    "read_at",
    "read_regular",
    "replace_file",
    "sync_directory",
    "temporary",
    "write_at",
]

_BLOCK = 1 << 22
"""Bytes that are written by one call."""


def temporary(path: Path) -> Path:
    """Return the name that a file has until it is complete."""
    return path.with_name(path.name + ".tmp")


def exists(path: Path) -> bool:
    """Return whether there is something at a path; OSError if that cannot be told.

    Not `Path.exists`, which takes what it cannot see for something that is not there.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def open_regular(path: Path) -> int:
    """Open a file for reading, and return its descriptor, which the caller closes.

    Raises
    ------
    CheckpointCorruptError
        If it is anything but a regular file, such as a FIFO, at which a plain `open` waits until
        somebody writes.
    OSError
        If it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise CheckpointCorruptError(
        f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, and a regular file is "
        "expected; put that file back from a copy, or use another checkpoint"
    )


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a regular file, at most so many bytes; raises as `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(most)


def write_at(descriptor: int, data: Array, offset: int) -> int:
    """Write bytes at a place of an open file.

    Parameters
    ----------
    descriptor : int
        Of the file.
    data : Array, shape (n,) uint8
        What to write.
    offset : int
        Where, in bytes.

    Returns
    -------
    int
        The place behind it.

    Raises
    ------
    OSError
        If not all can be written.

    Notes
    -----
    The system is asked to begin with the disk at once, block by block, so that it works while the
    next block is copied: on Linux "not needed any more" starts that, and what the disk does not
    have yet is never dropped. Left to itself the system would begin at the sync.
    """
    view = data.data
    while view:
        written = os.pwrite(descriptor, view[:_BLOCK], offset)
        os.posix_fadvise(descriptor, offset, written, os.POSIX_FADV_DONTNEED)
        view, offset = view[written:], offset + written
    return offset


def read_at(descriptor: int, parts: Sequence[Array], offset: int) -> int:
    """Read bytes that lie side by side in an open file.

    Parameters
    ----------
    descriptor : int
        Of the file.
    parts : sequence of Array, each shape (n,) uint8
        Receive the bytes, one after the other.
    offset : int
        Where they begin, in bytes.

    Returns
    -------
    int
        How many were read; fewer than wanted where the file ends.
    """
    wanted, done = sum(part.nbytes for part in parts), 0
    views = [part.data for part in parts if part.nbytes]
    while done < wanted:
        count = os.preadv(descriptor, views, offset + done)
        if not count:
            break
        done += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views and count:
            views[0] = views[0][count:]
    return done


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file under its temporary name, sync it, and give it its name.

    Parameters
    ----------
    path : Path
        The file; one that is there is replaced in one instant.
    data : bytes
        What it shall hold.

    Raises
    ------
    OSError
        If it fails; what was there still is. The directory has not been synced.
    """
    part = temporary(path)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)  # noqa: PTH105  # beside os.fsync: the calls that must come in this order


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
