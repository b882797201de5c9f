"""How a trace begins and ends: together on all ranks, or on each by itself when a job breaks."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from mpidist._threads import act_in_thread
from mpidist.collectives import all_gather_object, barrier, broadcast_object
from mpidist.group.group import ProcessGroup, check_group
from mpidist.observe.regions import listener
from mpidist.point_to_point import recv, send
from mpidist.tracing.chrome import write_trace
from mpidist.tracing.clock import Reading, clock_name, compare_clocks
from mpidist.tracing.parts import Events, PartFile, TracePart, part_path

EVENTS = 100_000
"""Events of each rank that are kept."""

_PATIENCE = 2.0
"""Seconds for which a job that is ending waits for the file system."""


@contextmanager
def trace(
    path: str | os.PathLike[str], group: ProcessGroup, *, limit: int = EVENTS
) -> Iterator[None]:
    """Write down what the ranks of a group do inside the ``with`` block, and when.

    Parameters
    ----------
    path : path
        One file for all ranks, in the Trace Event Format: open it in https://ui.perfetto.dev, or
        let ``python -m mpidist trace summary`` read it. Compressed if its name ends with ``.gz``.
        Rank 0's counts.
    group : ProcessGroup
        The ranks. Their operations on all groups of the same world are recorded.
    limit : int, optional
        How many events of each rank are kept: operations, waits and regions. A rank that has more
        is recorded up to there, and the file says so.

    Yields
    ------
    None

    Raises
    ------
    OSError
        On all ranks, if the file cannot be written.
    ValueError
        If `limit` is not positive.

    Notes
    -----
    Collective over `group`; blocks at the begin and at the end. Where ranks are on several hosts
    their clocks are compared at both, see [Note: clocks] in `mpidist.tracing.clock`. Every second
    a thread of each rank writes what is new into a file beside `path`, in a directory
    ``<path>.parts``, which is deleted at the end. It stays when the block ends by an error, or the
    rank is killed: then ``python -m mpidist trace merge`` makes the trace of it. A trace replaces
    an earlier one of the same path, and what that one has left in this directory: jobs that run at
    the same time need paths of their own.
    """
    check_group(group, "trace")
    session = Session.begin(Path(path), group, limit=limit)
    try:
        yield
    except BaseException:
        session.abandon()
        raise
    session.end()


class Session:
    """One trace under way, on one rank; collective over `group`, a duplicate, and blocks."""

    def __init__(self, path: Path, group: ProcessGroup, events: Events, file: PartFile) -> None:
        self._path = path
        self._group = group
        self._events = events
        self._file = file
        self._recorder = group.transport.recorder
        self._clocks = all_gather_object(clock_name(), group)
        first = compare_clocks(group, self._clocks)
        self._readings: list[Reading] = [] if first is None else [first]
        # All begin together: a wait for a rank that is not recorded yet would not show.
        barrier(group)
        file.note({"readings": self._readings, "began": time.monotonic_ns()})
        self._recorder.sink = events
        listener.set(events)

    @classmethod
    def begin(cls, path: Path, group: ProcessGroup, *, limit: int = EVENTS) -> Session:
        """Begin to record; see `trace`. Collective over `group`."""
        if limit < 1:
            raise ValueError(f"trace on {group}: limit must be positive, got {limit}")
        path, run = broadcast_object((path.absolute(), os.urandom(8).hex()), group)
        own = group.duplicate(f"{group.name}/trace")
        problem = _prepare(path) if own.rank == 0 else ""
        try:
            _raise_together(problem, own)
            events = Events(own.transport.recorder, limit, marks=listener.get())
            file = _part_file(path, own, events, {"run": run, "limit": limit})
        except OSError:
            own.close()
            raise
        return cls(path, own, events, file)

    def end(self, *, together: bool = True) -> None:
        """Write the trace; collective over the group.

        If `together`, all ranks wait until rank 0 has written it, and raise its errors; otherwise
        the others wait only until it has their parts.

        Raises
        ------
        OSError
            If a rank's part, or the trace, could not be written.
        """
        self._stop()
        last = compare_clocks(self._group, self._clocks)
        readings = self._readings if last is None else [*self._readings, last]
        self._file.note({"readings": readings, "complete": True})
        try:
            self._hand_in(together=together)
        except BaseException:
            self._file.close()
            raise
        self._file.remove()
        self._group.close()

    def _hand_in(self, *, together: bool) -> None:
        """Send the parts to rank 0, which writes the trace; see `end`."""
        group, data = self._group, self._file.finish()
        problem = "" if self._file.problem is None else str(self._file.problem)
        _raise_together(problem, group)
        if group.rank:
            send(np.frombuffer(data, np.uint8), group, dst=0)
        else:
            others = [recv(group, src=rank).tobytes() for rank in range(1, group.size)]
            try:
                write_trace([TracePart.of(part) for part in (data, *others)], self._path)
            except OSError as error:
                problem = str(error)
        if together:
            _raise_together(problem, group)
        elif problem:
            raise OSError(problem)

    def abandon(self) -> None:
        """Leave this rank's part behind, since the others may not arrive; local.

        Waits at most 2 seconds for the file system: the job is ending.
        """
        self._stop()
        # Nothing is imported here: a job that fails may have as many files open as it may have.
        closed = threading.Event()

        def close() -> None:
            with suppress(OSError):
                self._file.close()
            closed.set()

        act_in_thread(close, "mpidist-trace")
        closed.wait(_PATIENCE)

    @property
    def parts(self) -> Path:
        """Directory of the ranks' parts."""
        return self._file.path.parent

    def _stop(self) -> None:
        """Stop recording, and note how far the record goes."""
        events = self._events
        self._recorder.sink = events.outer_sink
        listener.set(events.outer_marks)
        self._file.note(
            {
                "ended": time.monotonic_ns(),
                "dropped": events.dropped,
                "full_at": events.full_at if events.dropped else None,
            }
        )


