"""`save` and `save_async`, and the saves that a group has in flight.

All ranks plan a save together, each writes its file alone, and rank 0 commits.

[Note: commit] A checkpoint exists if its manifest does. Every rank writes its file under a
temporary name, syncs it, renames it and syncs the directory, and then reports to rank 0 what lies
where. When rank 0 has the reports of all ranks, it writes the manifest in the same way, and answers
all of them. So there is no instant at which a manifest names something that is not on disk, and a
rank that fails, or dies, leaves a directory without a manifest, which is no checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpidist._arguments import seconds
from mpidist._types import Array
from mpidist.arrays.namespaces import is_host, to_host
from mpidist.backends.work import Work
from mpidist.checkpoint.directory import Checkpoint, clear, commit
from mpidist.checkpoint.format import view
from mpidist.checkpoint.format.files import hdf5_versions
from mpidist.checkpoint.format.manifest import JSON
from mpidist.checkpoint.saving.plan import Planner, SavePlan, assemble, foresee, report_of, view_of
from mpidist.checkpoint.saving.single_file import SINGLE_FILE, check_single_file, write_together
from mpidist.checkpoint.saving.writing import (
    HostBox,
    Stager,
    WriterThread,
    Written,
    begin_write,
    call_now,
    end_write,
    file_name,
    write_file,
)
from mpidist.checkpoint.state import State
from mpidist.errors import CheckpointAsyncError, CheckpointError
from mpidist.group.group import ProcessGroup, check_group
from mpidist.job.end import end_services_at_exit
from mpidist.observe.regions import region
from mpidist.point_to_point import irecv, isend


def save(
    path: str | os.PathLike[str],
    state: State,
    group: ProcessGroup,
    *,
    step: int,
    metadata: JSON = None,
    single_file: bool = False,
) -> Checkpoint:
    """Save a state: each rank writes its part, and the checkpoint exists when all have.

    Parameters
    ----------
    path : path
        Directory of checkpoints, which all ranks see; made if missing. This one is put into
        ``step-000100`` in it, for step 100.
    state : State
        What is kept, by name. Arrays of the same name on several ranks must be the same and are
        written once, shared out over these ranks; `DTensor` and `ShardedArray` say what a rank
        holds of one that is split. Values must be the same on all ranks that have the name.
    group : ProcessGroup
        The ranks that save together.
    step : int
        From 0 to 2**63 - 1.
    metadata : JSON value, optional
        Anything else to store with it; that of rank 0 is kept.
    single_file : bool, optional
        Whether all ranks write one file together, ``arrays.h5``, with each array whole in a dataset
        of its name. For an h5py built with MPI, and groups on MPI. It loads like any other.

    Returns
    -------
    Checkpoint
        The checkpoint, complete and on disk.

    Raises
    ------
    CheckpointError
        On every rank, with the same message, if there is a complete checkpoint of this step, or if
        any rank could not write. Earlier checkpoints are as they were.
    CheckpointAsyncError
        On every rank, if an earlier `save_async` failed and its error has not been raised yet.
    CollectiveMismatchError, SizeMismatchError, UnsupportedOperationError
        On every rank, before anything is written: if the ranks differ, the boxes of an array do not
        cover it, or something cannot be kept.
    BackendUnavailableError
        On every rank, before anything is written: if a single file is asked for where it cannot be.

    Notes
    -----
    Collective over `group`; blocks until the checkpoint is on disk. Rank 0 gathers what all hold
    (of names that all ranks hold whole, 16 bytes per rank), and what they have written (about 100
    bytes per array, 11 per chunk of 64 KiB to 1 MiB). Memory: at most 8 MiB per rank.

    HDF5 has no deadline while it opens or closes a single file: a rank that dies ends the job only
    where the launcher sees to it, as mpirun does.

    See [Note: commit] in `mpidist.checkpoint.saving.save`.
    """
    return _begin(path, state, group, step, metadata, in_flight=0, single_file=single_file).wait()


def save_async(
    path: str | os.PathLike[str],
    state: State,
    group: ProcessGroup,
    *,
    step: int,
    metadata: JSON = None,
    in_flight: int = 1,
) -> CheckpointFuture:
    """Copy a state, and save the copy while the program continues.

    Parameters
    ----------
    path, state, group, step, metadata : as for `save`
        What is saved, and where to.
    in_flight : int, optional
        How many saves may be in progress, this one included; the call first waits for earlier ones.

    Returns
    -------
    CheckpointFuture
        Tells whether the save has ended, and waits for it. It may be dropped: the next save of the
        group, its `progress` and `close`, and the end of the job drive the save to its end.

    Raises
    ------
    Same as `save`
        Errors of writing are raised later, by the future or the next save, as CheckpointAsyncError.

    Notes
    -----
    Collective over `group`; blocks for planning and copying. A thread of each rank writes its file;
    it never communicates. The rest happens in this thread, inside `CheckpointFuture.done` and
    `wait`, the group's `progress` and `close`, and its next save. Memory: a copy of what this rank
    writes, which is kept for the next save.
    """
    if in_flight < 1:
        raise ValueError(f"save_async: in_flight must be at least 1, got {in_flight}")
    return _begin(path, state, group, step, metadata, in_flight=in_flight)


def _begin(
    path: str | os.PathLike[str],
    state: State,
    group: ProcessGroup,
    step: int,
    metadata: JSON,
    *,
    in_flight: int,
    single_file: bool = False,
) -> CheckpointFuture:
    """Plan a save and start it; with in_flight 0 in this thread, without a copy."""
    saver = saver_of(group)
    saver.drain(max(in_flight - 1, 0))

    def check() -> None:
        saver.raise_unreported()
        if single_file:
            check_single_file(saver.group)

    with region("checkpoint plan"):
        file = SINGLE_FILE if single_file else ""
        plan = saver.planner.plan(state, metadata, path, step, file=file, check=check)
    take = saver.stager.copy if in_flight else _in_place
    arrays = plan.flat.arrays
    boxes = [
        HostBox.of(item.name, item.box, view_of(arrays[item.name], item)) for item in plan.local
    ]
    with region("checkpoint copy"):  # it may fail for want of memory, which all must learn
        taken = call_now(take, boxes)
    attributes = {"id": plan.id, "step": int(step), "world_size": group.size}
    submit = saver.thread.submit if in_flight else call_now
    with region("checkpoint write"):
        if single_file:
            written = call_now(write_together, plan, taken, attributes, saver.group)
        else:
            written = submit(_write, plan, taken, {**attributes, "rank": group.rank})
    if in_flight and taken.exception() is None:
        written.add_done_callback(lambda _: saver.stager.release(taken.result()))
    steps = steps_of(plan, written, saver.group, viewed=not single_file)
    future = CheckpointFuture(saver, plan.directory, steps, asynchronous=bool(in_flight))
    saver.pending.append(future)
    begin_write(plan.directory)
    return future


def _in_place(boxes: Sequence[HostBox]) -> list[HostBox]:
    """Return boxes where they are; only those on a device are copied."""
    return [
        box if is_host(box.data) else HostBox.of(box.name, box.box, to_host(box.data))
        for box in boxes
    ]


def _write(plan: SavePlan, taken: Future[list[HostBox]], attributes: Mapping[str, Any]) -> Written:
    path = plan.directory / file_name(attributes["rank"])
    if plan.coordinator is None:
        return write_file(path, taken.result(), attributes)
    header, global_plan = plan.coordinator

    def make_view() -> None:
        view.create_view(plan.directory / view.VIEW, foresee(header, global_plan))

    # The view is made while the disk works, before the files that it shows are complete.
    return write_file(path, taken.result(), attributes, make_view)


_PAUSE = 0.001
"""Seconds between two looks at a save that is waited for with a timeout."""


class CheckpointFuture:
    """A save under way; see `save_async`."""

    def __init__(
        self, saver: Saver, directory: Path, steps: Iterator[Pending], *, asynchronous: bool
    ) -> None:
        self._saver = saver
        self._directory = directory
        self._steps = steps
        self._asynchronous = asynchronous
        self._current: Pending | None = None
        self._over = False
        self._error: Exception | None = None
        self.reported = False

    @property
    def directory(self) -> Path:
        """Where it is being written; absolute, as it was when the save began."""
        return self._directory

    @property
    def failed(self) -> bool:
        """Whether it has ended without a checkpoint."""
        return self._error is not None

    def done(self) -> bool:
        """Drive the save as far as it goes now, and return whether it is over.

        Returns
        -------
        bool
            Whether `wait` will return, or raise, at once.

        Notes
        -----
        Does not block, but that rank 0 writes and syncs the manifest in it, once.
        """
        self._saver.progress()
        return self._over

    def drive(self) -> bool:
        """Take the save as far as it goes now, earlier ones being over; see `done`."""
        while not self._over:
            if self._current is not None and not self._current.done():
                return False
            self._advance()
        return True

    def wait(self, timeout: float | None = None) -> Checkpoint:
        """Return when the checkpoint is complete.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which this rank stops waiting. The save continues, and `wait` may be
            called again. When omitted, each of its steps has the group's.

        Returns
        -------
        Checkpoint
            The checkpoint, complete and on disk.

        Raises
        ------
        CheckpointAsyncError, CheckpointError
            If a rank could not write; on every rank, with the same message, from `save_async` and
            from `save`.
        CheckpointError
            On this rank, if it is not over after `timeout`.
        """
        if timeout is not None:
            self._drive_until(seconds(timeout, f"save of {self.directory}: timeout", least=0.0))
        self.end()
        self.reported = True
        if self._error is not None:
            raise self._error
        return Checkpoint(self.directory)

    def end(self) -> None:
        """Take the save to its end; keep for `wait` what it raises."""
        while not self._over:
            first = self._saver.pending[0]  # in order: their messages have the same tags
            if first._current is not None:
                first._current.wait()
            first._advance()

    def _drive_until(self, timeout: float) -> None:
        """Raise if it is not over in time; by asking, for a message given up breaks the group."""
        deadline = time.monotonic() + timeout
        while not self.done():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"save of {self.directory}: not over after {timeout:g} s. It goes on: wait "
                    "again, or longer"
                )
            time.sleep(_PAUSE)

    def _advance(self) -> None:
        """Take the next step, all that is waited for being over."""
        try:
            self._current = next(self._steps, None)
            self._over = self._current is None
        except Exception as error:  # noqa: BLE001  # raised by `wait`, perhaps later
            self._over = True
            failed = isinstance(error, CheckpointError) and self._asynchronous
            self._error = CheckpointAsyncError(str(error)) if failed else error
        except BaseException as error:
            # A generator that has raised looks like one that has ended.
            self._over = True
            message = f"save of {self.directory} was interrupted by {type(error).__name__}"
            self._error = CheckpointError(f"{message}; nobody knows whether it is complete")
            raise
        finally:
            if self._over:
                self._saver.note_end(self)


class Saver:
    """The saves of a group: its own communicator, its thread, what is in flight."""

    def __init__(self, group: ProcessGroup) -> None:
        hdf5_versions()  # imports h5py, whose exit handler takes parts of it away
        end_services_at_exit()
        self.group = group.duplicate(f"{group.name}/checkpoint")
        self.planner = Planner(self.group)
        self.thread = WriterThread("mpidist checkpoint")
        self.stager = Stager()
        self.pending: deque[CheckpointFuture] = deque()
        self._failed: deque[CheckpointFuture] = deque()

    def note_end(self, future: CheckpointFuture) -> None:
        """Note that a save has ended."""
        self.pending.remove(future)
        end_write(future.directory, complete=not future.failed)
        if future.failed:
            self._failed.append(future)

    def drain(self, most: int) -> None:
        """Wait until at most so many saves are in flight."""
        while len(self.pending) > most:
            self.pending[0].end()

    def raise_unreported(self) -> None:
        """Raise the error of an earlier save that `wait` has not raised yet."""
        while self._failed:
            future = self._failed.popleft()
            if not future.reported:
                future.wait()

    def progress(self) -> None:
        """Drive what is in flight."""
        for future in tuple(self.pending):
            if not future.drive():
                return  # they end in order

    def close(self) -> None:
        """Wait for what is in flight."""
        try:
            self.drain(0)
        finally:
            self.thread.close()
            self.group.close()
        self.raise_unreported()


def saver_of(group: ProcessGroup) -> Saver:
    """Return the saves of a group; collective when first called."""
    check_group(group, "checkpoint")
    return group.service("checkpoint", lambda: Saver(group))


_REPORT, _VERDICT = 1, 2
"""Tags of the messages to and from rank 0."""


class _InThread:
    """What another thread is doing, to be waited for as for a message."""

    def __init__(self, future: Future[Any], what: str, timeout: float) -> None:
        self._future = future
        self._what = what
        self._timeout = timeout

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        wait([self._future], self._timeout)
        if not self._future.done():
            raise CheckpointError(
                f"{self._what} has not ended within {self._timeout:g} s; the disk is slow or "
                "hangs. A longer timeout of the group gives it more time"
            )


Pending: TypeAlias = _InThread | Work[Any]


def steps_of(
    plan: SavePlan, written: Future[Written], group: ProcessGroup, *, viewed: bool
) -> Iterator[Pending]:
    """Take a save from the writing of this rank's file to its commit.

    Yields what has to be over before the next step. `viewed` says that rank 0 makes the view while
    it writes its file. Raises CheckpointError on every rank, with the same message, if a rank could
    not write.

    Notes
    -----
    Nothing here depends on when the ranks ask: rank 0 gets one message from each rank and sends one
    to each, on tags of their own.
    """
    yield _InThread(written, f"writing {plan.directory}", group.timeout)
    problem = _failure(written, group.rank)
    own: JSON = {"problem": problem} if problem else report_of(written.result())
    if plan.coordinator is None:
        sent = isend(_packed(own), group, dst=0, tag=_REPORT)
        answer = irecv(group, src=0, tag=_VERDICT)
        yield sent
        yield answer
        problem = _unpacked(answer.wait())
    else:
        receives = [irecv(group, src=rank, tag=_REPORT) for rank in range(1, group.size)]
        yield from receives
        reports = [own, *(_unpacked(receive.wait()) for receive in receives)]
        problem = next((report["problem"] for report in reports if "problem" in report), None)
        if problem is None:
            problem = _failure(call_now(partial(_conclude, plan, reports, viewed=viewed)), 0)
        if problem is not None:
            problem = f"{problem}. {clear(plan.directory, plan.id)}"
        verdict = _packed(problem)
        yield from [isend(verdict, group, dst=rank, tag=_VERDICT) for rank in range(1, group.size)]
    if problem is not None:
        raise CheckpointError(
            f"save of {plan.directory} on group {group.name!r}: {problem}, and earlier ones are as "
            "they were"
        )


def _conclude(plan: SavePlan, reports: Sequence[JSON], *, viewed: bool) -> None:
    """Do on rank 0 what is left, all files being on disk."""
    assert plan.coordinator is not None, "rank 0 planned it"
    header, global_plan = plan.coordinator
    manifest = assemble(header, global_plan.arrays, reports)
    if not viewed:
        view.create_view(plan.directory / view.VIEW, manifest)
    commit(plan.directory, manifest)


def _failure(future: Future[Any], rank: int) -> str | None:
    error = future.exception()
    if error is None:
        return None
    unseen = isinstance(error, FileNotFoundError)  # rank 0 has made the directory
    cure = "; all ranks must see the directory that rank 0 has made" if unseen else ""
    return f"rank {rank} failed: {type(error).__name__}: {error}{cure}"


def _packed(value: JSON) -> Array:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _unpacked(data: Array) -> JSON:
    return json.loads(data.tobytes())
