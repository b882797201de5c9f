"""`prune`: removes old checkpoints and what killed saves have left, never the last good one."""

from __future__ import annotations

import os
import time
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mpidist.checkpoint.directory import Checkpoint, absolute, looking, partial, remove, step_of
from mpidist.checkpoint.directory import list as complete_in
from mpidist.checkpoint.format.manifest import MANIFEST, Manifest
from mpidist.checkpoint.loading.reading import check_sizes
from mpidist.checkpoint.saving.writing import is_being_written, was_written_last
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    CheckpointMissingShardError,
    CheckpointNotFoundError,
)

STALE = 3600.0
"""Seconds without a change after which a directory without a manifest is taken for what a killed
job has left, and not for a save that is being written."""


class StepStatus(NamedTuple):
    """What a step that has a manifest looks like.

    Attributes
    ----------
    committed : float
        When its manifest was written, in seconds since 1970: as the manifest says, or, where that
        is damaged, as the file system does.
    problem : CheckpointError or None
        What is wrong with the manifest or the sizes of files; None if nothing is.
    """

    directory: Path
    committed: float
    problem: CheckpointError | None


def prune(path: str | os.PathLike[str], *, keep: int, stale: float = STALE) -> list[Path]:
    """Remove all checkpoints but the newest whole ones, and what killed saves have left.

    Parameters
    ----------
    path : path
        The directory that was given to `save`.
    keep : int
        How many whole ones stay, at least 1: those that were committed last, whatever their steps.
        One whose files are not all there, or do not have their sizes, does not count; it is
        removed when `keep` whole ones are newer.
    stale : float, optional
        Seconds without a change after which a directory without a manifest counts as left by a
        killed save: it may be a save under way.

    Returns
    -------
    list of Path
        What was removed, by step. Never what this process is saving, nor what it has saved last.

    Raises
    ------
    ValueError
        If `keep` is less than 1.
    CheckpointError
        If something could not be looked at, or not be removed.

    Notes
    -----
    Local: to be called on one rank. Reads the manifests, each once in a process, and asks for the
    sizes of all files. The manifest is removed first, so that a kill leaves no checkpoint that
    looks complete.
    """
    directories = prunable(path, keep=keep, stale=stale)
    for directory in directories:
        remove(directory)
    return directories


def prunable(path: str | os.PathLike[str], *, keep: int, stale: float = STALE) -> list[Path]:
    """Return what `prune` would remove, by step."""
    if keep < 1:
        raise ValueError(f"prune: keep must be at least 1, got {keep}; at least one must stay")
    root = absolute(path)
    steps = statuses(root)
    sound = [state for state in steps if state.problem is None]
    old = steps[: steps.index(sound[-keep])] if len(sound) >= keep else []
    removable = [
        state.directory
        for state in old
        if not isinstance(state.problem, CheckpointIncompatibleError)  # a later mpidist's
        and not was_written_last(state.directory)
    ]
    with looking(root):
        removable += [directory for directory in partial(root) if _age(directory) >= stale]
    return sorted((d for d in removable if not is_being_written(d)), key=step_of)


def statuses(path: str | os.PathLike[str]) -> list[StepStatus]:
    """Return what the steps of a directory that have a manifest look like, the newest last.

    Raises CheckpointError if something cannot be looked at.
    """
    root = absolute(path)
    with looking(root):
        steps = [
            state for checkpoint in complete_in(root) if (state := _status(checkpoint)) is not None
        ]
    return sorted(steps, key=lambda state: (state.committed, step_of(state.directory)))


def _status(checkpoint: Checkpoint) -> StepStatus | None:
    """Return what a step looks like; None if it has gone meanwhile."""
    try:
        status = (checkpoint.directory / MANIFEST).stat()
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        try:
            committed, sizes = _summary(checkpoint.directory, stamp)
            check_sizes(checkpoint.directory, sizes)
        except _DAMAGE as error:
            return StepStatus(checkpoint.directory, status.st_mtime, error)
    except (FileNotFoundError, CheckpointNotFoundError):
        return None
    return StepStatus(checkpoint.directory, committed, None)


_DAMAGE = (CheckpointCorruptError, CheckpointIncompatibleError, CheckpointMissingShardError)


@lru_cache(maxsize=64)
def _summary(directory: Path, stamp: object) -> tuple[float, tuple[tuple[str, int], ...]]:
    """Return when a manifest was written, and the files that it names with their sizes."""
    del stamp  # a manifest of another one is another manifest
    manifest: Manifest = Checkpoint(directory).manifest
    try:
        committed = datetime.fromisoformat(manifest.created).timestamp()
    except ValueError as error:
        raise CheckpointCorruptError(
            f"{directory / MANIFEST} says that it was written at {manifest.created!r}"
        ) from error
    return committed, tuple((file.name, file.size) for file in manifest.files)


def _age(directory: Path) -> float:
    """Return the seconds since something in a directory changed."""
    try:
        times = [entry.stat().st_mtime for entry in (directory, *directory.iterdir())]
    except FileNotFoundError:  # it is being written, or removed, right now
        return 0.0
    return time.time() - max(times)
