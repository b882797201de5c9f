"""Files that MPI libraries and their like have in shared memory: who uses them, and their removal.

Whether anybody has a file open or mapped, the kernel knows for all processes, those of other users
and containers included: it grants a write lease (fcntl(2), ``F_SETLEASE``) on a file that nobody
else has, and refuses it otherwise. While it is held nobody can open the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import signal
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpidist._formatting import format_bytes, format_count
from mpidist.backends.node.shared_memory import PREFIX
from mpidist.info.facts import Leftover

# Seen here: MPICH 5 and Open MPI 5. The others are the names that their users report.
_MAKERS: Mapping[str, str] = {
    "mpich_shm_": "MPICH",
    "mpich_shar_tmp": "MPICH",
    "sm_segment.": "Open MPI",
    "vader_segment.": "Open MPI",
    "osc_rdma.": "Open MPI",
    "Intel_MPI_": "Intel MPI",
    "shm-col-space-": "Intel MPI",
    "cm_shmem-": "MVAPICH2",
    "ib_shmem-": "MVAPICH2",
    "ucx_shm_posix_": "UCX",
    "psm2_shm.": "PSM2",
    "psm3_shm.": "PSM3",
    "nccl-": "NCCL",
    PREFIX: "mpidist",
}

Key = tuple[int, int]
"""Device and number of a file: processes in other containers see it under other names."""


def maker_of(name: str) -> str | None:
    """Return who gives such a name to a file in shared memory, or None."""
    return next((maker for prefix, maker in _MAKERS.items() if name.startswith(prefix)), None)


def find_leftovers(directory: Path) -> Sequence[Leftover]:
    """Return the files of MPI libraries and their like, but for those that this process has.

    Whether a file is used is found in the maps of all processes. A user can look at the processes
    of that user only, but for those with more rights, and no rank is one of them.
    """
    files = dict(_files(directory))
    if not files:
        return []
    own = _mapped(Path("/proc/self/maps"))
    everyone: set[Key] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        everyone |= _mapped(maps)
    return [
        _describe(path, status, used=_key(status) in everyone)
        for path, status in files.items()
        if _key(status) not in own
    ]


def mapped_by(process: str, directory: Path) -> list[Path]:
    """Return the files of MPI libraries that a process, a number or ``self``, has mapped."""
    mapped = _mapped(Path("/proc", process, "maps"))
    return [path for path, status in _files(directory) if _key(status) in mapped]


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(directory.glob("*")):
        with contextlib.suppress(OSError):  # it has gone
            if maker_of(path.name) is not None and path.is_file():
                yield path, path.stat()


def _describe(path: Path, status: os.stat_result, *, used: bool) -> Leftover:
    all_seen = os.geteuid() in (0, status.st_uid)
    return Leftover(
        name=path.name,
        maker=maker_of(path.name) or "",
        nbytes=status.st_blocks * 512,
        owner=_user(status.st_uid),
        age=round(max(0.0, time.time() - status.st_mtime), 1),
        used=used if used or all_seen else None,
    )


def _key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino


def _mapped(maps: Path) -> set[Key]:
    """Return the files that a process has mapped; none if it has ended, or is not ours."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    files = set()
    for line in lines:
        _, _, _, device, number, *_ = line.split(maxsplit=5)
        if number != "0":
            major, minor = (int(part, 16) for part in device.split(":"))
            files.add((os.makedev(major, minor), int(number)))
    return files


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


_YOUNG = 60.0
"""Seconds for which a file is kept that nobody has: it may be that of a job which is starting."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that an MPI library made, and why it was kept; empty if it was removed."""

    name: str
    maker: str
    nbytes: int
    kept: str


def clean(directory: Path) -> list[Candidate]:
    """Remove this user's files that belong to no job any more; return all that were seen."""
    candidates = []
    with _without_lease_signals():
        for path in sorted(directory.glob("*")):
            maker = maker_of(path.name)
            with contextlib.suppress(FileNotFoundError):  # it has gone
                status = path.lstat()
                if maker is not None and stat.S_ISREG(status.st_mode):
                    kept = _remove(path, status)
                    candidates.append(Candidate(path.name, maker, status.st_blocks * 512, kept))
    return candidates


def describe(files: Sequence[Candidate], where: str) -> str:
    """Return what `clean` has removed, and what it has kept and why, a line for each kind."""
    groups: dict[tuple[str, str], list[Candidate]] = {}
    for file in files:
        groups.setdefault((file.kept, file.maker), []).append(file)
    lines = []
    for (kept, maker), group in sorted(groups.items()):
        size = format_bytes(sum(file.nbytes for file in group))
        what = f"{format_count(len(group), 'file')} of {maker} in {where}, {size}"
        lines.append(f"kept {what}: {kept}" if kept else f"removed {what}")
    return "\n".join(lines) or f"nothing of MPI libraries is in {where}"


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
        named, held = path.lstat(), os.fstat(descriptor)
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino):
            return "replaced meanwhile"
        path.unlink()
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return "in use"
        return f"nobody knows whether it is in use: {error.strerror}"
    return ""


@contextlib.contextmanager
def _without_lease_signals() -> Iterator[None]:
    """Ignore the signal that says of a lease that somebody wants the file: it would end us."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGIO, before)
