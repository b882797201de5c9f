"""`save` and `save_async`: plan together, write alone, agree, commit."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mpidist._types import Array
from mpidist.arrays import to_host
from mpidist.checkpoint import hdf5
from mpidist.checkpoint.commit import VIEW, Save, Waitable, foresee, steps_of
from mpidist.checkpoint.directory import Checkpoint, make_room, step_directory
from mpidist.checkpoint.manifest import JSON, Manifest
from mpidist.checkpoint.plan import Assignment, Declaration, Part, Plan, make_plan, part_of
from mpidist.checkpoint.single_file import SINGLE_FILE, check_single_file, write_together
from mpidist.checkpoint.staging import Staging
from mpidist.checkpoint.state import FlatState, State, as_json, flatten
from mpidist.checkpoint.versions import versions
from mpidist.checkpoint.worker import Worker, done_here
from mpidist.checkpoint.writing import Piece, Written, shard_name, write_file
from mpidist.collectives import broadcast_object, gather_object, scatter_object
from mpidist.errors import (
    CheckpointAsyncError,
    CheckpointError,
    CollectiveMismatchError,
    DistributedError,
)
from mpidist.group import ProcessGroup
from mpidist.hooks import end_companions_at_exit
from mpidist.regions import region

__all__ = ["CheckpointFuture", "save", "save_async", "saver_of"]


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
        written once, shared out over these ranks; `ShardedArray` says what a rank holds of one that
        is split. Values must be the same on all ranks that have the name.
    group : ProcessGroup
        The ranks that save.
    step : int
        At least 0.
    metadata : JSON value, optional
        What else shall be known of it; rank 0's is kept.
    single_file : bool, optional
        Whether all ranks write one file together, ``arrays.h5``, with each array whole in a dataset
        of its name. For an h5py built with MPI, and groups on MPI. It loads like any other.

    Returns
    -------
    Checkpoint
        Complete and on disk.

    Raises
    ------
    CheckpointError
        On every rank, with the same words, if there is a complete checkpoint of this step, or if
        any rank could not write. Earlier checkpoints are as they were.
    CheckpointAsyncError
        On every rank, if an earlier `save_async` failed and nobody has been told.
    CollectiveMismatchError, SizeMismatchError, UnsupportedOperationError
        On every rank, before anything is written: if the ranks differ, the boxes of an array do not
        cover it, or something cannot be kept.
    BackendUnavailableError
        On every rank, before anything is written: if a single file is asked for where it cannot be.

    Notes
    -----
    Collective over `group`; blocks until the checkpoint is on disk. Rank 0 gathers what all hold
    (of names that all ranks hold whole, 16 bytes per rank), and what they have written (about 100
    bytes per array, 11 per 256 KiB of it). Memory: at most 8 MiB per rank.

    HDF5 has no deadline while it writes a single file: a rank that dies then ends the job only
    where the launcher sees to it, as mpirun does.

    See [Note: commit] in `mpidist.checkpoint.commit`.
    """
    save = _begin(path, state, group, step, metadata, in_flight=0, single_file=single_file)
    return save.wait()


def save_async(
    path: str | os.PathLike[str],
    state: State,
    group: ProcessGroup,
    *,
    step: int,
    metadata: JSON = None,
    in_flight: int = 1,
) -> CheckpointFuture:
    """Copy a state, and save the copy while the program goes on.

    Parameters
    ----------
    path, state, group, step, metadata : as for `save`
        What is saved, and where to.
    in_flight : int, optional
        Most saves that may be under way, this one included; the call waits for earlier ones first.

    Returns
    -------
    CheckpointFuture
        To ask, or to wait, for the end. It may be dropped: the next save of the group, its
        `progress` and its `close`, and the end of the job take it on.

    Raises
    ------
    Same as `save`
        What concerns writing comes later: from the future, or the next save, as
        CheckpointAsyncError.

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


class CheckpointFuture:
    """A save under way; see `save_async`."""

    def __init__(self, saver: Saver, save: Save, *, beside: bool) -> None:
        self._saver = saver
        self._save = save
        self._beside = beside
        self._steps: Iterator[Waitable] = steps_of(save, saver.group)
        self._current: Waitable | None = None
        self._over = False
        self._error: Exception | None = None
        self.told = False

    @property
    def directory(self) -> Path:
        """Where it is being written."""
        return self._save.directory

    @property
    def failed(self) -> bool:
        """Whether it is over, and there is no checkpoint."""
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
            Seconds for each of the steps; the group's when omitted.

        Returns
        -------
        Checkpoint
            On disk.

        Raises
        ------
        CheckpointAsyncError, CheckpointError
            If a rank could not write; on every rank, with the same words, from `save_async` and
            from `save`.
        """
        self.end(timeout)
        self.told = True
        if self._error is not None:
            raise self._error
        return Checkpoint(self._save.directory)

    def end(self, timeout: float | None = None) -> None:
        """Take the save to its end; keep for `wait` what it raises."""
        while not self._over:
            first = self._saver.pending[0]  # in order: their messages have the same tags
            if first._current is not None:
                first._current.wait(timeout)
            first._advance()

    def _advance(self) -> None:
        """Take the next step, all that is waited for being over."""
        try:
            self._current = next(self._steps, None)
            self._over = self._current is None
        except Exception as error:  # noqa: BLE001  # raised by whoever waits, also later
            self._over = True
            failed = isinstance(error, CheckpointError) and self._beside
            self._error = CheckpointAsyncError(str(error)) if failed else error
        if self._over:
            self._saver.forget(self)


