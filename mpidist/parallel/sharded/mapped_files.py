"""Memory that is a file: pages that are not in use go to a file system, not to swap space."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from mpidist._formatting import format_bytes
from mpidist._new_file import create_unique
from mpidist._types import Array
from mpidist.arrays.boxes import round_up
from mpidist.collectives import all_gather_object, broadcast_object
from mpidist.group import ProcessGroup
from mpidist.parallel.data.buckets import ALIGNMENT_BYTES

__all__ = ["mapped_arrays"]


def mapped_arrays(
    sizes: Sequence[int],
    directory: str,
    group: ProcessGroup,
    *,
    shared_by: ProcessGroup | None = None,
) -> list[Array]:
    """Return arrays of these numbers of bytes, of zeros, in a new file that is mapped into memory.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of each; the same on ranks that share them.
    directory : str
        Where the file is made.
    group : ProcessGroup
        All ranks that call this.
    shared_by : ProcessGroup, optional
        Ranks of one node that have the same arrays; each rank has its own when omitted.

    Returns
    -------
    list of Array
        Of dtype uint8, each from a cache line on.

    Raises
    ------
    OSError
        On all ranks, naming one, if the file cannot be made there or mapped, or is too large.

    Notes
    -----
    Collective over `group`; blocks. The file has no name as soon as all have mapped it, so nothing
    stays when the job ends, however it does. Its space is reserved: a file system that fills up
    later ends no rank.
    """
    ends = [*accumulate(round_up(size, ALIGNMENT_BYTES) for size in sizes)]
    total = ends[-1] if ends else 0
    total = max(total, 1)  # an empty file cannot be mapped
    makes = shared_by is None or shared_by.rank == 0
    memory: Array = np.empty(0, np.uint8)
    descriptor, path = -1, ""
    try:
        problem: OSError | None = None
        try:
            if makes:
                descriptor, path = _make(directory, total)
        except OSError as error:
            problem = error
        _agree(problem, total, directory, group)
        made = (path, _identity(descriptor)) if makes else ("", (0, 0))
        if shared_by is not None:
            made = broadcast_object(made, shared_by)
        try:
            if not makes:
                descriptor = _open(*made)
            memory = np.frombuffer(mmap.mmap(descriptor, total), np.uint8)
        except OSError as error:
            problem = error
        _agree(problem, total, directory, group)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        if path:
            os.unlink(path)  # noqa: PTH108  # as it was made
    starts = (0, *ends)
    return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _make(directory: str, nbytes: int) -> tuple[int, str]:
    """Create a file that has all its space; return its descriptor and path."""
    system = os.statvfs(directory)
    free = system.f_bavail * system.f_frsize
    if free < nbytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {format_bytes(free)} free")
    descriptor, path = create_unique(directory, "mpidist", ".parameters")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError:
        os.close(descriptor)
        os.unlink(path)  # noqa: PTH108
        raise
    return descriptor, path


def _open(path: str, identity: tuple[int, int]) -> int:
    """Open the file that another rank of the node has made, and no other of its name."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    if _identity(descriptor) != identity:
        os.close(descriptor)
        raise OSError(errno.ESTALE, "somebody has replaced the file")
    return descriptor


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _agree(problem: OSError | None, nbytes: int, directory: str, group: ProcessGroup) -> None:
    """Raise OSError on all ranks if one has a problem."""
    own = None
    if problem is not None:
        own = problem.errno or errno.EIO, problem.strerror or str(problem), nbytes
    for rank, failure in enumerate(all_gather_object(own, group)):
        if failure is not None:
            number, text, size = failure
            raise OSError(
                number,
                f"FSDP on {group}: offload={directory!r}: rank {rank} cannot keep "
                f"{format_bytes(size)} in a file there: {text}; give a directory of each node "
                "that can be written, on a file system with space for it",
            )