def _prepare(path: Path) -> str:
    """Make the directory of the trace, without old parts; return what is wrong with it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = part_path(path, 0).parent
        if parts.is_symlink():
            return f"{parts} is a symbolic link; remove it, or give the trace another name"
        for old in parts.glob("rank-*"):
            old.unlink()
    except OSError as error:
        return str(error)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        return f"cannot write {path}"
    return ""


def _part_file(
    path: Path, group: ProcessGroup, events: Events, facts: Mapping[str, Any]
) -> PartFile:
    """Make this rank's file; raises on all ranks if one of them cannot."""
    problem, file = "", None
    own = {
        "rank": group.rank,
        "size": group.size,
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "clock": clock_name(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        file = PartFile(part_path(path, group.rank), events, {**facts, **own})
    except OSError as error:
        problem = str(error)
    try:
        _raise_together(problem, group)
    except OSError:
        if file is not None:
            file.close()
            file.remove()
        raise
    assert file is not None, "there was no problem"
    return file


def _raise_together(problem: str, group: ProcessGroup) -> None:
    """Raise on all ranks what has gone wrong on one; collective."""
    for rank, message in enumerate(all_gather_object(problem, group)):
        if message:
            raise OSError(f"trace on {group}: rank {rank}: {message}")


_job: list[Session] = []


def begin_job_trace(
    directory: str, world: ProcessGroup, at_exit: Callable[[Session], bool]
) -> None:
    """Begin to record from `mpidist.init` to the exit, into a new file in `directory`.

    Does nothing for a second world of the process. `at_exit` has the exit of the process end the
    session, and returns False if the exit has no hooks, since pytest or IPython handle exceptions:
    the ranks leave their parts behind then. Collective over `world`; blocks.

    Raises
    ------
    OSError
        On all ranks, if nothing can be written there.
    """
    if _job:
        return
    started = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    # Jobs in containers may share the directory, the second and the process number.
    own = f"trace-{started}-{os.getpid()}-{os.urandom(4).hex()}.json.gz"
    name = broadcast_object(own, world)
    session = Session.begin(Path(directory, name), world)
    _job.append(session)
    if not at_exit(session):
        # Exit handlers run in reverse order: before mpi4py's, which finalises MPI.
        atexit.register(session.end if world.size == 1 else session.abandon)
