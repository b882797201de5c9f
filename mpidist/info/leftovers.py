"""Files that MPI libraries and their like have in shared memory, and who still uses them."""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mpidist.backends.node.shared_memory import PREFIX
from mpidist.info.facts import Leftover

__all__ = ["find_leftovers", "maker_of", "mapped_by"]

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

    Parameters
    ----------
    directory : Path
        Where ranks share memory.
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
    """Return the files of MPI libraries and their like that a process has.

    Parameters
    ----------
    process : str
        Its number, or ``self``.
    directory : Path
        Where ranks share memory.
    """
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
