"""`save` and `save_async`: agree, write alone, commit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from mpidist._types import Array
from mpidist.arrays.namespaces import to_host
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.format import hdf5
from mpidist.checkpoint.format.manifest import JSON, Manifest
from mpidist.checkpoint.saving.agreement import Agreement, agree
from mpidist.checkpoint.saving.commit import VIEW, Save, foresee
from mpidist.checkpoint.saving.plan import Part, Plan, part_of
from mpidist.checkpoint.saving.running import begin_write
from mpidist.checkpoint.saving.saver import CheckpointFuture, saver_of
from mpidist.checkpoint.saving.single_file import SINGLE_FILE, write_together
from mpidist.checkpoint.saving.worker import done_here
from mpidist.checkpoint.saving.writing import Piece, Written, shard_name, write_file
from mpidist.checkpoint.state import State
from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup
from mpidist.observe.regions import region

__all__ = ["save", "save_async"]


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
        From 0 to 2**63 - 1.
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
    bytes per array, 11 per tile of 64 KiB to 1 MiB). Memory: at most 8 MiB per rank.

    HDF5 has no deadline while it opens or closes a single file: a rank that dies ends the job only
    where the launcher sees to it, as mpirun does.

    See [Note: commit] in `mpidist.checkpoint.saving.commit`.
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
    with region("checkpoint plan"):
        agreed = agree(state, metadata, saver, path, step, single_file=single_file)
    directory = agreed.directory
    take = saver.staging.copy if in_flight else _in_place
    parts = [(part, part_of(agreed.flat.arrays[part.name], part)) for part in agreed.assignment]
    with region("checkpoint copy"):  # it may fail for want of memory, which all must learn
        taken = done_here(take, parts)
    attributes = {"id": agreed.id, "step": int(step), "world_size": group.size}
    submit = saver.worker.submit if in_flight else done_here
    with region("checkpoint write"):
        if single_file:
            written = done_here(_write_together, directory, taken, agreed, attributes, saver.group)
        else:
            mine = {**attributes, "rank": group.rank}
            written = submit(_write, directory, taken, mine, agreed)
    if in_flight and taken.exception() is None:
        written.add_done_callback(lambda _: saver.staging.release(taken.result()))
    save = Save(directory, agreed.lead, written, viewed=not single_file)
    future = CheckpointFuture(saver, save, beside=bool(in_flight))
    saver.pending.append(future)
    begin_write(directory)
    return future


def _in_place(parts: Sequence[tuple[Part, Array]]) -> list[Piece]:
    """Return parts of arrays where they are, but for those that are on a device."""
    return [Piece(part.name, part.box, to_host(data)) for part, data in parts]


def _write(
    directory: Path,
    taken: Future[list[Piece]],
    attributes: Mapping[str, Any],
    agreed: Agreement,
) -> Written:
    path = directory / shard_name(attributes["rank"])
    # The view is made before the files are complete that it shows: while the disk works.
    if agreed.lead is None:
        return write_file(path, taken.result(), attributes)
    view = partial(_view, directory, *agreed.lead)
    return write_file(path, taken.result(), attributes, view)


def _view(directory: Path, header: Manifest, plan: Plan) -> None:
    hdf5.create_view(directory / VIEW, foresee(header, plan))


def _write_together(
    directory: Path,
    taken: Future[list[Piece]],
    agreed: Agreement,
    attributes: Mapping[str, Any],
    group: ProcessGroup,
) -> Written:
    kinds = broadcast_object(agreed.lead and agreed.lead[1].kinds, group)
    return write_together(directory / SINGLE_FILE, taken, kinds, attributes, group)
