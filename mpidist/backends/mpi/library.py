"""The MPI library: loading it, its name, and the end of a job. The only module of mpi4py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, NoReturn

from mpidist import env
from mpidist.errors import BackendUnavailableError

__all__ = ["abort_job", "library_name", "load_mpi", "world_ranks"]

_LIBRARY_FILE = "/dev/shm/mpich_shm_"  # noqa: S108  # the library's name, not ours
"""How the names of the files begin that MPICH removes in MPI_Finalize only."""

_CURE = (
    "install an MPI library and mpi4py (pip install 'mpidist[mpich]'), or use the site's MPI: load "
    "its module, so that libmpi.so can be found, or set MPI4PY_LIBMPI to its path"
)


_ABORT_DELAY = 5
"""Seconds that Open MPI waits before it aborts; see [Note: how a job of PRRTE ends]."""


def library_name(mpi: Any) -> str:
    """Return name and version of the MPI library, the beginning of its description of itself."""
    text: str = mpi.Get_library_version()
    name = text.splitlines()[0].partition(",")[0]
    return " ".join(name.replace("Version:", " ").replace("\0", "").split())


def load_mpi() -> Any:
    """Import and return ``mpi4py.MPI``, which initialises MPI.

    [Note: how a job of PRRTE ends] A rank that calls MPI_Abort tells the daemon of its node, and
    exits. In PRRTE 3.0.14, the launcher of Open MPI 5, daemons on other nodes than mpirun's lose
    it if the order to kill the job arrives between the end of the rank's output and that of its
    process: `prte_odls_base_default_kill_local_procs` no longer waits for the process then, and
    `proc_errors` of errmgr_prted.c takes the rank for one that is still to end. mpirun waits for it
    for ever, as it did in one of twenty jobs over two nodes. A rank that exits with a code other
    than 0 ends the job without that. Open MPI itself aborts when a connection breaks, as those to a
    lost rank do: it is told to wait first, for longer than the launcher needs to end the rank.

    Raises
    ------
    BackendUnavailableError
        If mpi4py or an MPI library is missing.
    """
    if env.launched_remotely():
        env.delay_aborts_of_open_mpi(_ABORT_DELAY)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        reason = ": ".join(str(error).splitlines())
        # Not from it: forty lines of mpi4py's search say no more, and hide the cure.
        raise BackendUnavailableError(f"mpi: {reason}; {_CURE}") from None
    return MPI


def abort_job(mpi: Any, code: int) -> NoReturn:
    """End the whole job now, with this exit code, and leave nothing in ``/dev/shm``.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    code : int
        The exit code.
    """
    try:
        _unlink_library_memory()
        if not env.launched_remotely():
            mpi.COMM_WORLD.Abort(code)
    finally:
        # Some libraries only ask the launcher to end the job, and return. And see
        # [Note: how a job of PRRTE ends].
        os._exit(code)


def world_ranks(mpi: Any, comm: Any) -> tuple[int, ...]:
    """Return the rank in MPI's world of each rank."""
    group, world = comm.Get_group(), mpi.COMM_WORLD.Get_group()
    ranks = tuple(mpi.Group.Translate_ranks(group, None, world))
    group.Free()
    world.Free()
    return ranks


def _unlink_library_memory() -> None:
    """Remove the names of the MPI library's files in shared memory that this process has mapped.

    MPICH removes them in MPI_Finalize only, so that a job which ends by Abort would leave about a
    megabyte per rank until the node is started anew. All ranks have mapped them by then.
    """
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_bytes().splitlines()
        paths = {line.split(None, 5)[5] for line in maps if _LIBRARY_FILE.encode() in line}
        for name in paths:
            with contextlib.suppress(OSError):
                Path(os.fsdecode(name)).unlink()
