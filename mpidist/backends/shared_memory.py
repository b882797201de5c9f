"""Memory that the ranks of one node share: mapped files that have no name."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

__all__ = ["create_file", "map_file"]

DIRECTORY = Path("/dev/shm")  # noqa: S108  # the files are made by mkstemp, for their owner alone


def create_file(nbytes: int) -> Path:
    """Make a file of this size in memory, readable by its owner alone, with nothing in it yet.

    Parameters
    ----------
    nbytes : int
        Size; more than 0.

    Returns
    -------
    Path
        The file; whoever made it unlinks it when all have mapped it.

    Raises
    ------
    OSError
        If there is no such memory.
    """
    descriptor, name = tempfile.mkstemp(prefix="mpidist-", dir=DIRECTORY)
    try:
        os.ftruncate(descriptor, nbytes)
    except (OSError, OverflowError) as error:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise OSError(f"no file of {nbytes} bytes: {error}") from error
    finally:
        os.close(descriptor)
    return Path(name)


def map_file(path: Path, part: slice) -> mmap.mmap:
    """Map a whole file for reading and writing, shared with all who map it.

    Parameters
    ----------
    path : Path
        The file.
    part : slice
        The bytes of it that this process provides, really allocated, from the memory that is
        nearest to it.

    Raises
    ------
    OSError
        If it cannot be opened, as where ranks of one node do not see one ``/dev/shm``, or there is
        not enough memory for this part.

    Notes
    -----
    Without the allocation a file larger than the memory would be made without an error, and its
    first use would kill the process.
    """
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), part.start, part.stop - part.start)
        return mmap.mmap(file.fileno(), 0)
