"""Whether a run can write where it is to write: found out before it trains."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mpidist._formatting import format_bytes
from mpidist._new_file import create_unique
from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup

__all__ = ["check_space", "raise_from_rank_0"]


def check_space(needs: Mapping[Path, int], group: ProcessGroup) -> None:
    """Raise on all ranks unless rank 0 can write into directories that have enough space.

    Parameters
    ----------
    needs : mapping of Path to int
        For each directory the number of bytes that are to be written there. It is made if missing.
        Only the mapping of rank 0 counts.
    group : ProcessGroup
        The ranks that raise together.

    Raises
    ------
    OSError
        If a directory cannot be made or written to, or its file system has fewer bytes free. Its
        `filename` is the directory; its `strerror` names the bytes.

    Notes
    -----
    Collective over `group`; blocks. One small broadcast. Quotas, and what other programs write at
    the same time, are not seen.
    """
    problem: OSError | None = None
    if group.rank == 0:
        try:
            _check(needs)
        except OSError as error:
            problem = error
    raise_from_rank_0(problem, group)


def raise_from_rank_0(problem: OSError | None, group: ProcessGroup) -> None:
    """Raise an error of rank 0 on all ranks.

    Parameters
    ----------
    problem : OSError or None
        What happened on rank 0; on the others it does not count.
    group : ProcessGroup
        The ranks that raise together.

    Raises
    ------
    OSError
        On all ranks, if rank 0 has passed one.

    Notes
    -----
    Collective over `group`; blocks. One small broadcast.
    """
    problem = broadcast_object(problem, group)
    if problem is not None:
        raise problem


def _check(needs: Mapping[Path, int]) -> None:
    needed: dict[int, int] = {}  # by file system
    for directory, nbytes in needs.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _try_to_write(directory)
            system = directory.stat().st_dev
            free = shutil.disk_usage(directory).free
        except FileExistsError as error:
            raise _refusal(errno.ENOTDIR, "it is a file", directory, nbytes) from error
        except OSError as error:
            raise _refusal(error.errno, error.strerror, directory, nbytes) from error
        needed[system] = needed.get(system, 0) + nbytes
        if free < needed[system]:
            text = f"{os.strerror(errno.ENOSPC)}, {format_bytes(free)} free"
            raise _refusal(errno.ENOSPC, text, directory, needed[system])


def _try_to_write(directory: Path) -> None:
    """Write a small file and remove it: permissions alone do not say whether that works."""
    descriptor, path = create_unique(directory, "mpidist-space", ".tmp")
    try:
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        Path(path).unlink()


def _refusal(number: int | None, text: str | None, directory: Path, nbytes: int) -> OSError:
    return OSError(number, f"{text}; {format_bytes(nbytes)} needed", str(directory))
