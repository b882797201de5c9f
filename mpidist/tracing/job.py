"""The trace of a whole job, asked for by ``MPIDIST_TRACE``."""

from __future__ import annotations

import atexit
import os
from datetime import datetime, timezone
from pathlib import Path

from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup
from mpidist.job import end
from mpidist.tracing.session import Session

__all__ = ["begin_job_trace"]


_job: list[Session] = []


def begin_job_trace(directory: str, world: ProcessGroup) -> None:
    """Begin to record from `mpidist.init` to the exit.

    Parameters
    ----------
    directory : str
        Where the trace is written, under a name of its own.
    world : ProcessGroup
        All ranks.

    Raises
    ------
    OSError
        On all ranks, if nothing can be written there.

    Notes
    -----
    Collective over `world`; blocks. Does nothing for a second world of the process. Where the exit
    has no hooks, since pytest or IPython handle exceptions, the ranks leave their parts behind.
    """
    if _job:
        return
    started = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    # Jobs in containers may share the directory, the second and the process number.
    own = f"trace-{started}-{os.getpid()}-{os.urandom(4).hex()}.json.gz"
    name = broadcast_object(own, world)
    session = Session.begin(Path(directory, name), world)
    _job.append(session)
    if not end.end_trace_at_exit(session):
        # Exit handlers run in reverse order: before mpi4py's, which finalises MPI.
        atexit.register(session.end if world.size == 1 else session.abandon)
