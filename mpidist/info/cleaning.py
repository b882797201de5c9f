"""Remove what jobs that are over have left in shared memory.

Whether anybody has a file open or mapped, the kernel knows for all processes, those of other users
and containers included: it grants a write lease (fcntl(2), ``F_SETLEASE``) on a file that nobody
else has, and refuses it otherwise. While it is held nobody can open the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpidist._formatting import format_bytes, format_count
from mpidist.info.leftovers import maker_of

__all__ = ["Candidate", "clean", "describe"]

_YOUNG = 60.0
"""Seconds for which a file is kept that nobody has: it may be that of a job which is starting."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file with a name that MPI libraries and their like give.

    Attributes
    ----------
    name, maker : str
        The file's name, and who gives such names.
    nbytes : int
        Memory that it takes.
    kept : str
        Why it was not removed; empty if it was.
    """

    name: str
    maker: str
    nbytes: int
    kept: str


def clean(directory: Path) -> list[Candidate]:
    """Remove the files of this user that belong to no job any more, and return all that were seen.

    Parameters
    ----------
    directory : Path
        Where ranks share memory.
    """
    found = []
    with _told_of_no_opener():
        for path in sorted(directory.glob("*")):
            maker = maker_of(path.name)
            with contextlib.suppress(FileNotFoundError):  # it has gone
                status = path.lstat()
                if maker is not None and stat.S_ISREG(status.st_mode):
                    kept = _remove(path, status)
                    found.append(Candidate(path.name, maker, status.st_blocks * 512, kept))
    return found


def describe(files: Sequence[Candidate], place: str) -> str:
    """Return what was removed, and what was kept and why, a line for each kind.

    Parameters
    ----------
    files : sequence of Candidate
        What `clean` returns.
    place : str
        The directory, and the host.
    """
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for file in files:
        groups.setdefault((file.kept, file.maker), []).append(file)
    lines = []
    for (kept, maker), some in sorted(groups.items()):
        size = format_bytes(sum(file.nbytes for file in some))
        what = f"{format_count(len(some), 'file')} of {maker} in {place}, {size}"
        lines.append(f"kept {what}: {kept}" if kept else f"removed {what}")
    return "\n".join(lines) or f"nothing of MPI libraries is in {place}"


def _remove(path: Path, status: os.stat_result) -> str:
    """Remove a file that nobody has, and return nothing; else return why it is kept."""
    if status.st_uid != os.geteuid():
        return "another user's"
    if time.time() - status.st_mtime < _YOUNG:
        return f"less than {_YOUNG:g} s old"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    try:
        return _remove_open(path, descriptor)
    finally:
        os.close(descriptor)


def _remove_open(path: Path, descriptor: int) -> str:
    """Do so with a file of which this process has one descriptor."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        here, held = path.lstat(), os.fstat(descriptor)
        if (here.st_dev, here.st_ino) != (held.st_dev, held.st_ino):
            return "replaced meanwhile"
        path.unlink()
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return "in use"
        return f"nobody knows whether it is in use: {error.strerror}"
    return ""


@contextlib.contextmanager
def _told_of_no_opener() -> Iterator[None]:
    """Ignore the signal that says of a lease that somebody wants the file: it would end us."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGIO, before)
