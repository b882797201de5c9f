"""`verify`: whether a checkpoint is whole, for its own programs and for plain readers of HDF5."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mpidist.arrays.boxes import Box
from mpidist.checkpoint.directory import Checkpoint, find
from mpidist.checkpoint.format.manifest import ID_DATASET, JSON, Manifest, StoredArray, StoredFile
from mpidist.checkpoint.format.view import (
    MOST_IN_VIEW,
    VIEW,
    Contents,
    Dataset,
    contents,
    stored_as,
)
from mpidist.checkpoint.loading.reading import MAX_READ, BoxRequest, Files, check_file, read_items
from mpidist.checkpoint.tools.resharding import Progress, ignore_progress
from mpidist.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

_SECONDS = 60.0
"""Within which the process has to answer, and one more for each file."""

_CHILD = (
    "import sys; sys.path[:] = {}; from mpidist.checkpoint.tools.verifying import answer; answer()"
)


def inspect(paths: Sequence[Path]) -> list[Contents | str]:
    """Return for each file what HDF5 sees in it, or why that is unknown.

    Starts one process, and one more after each file that ends it.
    """
    answers: list[Contents | str] = []
    while len(answers) < len(paths):
        replies, end = _ask(paths[len(answers) :])
        answers += replies
        if len(answers) < len(paths):
            answers.append(end)
    return answers


def _ask(paths: Sequence[Path]) -> tuple[list[Contents | str], str]:
    """Return what a process has answered before it ended, and how it ended."""
    seconds = _SECONDS + len(paths)
    try:
        child = subprocess.run(  # noqa: S603  # this interpreter, and a text of ours
            [sys.executable, "-c", _CHILD.format(sys.path)],
            input="\n".join(json.dumps(str(path)) for path in paths).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        output = child.stdout
        reason = _exit_text(child.returncode, child.stderr)
        end = f"the library of HDF5 does not survive it ({reason})"
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        end = f"the library of HDF5 comes to no end with it in {seconds:g} s"
    return [_read(json.loads(line)) for line in output.splitlines()], end


def _exit_text(code: int, stderr: bytes) -> str:
    if code < 0:
        return signal.Signals(-code).name
    lines = stderr.decode(errors="replace").splitlines()
    return f"exit code {code}: {lines[-1] if lines else ''}"


def answer() -> None:
    """Print what is in the files that standard input names, one line for each."""
    for line in sys.stdin:
        answer: JSON
        try:
            seen = contents(Path(json.loads(line)))
            answer = [seen.id, seen.datasets]
        except (OSError, CheckpointCorruptError) as error:
            answer = str(error)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _read(answer: JSON) -> Contents | str:
    if isinstance(answer, str):
        return answer
    identity, datasets = answer
    return Contents(
        identity,
        {
            name: Dataset(byte, tuple(shape), dtype, tuple(map(tuple, sources)))
            for name, (byte, shape, dtype, sources) in datasets.items()
        },
    )


def verify(
    path: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    progress: Progress = ignore_progress,
) -> builtins.list[CheckpointError]:
    """Read all of a checkpoint, and say what is wrong with it.

    Parameters
    ----------
    path : path
        The directory that was given to `save`.
    step : int or "latest", optional
        Which one; the newest complete one when omitted.
    progress : callable, optional
        Called now and then with how many more bytes are done, of `Checkpoint.nbytes`.

    Returns
    -------
    list of CheckpointError
        Everything that is wrong, of an array at most once per file; none if it is whole. `load` may
        succeed where something is listed: what it does not need, it does not look at.

    Raises
    ------
    CheckpointNotFoundError
        If there is no complete checkpoint of this step.

    Notes
    -----
    Local. Looks at the manifest, the presence and length of every file, the digest of every chunk,
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
        try:
            check_file(path, file, manifest.id)
        except CheckpointError as error:
            errors.append(error)
            broken.add(number)
        else:
            errors += _of_structure(path, seen[number], file, dtypes[number], manifest.id)
    errors += _of_chunks(checkpoint, manifest, broken, progress)
    errors += _of_view(checkpoint.directory / VIEW, seen[-1], manifest)
    return errors


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
        actual = seen.datasets.get(name)
        if actual != expected:
            yield CheckpointCorruptError(
                f"{path}: HDF5 has dataset {name!r} as {_dataset_text(actual)}, and it was "
                f"written as {_dataset_text(expected)}; {_CURE}"
            )


def _of_chunks(
    checkpoint: Checkpoint, manifest: Manifest, broken: set[int], progress: Progress
) -> Iterator[CheckpointError]:
    """Read every chunk of the files that are there, and say which are not what was written."""
    memory = np.empty(MAX_READ, np.uint8)
    with Files(checkpoint.directory, manifest) as files:
        for name, array in manifest.arrays.items():
            reported = set(broken)
            for item in read_items(manifest, [BoxRequest(name, Box.whole(array.shape))]):
                if item.file not in reported:
                    try:
                        files.load([item], [memory])
                    except CheckpointError as error:
                        reported.add(item.file)
                        yield error
                progress(item.nbytes)


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


def _dataset_text(dataset: Dataset | None) -> str:
    if dataset is None:
        return "nothing"
    return f"{dataset.dtype}{list(dataset.shape)} at byte {dataset.byte}"


_CURE = "restore it from a copy, or load another step"
_HARMLESS = "mpidist itself never reads it; `reshard` writes a new one"
