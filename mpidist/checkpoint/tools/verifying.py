"""`verify`: whether a checkpoint is whole, for its own programs and for plain readers of HDF5."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mpidist.arrays.boxes import Box
from mpidist.checkpoint.directory import Checkpoint, find
from mpidist.checkpoint.format.hdf5 import MOST_IN_VIEW, Contents, Dataset, stored_as
from mpidist.checkpoint.format.manifest import ID_DATASET, Manifest, StoredArray, StoredFile
from mpidist.checkpoint.loading.reading import Files, check_file
from mpidist.checkpoint.loading.units import UNIT, Wanted, units_of
from mpidist.checkpoint.saving.commit import VIEW
from mpidist.checkpoint.tools.inspecting import inspect
from mpidist.checkpoint.tools.sources import Progress, unheard
from mpidist.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

__all__ = ["verify"]


def verify(
    path: str | os.PathLike[str], *, step: int | str = "latest", progress: Progress = unheard
) -> builtins.list[CheckpointError]:
    """Read all of a checkpoint, and say what is wrong with it.

    Parameters
    ----------
    path : path
        Directory of checkpoints.
    step : int or "latest", optional
        Which one.
    progress : callable, optional
        Is told now and then how many more bytes are done, of `Checkpoint.nbytes`.

    Returns
    -------
    list of CheckpointError
        Everything that is wrong, of an array at most once per file; none if it is whole. `load` may
        succeed where something is listed: what it does not need, it does not look at.

    Raises
    ------
    CheckpointNotFoundError
        If there is none.

    Notes
    -----
    Local. Looks at the manifest, the presence and length of every file, the digest of every tile,
    and whether HDF5 sees each dataset where the manifest has it, and `view.h5` shows all arrays.
    Memory: 1 MiB and the manifest. Starts a process that opens the files with HDF5, whose library
    does not survive every damaged one.
    """
    checkpoint = find(path, step)
    try:
        manifest = checkpoint.manifest
    except CheckpointNotFoundError:
        raise
    except CheckpointError as error:
        return [error]
    errors: builtins.list[CheckpointError] = []
    seen = inspect(
        [checkpoint.directory / name for name in (*(file.name for file in manifest.files), VIEW)]
    )
    broken = set()
    dtypes = _dtypes(manifest)
    for number, file in enumerate(manifest.files):
        path = checkpoint.directory / file.name
        problem = _of_file(path, file, manifest.id)
        if problem is not None:
            errors.append(problem)
            broken.add(number)
        else:
            errors += _of_structure(path, seen[number], file, dtypes[number], manifest.id)
    errors += _of_tiles(checkpoint, manifest, broken, progress)
    errors += _of_view(checkpoint.directory / VIEW, seen[-1], manifest)
    return errors


def _of_file(path: Path, file: StoredFile, identity: str) -> CheckpointError | None:
    try:
        check_file(path, file, identity)
    except CheckpointError as error:
        return error
    return None


def _dtypes(manifest: Manifest) -> builtins.list[dict[str, str]]:
    """Return the dtype of each dataset in which a box lies, by file and name."""
    identity = {ID_DATASET: stored_as(np.dtype(np.uint8))}
    dtypes: builtins.list[dict[str, str]] = [{} for _ in manifest.files]
    for array in manifest.arrays.values():
        dtype = stored_as(array.dtype)
        for stored in array.boxes:
            dtypes[stored.file][stored.dataset] = dtype
    return [own | identity for own in dtypes]


def _of_structure(
    path: Path, seen: Contents | str, file: StoredFile, dtypes: Mapping[str, str], identity: str
) -> Iterator[CheckpointError]:
    """Say what plain readers of HDF5 see otherwise than the manifest says."""
    if isinstance(seen, str):
        yield CheckpointCorruptError(f"{path} cannot be read as HDF5: {seen}; {_CURE}")
        return
    if seen.id not in (None, identity):
        yield CheckpointCorruptError(
            f"{path} is of another save ({seen.id}) than the manifest beside it ({identity}); "
            f"{_CURE}"
        )
    for name, dataset in file.datasets.items():
        dtype = dtypes.get(name, "")
        expected = Dataset(dataset.byte, dataset.shape, dtype, ())
        found = seen.datasets.get(name)
        if found != expected:
            yield CheckpointCorruptError(
                f"{path}: HDF5 has dataset {name!r} as {_words(found)}, and it was "
                f"written as {_words(expected)}; {_CURE}"
            )


def _of_tiles(
    checkpoint: Checkpoint, manifest: Manifest, broken: set[int], progress: Progress
) -> Iterator[CheckpointError]:
    """Read every tile of the files that are there, and say which are not what was written."""
    memory = np.empty(UNIT, np.uint8)
    with Files(checkpoint.directory, manifest) as files:
        for name, array in manifest.arrays.items():
            told = set(broken)
            for unit in units_of(manifest, [Wanted(name, Box.whole(array.shape))]):
                if unit.file not in told:
                    try:
                        files.load([unit], [memory])
                    except CheckpointError as error:
                        told.add(unit.file)
                        yield error
                progress(unit.nbytes)


def _of_view(path: Path, seen: Contents | str, manifest: Manifest) -> Iterator[CheckpointError]:
    """Say what the view shows otherwise than the manifest says."""
    if isinstance(seen, str):
        yield CheckpointCorruptError(f"{path} cannot be read as HDF5: {seen}; {_HARMLESS}")
        return
    if seen.id != manifest.id:
        yield CheckpointCorruptError(f"{path} is of another save ({seen.id}); {_HARMLESS}")
        return
    expected = {name: _shown(array, manifest) for name, array in manifest.arrays.items()}
    for name, shown in seen.datasets.items():
        if shown != expected.get(name):
            yield CheckpointCorruptError(f"{path}: {name!r} is not what was saved; {_HARMLESS}")
    missing = min(len(expected), MOST_IN_VIEW) - len(seen.datasets)
    if missing > 0:
        yield CheckpointCorruptError(f"{path} lacks {missing} arrays; {_HARMLESS}")


def _shown(array: StoredArray, manifest: Manifest) -> Dataset:
    """Return how a view shows an array."""
    boxes = (stored for stored in array.boxes if not stored.box.empty)
    sources = {(manifest.files[stored.file].name, stored.dataset) for stored in boxes}
    return Dataset(0, array.shape, stored_as(array.dtype), tuple(sorted(sources)))


def _words(dataset: Dataset | None) -> str:
    if dataset is None:
        return "nothing"
    return f"{dataset.dtype}{list(dataset.shape)} at byte {dataset.byte}"


_CURE = "restore it from a copy, or load another step"
_HARMLESS = "mpidist itself never reads it; `reshard` writes a new one"
