"""The files in shared memory that an MPI library leaves behind."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["unlink_library_memory"]

_LIBRARY_FILE = "/dev/shm/mpich_shm_"  # noqa: S108  # the library's name, not ours
"""How the names of the files begin that MPICH removes in MPI_Finalize only."""


def unlink_library_memory() -> None:
    """Remove the names of the MPI library's files in shared memory that this process has mapped.

    MPICH removes them in MPI_Finalize only, so that a job which ends by Abort would leave about a
    megabyte per rank until the node is started anew. All ranks have mapped them by then.
    """
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_bytes().splitlines()
        found = {line.split(None, 5)[5] for line in maps if _LIBRARY_FILE.encode() in line}
        for name in found:
            with contextlib.suppress(OSError):
                Path(os.fsdecode(name)).unlink()