class Saver:
    """The saves of a group: its own communicator, its thread, what is in flight."""

    def __init__(self, group: ProcessGroup) -> None:
        hdf5.versions()  # imports h5py, whose exit handler takes parts of it away
        end_companions_at_exit()
        self.group = group.duplicate(f"{group.name}/checkpoint")
        self.worker = Worker("mpidist checkpoint")
        self.staging = Staging()
        self.pending: deque[CheckpointFuture] = deque()
        self._failed: deque[CheckpointFuture] = deque()

    def forget(self, future: CheckpointFuture) -> None:
        """Note that a save is over."""
        self.pending.remove(future)
        if future.failed:
            self._failed.append(future)

    def settle(self, most: int) -> None:
        """Wait until at most so many saves are in flight."""
        while len(self.pending) > most:
            self.pending[0].end()

    def raise_untold(self) -> None:
        """Raise what this rank's program has not been told of an earlier save."""
        while self._failed:
            future = self._failed.popleft()
            if not future.told:
                future.wait()

    def progress(self) -> None:
        """Drive what is in flight."""
        for future in tuple(self.pending):
            if not future.drive():
                return  # they end in order

    def close(self) -> None:
        """Wait for what is in flight."""
        try:
            self.settle(0)
        finally:
            self.worker.close()
            self.group.close()
        self.raise_untold()


def saver_of(group: ProcessGroup) -> Saver:
    """Return the saves of a group; collective when first called."""
    return group.companion("checkpoint", lambda: Saver(group))


class _Order(NamedTuple):
    """What rank 0 tells a rank."""

    problem: DistributedError | None
    id: str
    assignment: Assignment


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
    """Plan a save and start it; in flight 0 is in this thread, without a copy."""
    saver = saver_of(group)
    saver.settle(max(in_flight - 1, 0))
    directory = step_directory(Path(path), index(step))
    with region("checkpoint plan"):
        flat, plan, order = _agree(state, metadata, saver, directory, single_file=single_file)
    take = saver.staging.copy if in_flight else _in_place
    parts = {part: part_of(flat.arrays[part.name], part) for part in order.assignment}
    with region("checkpoint copy"):  # it may fail for want of memory, which all must learn
        taken = done_here(take, parts)
    attributes = {"id": order.id, "step": step, "world_size": group.size}
    header, view = None, None
    if plan is not None:
        header = Manifest(
            id=order.id,
            step=step,
            created="",
            world_size=group.size,
            versions=versions(),
            crossovers=asdict(group.crossovers),
            metadata=as_json("metadata", metadata),
            values=plan.values,
        )
        view = partial(_view, directory, header, plan)
    submit = saver.worker.submit if in_flight else done_here
    with region("checkpoint write"):
        if single_file:
            written = done_here(_write_together, directory, taken, plan, attributes, saver.group)
        else:
            mine = {**attributes, "rank": group.rank}
            written = submit(_write, directory, taken, mine, view)
    if in_flight and taken.exception() is None:
        written.add_done_callback(lambda _: saver.staging.release(taken.result()))
    kinds = {} if plan is None else plan.kinds
    save = Save(directory, header, kinds, written, viewed=not single_file)
    future = CheckpointFuture(saver, save, beside=bool(in_flight))
    saver.pending.append(future)
    return future


