"""Files written so that a kill or a loss of power at any instant leaves the old or the new one."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mpidist._types import Array
from mpidist.errors import CheckpointCorruptError
from mpidist.log import logger

__all__ = [
    "exists",
    "naming",
    "open_regular",
    "read_at",
    "read_regular",
    "rename_synced",
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
        size = os.fstat(file.fileno()).st_size
        return file.read(min(size, most))  # which allocates as much as it is asked for


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
        with suppress(OSError):  # a hint, which some file systems do not know
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


@contextmanager
def naming(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Name the file in what the system raises in the block, and its size if the disk is full.

    Parameters
    ----------
    path : Path
        What is being written: calls with a descriptor do not name it.
    nbytes : int, optional
        Least size of the file when it is complete.

    Raises
    ------
    OSError
        Of the same number, so of the same class.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        text = error.strerror or os.strerror(error.errno)
        if error.errno in _FULL and nbytes is not None and error.filename2 is None:
            text += f" for a file of {nbytes:,} bytes"
        name = path if error.filename is None else error.filename
        raise OSError(error.errno, text, str(name)) from error


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def rename_synced(part: Path, path: Path, *, warn: bool = True) -> None:
    """Give a file that is complete and synced its name, and sync the directory.

    Parameters
    ----------
    part, path : Path
        Its temporary name and its own, in one directory.
    warn : bool, optional
        As of `sync_directory`.

    Raises
    ------
    FileExistsError
        If there is something of that name: another process writes to the same directory.
    OSError
        If it fails.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, "Another process has made this file", str(path))
    os.replace(part, path)  # noqa: PTH105  # beside os.fsync: the calls that must come in this order
    sync_directory(path.parent, warn=warn)


def sync_directory(directory: Path, *, warn: bool = True) -> None:
    """Make the names in a directory survive a loss of power.

    Parameters
    ----------
    directory : Path
        Which one.
    warn : bool, optional
        Whether to log a warning, once in this process, where the file system does not support
        it: CephFS and some that are mounted by FUSE refuse to sync a directory. They have the names
        or do not have them after a loss of power; nothing else can be done about it.

    Raises
    ------
    OSError
        If it fails for another reason.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        if warn and not _reported.is_set():
            _reported.set()
            logger.warning(
                "%s: its file system does not sync directories (%s), so a loss of power may take "
                "the newest checkpoint; this is said once",
                directory,
                error.strerror,
            )
    finally:
        os.close(descriptor)


_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


_reported = threading.Event()
"""Set when the warning has been given."""
