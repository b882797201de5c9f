"""Checkpoints for other packages, and from them: safetensors and npz."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mpidist.checkpoint.directory import Checkpoint, absolute
from mpidist.checkpoint.format.files import open_regular
from mpidist.checkpoint.format.manifest import step_number
from mpidist.checkpoint.loading.reading import check_files
from mpidist.checkpoint.state import flatten
from mpidist.checkpoint.tools.formats import (
    Foreign,
    new_file,
    open_npz,
    open_safetensors,
    write_npz,
    write_safetensors,
)
from mpidist.checkpoint.tools.resharding import Progress, build, ignore_progress
from mpidist.errors import (
    BackendUnavailableError,
    CheckpointCorruptError,
    CheckpointError,
    DistributedError,
    UnsupportedOperationError,
)


class Format(NamedTuple):
    """The operations of a format."""

    write: Callable[[Checkpoint, Path, IO[bytes], Progress], None]
    open: Callable[[Path], AbstractContextManager[Foreign]]


FORMATS: Mapping[str, Format] = {
    ".safetensors": Format(write_safetensors, open_safetensors),
    ".npz": Format(write_npz, open_npz),
}
"""By the end of the file's name."""


def export_to(path: Path, checkpoint: Checkpoint, *, progress: Progress = ignore_progress) -> None:
    """Write a checkpoint as one file for other packages.

    Parameters
    ----------
    path : Path
        The file; its name ends with .safetensors or .npz.
    checkpoint : Checkpoint
        What to export: arrays, values, metadata and step.
    progress : callable, optional
        Called now and then with how many more bytes are done, of `checkpoint.nbytes`.

    Raises
    ------
    UnsupportedOperationError
        If the format is another one, or has no place for a dtype.
    CheckpointCorruptError, CheckpointMissingShardError
        If a file of the checkpoint is damaged, cut off or missing: all digests are compared.
    CheckpointError
        If the file is there already, or cannot be written. No part of it is left.

    Notes
    -----
    Local. Memory: some blocks of 1 MiB, whatever the arrays' sizes. bfloat16 is a dtype of
    safetensors; in npz it is uint16, and the entry mpidist.json names the arrays.
    """
    write = _format_of(path).write
    path = absolute(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is there already, and never overwritten; remove it first")
    check_files(checkpoint.directory, checkpoint.manifest)
    try:
        with new_file(path, checkpoint.nbytes) as file:
            write(checkpoint, path, file, progress)
    except DistributedError:
        raise
    except OSError as error:
        message = f"{path} cannot be written: {type(error).__name__}: {error}"
        raise CheckpointError(message) from error


def import_from(
    file: Path, path: Path, *, step: int | None = None, progress: Progress = ignore_progress
) -> Checkpoint:
    """Make a file of another package a checkpoint, of one rank.

    Parameters
    ----------
    file : Path
        Its name ends with .safetensors or .npz.
    path : Path
        The directory of checkpoints to write to.
    step : int, optional
        Of the checkpoint; that of the file when omitted, if mpidist has exported it.
    progress : callable, optional
        Called now and then with how many more bytes are done.

    Returns
    -------
    Checkpoint
        The new checkpoint, complete and on disk.

    Raises
    ------
    UnsupportedOperationError
        If neither is a step given, nor does the file know one, or no checkpoint can have it.
    CheckpointError
        If the file cannot be read, or the checkpoint not be written, or there is one of this step.
    CheckpointCorruptError
        If the file is damaged.
    CheckpointIncompatibleError, UnsupportedOperationError
        If it has a dtype or a name that a checkpoint cannot have.
    BackendUnavailableError
        If the package is not installed that reads it.

    Notes
    -----
    Local. Memory: some blocks of at most 8 MiB. Nothing is unpickled.
    """
    opener = _format_of(file).open
    file = absolute(file)
    try:
        with suppress(FileNotFoundError):  # reported below, after a package that is missing
            os.close(open_regular(file))  # the packages would wait at a FIFO
        with opener(file) as foreign:
            number = _step_of(foreign, step, file)
            blank = np.zeros((), np.uint8)
            names = {name: np.broadcast_to(blank, s.shape) for name, s in foreign.sources.items()}
            flatten({**names, **foreign.values})  # refuses names that cannot be
            return build(
                path,
                foreign.sources,
                foreign.values,
                step=number,
                metadata=foreign.metadata,
                progress=progress,
            )
    except DistributedError as error:
        if str(file) in str(error) or isinstance(error, BackendUnavailableError):
            raise
        raise type(error)(f"{file}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a package raises that reads a damaged file
        raise CheckpointCorruptError(
            f"{file} is damaged: {type(error).__name__}: {error}"
        ) from error


def _step_of(foreign: Foreign, step: int | None, file: Path) -> int:
    """Return the step that is given, or that a file knows; raise UnsupportedOperationError."""
    number = foreign.step if step is None else step
    if number is None:
        raise UnsupportedOperationError(
            f"{file} does not know of which step it is; say it with --step"
        )
    try:
        return step_number(number)
    except ValueError as error:
        raise UnsupportedOperationError(f"{file}: {error}; say it with --step") from None


def _format_of(path: Path) -> Format:
    if path.suffix not in FORMATS:
        raise UnsupportedOperationError(
            f"{path}: the end of the name says the format; known are {' and '.join(FORMATS)}"
        )
    return FORMATS[path.suffix]