def _in_place(parts: Mapping[Part, Array]) -> list[Piece]:
    """Return parts of arrays where they are, but for those that are on a device."""
    return [Piece(part.name, part.box, to_host(data)) for part, data in parts.items()]


def _write(
    directory: Path,
    taken: Future[list[Piece]],
    attributes: Mapping[str, Any],
    view: Callable[[], None] | None,
) -> Written:
    path = directory / shard_name(attributes["rank"])
    return write_file(path, taken.result(), attributes, view)


def _view(directory: Path, header: Manifest, plan: Plan) -> None:
    """Make the view before the files are complete that it shows: while the disk works."""
    hdf5.create_view(directory / VIEW, foresee(header, plan))


def _write_together(
    directory: Path,
    taken: Future[list[Piece]],
    plan: Plan | None,
    attributes: Mapping[str, Any],
    group: ProcessGroup,
) -> Written:
    kinds = broadcast_object(None if plan is None else plan.kinds, group)
    return write_together(directory / SINGLE_FILE, taken, kinds, attributes, group)


def _agree(
    state: State, metadata: JSON, saver: Saver, directory: Path, *, single_file: bool
) -> tuple[FlatState, Plan | None, _Order]:
    """Plan a save with all ranks; the plan itself is rank 0's."""
    group = saver.group
    problem: Exception | None = None
    flat = FlatState()
    try:
        saver.raise_untold()
        flat = flatten(state)
        as_json("metadata", metadata)
        if single_file:
            check_single_file(group)
    except DistributedError as error:
        problem = type(error)(f"rank {group.rank}: {error}")
    except Exception as error:  # noqa: BLE001  # an object's own, which all ranks must learn
        problem = CheckpointError(f"rank {group.rank}: {type(error).__name__}: {error}")
    declared = Declaration.of(flat)
    common = xxhash.xxh3_128_digest(_text(declared).encode())
    where = str(directory / SINGLE_FILE if single_file else directory)
    told = gather_object((problem, where, common, declared.sharded), group)
    # Most often all ranks hold the same names whole, and one list of them is enough.
    others = None if told is None else [r for r, (*_, key, _) in enumerate(told) if key != common]
    others = broadcast_object(others, group)
    lists = gather_object(declared if group.rank in others else None, group) if others else None
    plan, orders = None, None
    if told is not None:
        declarations = [
            lists[rank]
            if lists is not None and rank in others
            else Declaration(declared.whole, sharded, declared.values)
            for rank, (*_, sharded) in enumerate(told)
        ]
        problems = [error for error, *_ in told if error is not None]
        problems += _elsewhere([where for _, where, *_ in told])
        plan, orders = _decide(declarations, problems, saver, directory)
    order: _Order = scatter_object(orders, group)
    if order.problem is not None:
        raise order.problem
    return flat, plan, order


def _elsewhere(directories: Sequence[str]) -> Iterator[DistributedError]:
    """Say which ranks would write elsewhere than rank 0, perhaps into a complete checkpoint."""
    for rank, directory in enumerate(directories):
        if directory != directories[0]:
            yield CollectiveMismatchError(
                f"rank {rank} saves to {directory}, and rank 0 to {directories[0]}; give the same "
                "path, step and single_file on all ranks"
            )


def _text(declared: Declaration) -> str:
    """Return a text that is the same exactly where whole arrays and values are."""
    values = sorted(declared.values.items(), key=lambda item: item[0])
    return repr((sorted(declared.whole.items()), values))


def _decide(
    declarations: list[Declaration],
    problems: list[DistributedError],
    saver: Saver,
    directory: Path,
) -> tuple[Plan | None, list[_Order]]:
    """Make the plan and the directory, on rank 0."""
    identity = uuid.uuid4().hex
    plan = None
    try:
        if problems:
            raise problems[0]
        plan = make_plan(declarations)
        _make_room(saver, directory)
    except DistributedError as error:
        words = f"save of {directory} on {saver.group}: {error}"
        return None, [_Order(type(error)(words), "", [])] * len(declarations)
    return plan, [_Order(None, identity, assignment) for assignment in plan.assignments]


def _make_room(saver: Saver, directory: Path) -> None:
    """Make the directory of a step, or empty one that a killed save has left."""
    if any(future.directory == directory for future in saver.pending):
        raise CheckpointError("an earlier save of this step is still under way; wait for it")
    try:
        make_room(directory)
    except CheckpointError as error:
        raise CheckpointError(f"rank 0: {error}") from error
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        raise CheckpointError(f"rank 0 cannot make it: {type(error).__name__}: {error}") from error
