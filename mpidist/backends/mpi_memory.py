"""How the ranks of an MPI communicator on one node come to share memory.

Only buffer calls: the first pickled collective of a communicator duplicates it with Python's lock
held, and can deadlock a program of several threads.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpidist.backends.shared_memory import NamedFile, SharedFile, map_part, open_address
from mpidist.log import logger

__all__ = ["share", "unlink_library_memory"]

_LONGEST_ADDRESS = 256

_LIBRARY_FILE = "/dev/shm/mpich_shm_"  # noqa: S108  # the library's name, not ours
"""How the names of the files begin that MPICH removes in MPI_Finalize only."""

_REASONS: set[str] = set()
"""Why there was no memory, so far."""


def share(mpi: Any, comm: Any, nbytes: int) -> memoryview | None:
    """Map memory shared by all ranks, or agree to go without.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    comm : mpi4py.MPI.Intracomm
        The ranks; all on one node.
    nbytes : int
        Bytes of each rank's part, the same on all. Each rank allocates its own, so that it lies in
        the memory nearest to it.

    Returns
    -------
    memoryview or None
        All parts, in rank order, with zeros in them; None on all ranks if one cannot have them.

    Notes
    -----
    Collective over `comm`; blocks. Three small collectives; six where a file without a name cannot
    be opened by all (see `mpidist.backends.shared_memory`).
    """
    descriptor, reason = _open_on_all(mpi, comm, SharedFile, comm.size * nbytes)
    if descriptor is None:
        descriptor, reason = _open_on_all(mpi, comm, NamedFile, comm.size * nbytes)
    memory = None
    if descriptor is not None:
        part = slice(comm.rank * nbytes, (comm.rank + 1) * nbytes)
        memory, reason = _mapped(descriptor, part)
        if not _all(mpi, comm, memory is not None):
            memory = None
    if memory is None:
        if comm.rank == 0:
            _warn(reason or "another rank could not have its part")
        return None
    return memoryview(memory)


def _open_on_all(
    mpi: Any, comm: Any, kind: type[SharedFile], nbytes: int
) -> tuple[int | None, str]:
    """Open one file on all ranks, or none; return its descriptor, and what went wrong here."""
    file, reason = _made(kind, nbytes) if comm.rank == 0 else (None, "")
    address = np.array([b"" if file is None else file.address()], "S256")
    try:
        comm.Bcast(address.view(np.uint8), root=0)
        if comm.rank == 0:
            descriptor = None if file is None else file.descriptor
        else:
            descriptor, reason = _opened(address.item())
        agreed = _all(mpi, comm, descriptor is not None)
    finally:
        if file is not None:
            file.unlink()
    if not agreed and descriptor is not None:
        os.close(descriptor)
        descriptor = None
    return descriptor, reason


def _made(kind: type[SharedFile], nbytes: int) -> tuple[SharedFile | None, str]:
    try:
        return kind.make(nbytes), ""
    except OSError as error:
        return None, str(error)


def _opened(address: bytes) -> tuple[int | None, str]:
    if not address:
        return None, "the first rank could not make it"
    try:
        return open_address(address), ""
    except OSError as error:
        return None, str(error)


def _mapped(descriptor: int, part: slice) -> tuple[mmap.mmap | None, str]:
    try:
        return map_part(descriptor, part), ""
    except OSError as error:
        return None, str(error)
    finally:
        os.close(descriptor)


def _all(mpi: Any, comm: Any, mine: bool) -> bool:  # noqa: FBT001  # a value, not a switch
    """Whether it is so on all ranks; collective."""
    every = np.array(mine)
    comm.Allreduce(mpi.IN_PLACE, every, mpi.LAND)
    return bool(every)


def _warn(reason: str) -> None:
    """Say it once: a program may ask for memory a thousand times, and hear of several reasons."""
    if not _REASONS:
        logger.warning(
            "no memory shared by the ranks of this node: %s. They go without: the same results, at "
            "the MPI library's speed. A container may need a larger /dev/shm (docker run "
            "--shm-size)",
            reason,
        )
    _REASONS.add(reason)


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
