"""How the ranks of an MPI communicator on one node come to share memory.

Only buffer calls: the first pickled collective of a communicator duplicates it with Python's lock
held, and can deadlock a program of several threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np

from mpidist.backends.node.shared_memory import NamedFile, SharedFile, map_part, open_address
from mpidist.log import logger

__all__ = ["share", "unlink_library_memory"]

_LONGEST_ADDRESS = 256

_LIBRARY_FILE = "/dev/shm/mpich_shm_"  # noqa: S108  # the library's name, not ours
"""How the names of the files begin that MPICH removes in MPI_Finalize only."""

_UNKNOWN = 1 << 20
"""Stands for a number of an error where there is none."""

_SMALL = "A container may need a larger /dev/shm (docker run --shm-size)"

_CURES = {
    errno.EMFILE: "This process has as many files open as it may: close some, or raise its limit "
    "(ulimit -n)",
    errno.ENFILE: "This machine has as many files open as it may (sysctl fs.file-max)",
    errno.EACCES: "The ranks need to open each other's files in /proc, or to write in /dev/shm",
}
"""By the number of the error."""

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
    be opened by all (see `mpidist.backends.node.shared_memory`).
    """
    descriptor, problem = _open_on_all(mpi, comm, SharedFile, comm.size * nbytes)
    if descriptor is None:
        descriptor, problem = _open_on_all(mpi, comm, NamedFile, comm.size * nbytes)
    memory = None
    if descriptor is not None:
        part = slice(comm.rank * nbytes, (comm.rank + 1) * nbytes)
        memory, problem = _mapped(descriptor, part)
        problem = _agreed(mpi, comm, problem)
    if problem is not None:
        if comm.rank == 0:
            _warn(problem)
        return None
    return memory


def _open_on_all(
    mpi: Any, comm: Any, kind: type[SharedFile], nbytes: int
) -> tuple[int | None, OSError | None]:
    """Open one file on all ranks, or none; return its descriptor, or what went wrong."""
    file, problem = _made(kind, nbytes) if comm.rank == 0 else (None, None)
    address = np.array([b"" if file is None else file.address()], "S256")
    try:
        comm.Bcast(address.view(np.uint8), root=0)
        if comm.rank == 0:
            descriptor = None if file is None else file.descriptor
        else:
            descriptor, problem = _opened(address.item())
        problem = _agreed(mpi, comm, problem)
    finally:
        if file is not None:
            file.unlink()
    if problem is not None and descriptor is not None:
        os.close(descriptor)
        descriptor = None
    return descriptor, problem


def _made(kind: type[SharedFile], nbytes: int) -> tuple[SharedFile | None, OSError | None]:
    try:
        return kind.make(nbytes), None
    except OSError as error:
        return None, error


def _opened(address: bytes) -> tuple[int | None, OSError | None]:
    if not address:
        return None, OSError("the first rank could not make it")
    try:
        return open_address(address), None
    except OSError as error:
        return None, error


def _mapped(descriptor: int, part: slice) -> tuple[memoryview | None, OSError | None]:
    try:
        return map_part(descriptor, part), None
    except OSError as error:
        return None, error
    finally:
        os.close(descriptor)


def _agreed(mpi: Any, comm: Any, problem: OSError | None) -> OSError | None:
    """Return what went wrong, here or elsewhere, or None if nothing has on any rank; collective."""
    worst = np.array(0 if problem is None else problem.errno or _UNKNOWN)
    comm.Allreduce(mpi.IN_PLACE, worst, mpi.MAX)
    number = int(worst)
    if not number or problem is not None:
        return problem
    why = "it could not be opened" if number == _UNKNOWN else f"{os.strerror(number)}"
    return OSError(number, f"{why}, on another rank")


def _warn(problem: OSError) -> None:
    """Say it once: a program may ask for memory a thousand times, and hear of several reasons."""
    if not _REASONS:
        logger.warning(
            "no memory shared by the ranks of this node: %s. They go without: the same results, at "
            "the MPI library's speed. %s",
            problem,
            _CURES.get(problem.errno or 0, _SMALL),
        )
    _REASONS.add(str(problem))


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
