"""A directory of checkpoints: which steps are there, complete or in part."""

from __future__ import annotations

import builtins
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
import xxhash

from mpidist.checkpoint.format.files import (
    exists,
    naming,
    read_regular,
    rename_synced,
    sync_directory,
    temporary,
    write_at,
)
from mpidist.checkpoint.format.manifest import (
    JSON,
    MANIFEST,
    MOST_BYTES,
    MOST_STEP,
    Manifest,
    StoredArray,
    step_number,
)
from mpidist.checkpoint.format.parsing import parse_manifest
from mpidist.collectives import all_gather, all_gather_object
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CollectiveMismatchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
"""What begins with a scheme. A `Path` made of ``s3://bucket`` has one slash left."""


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return a path that means the same after the working directory has changed.

    Symbolic links are kept: what they lead to may be named otherwise on another host.

    Raises
    ------
    UnsupportedOperationError
        If it is a URL, such as ``s3://bucket/run``.
    CheckpointError
        If it is relative, and the working directory is gone.
    """
    text = os.fsdecode(path)
    scheme = _URL.match(text)
    if scheme:
        raise UnsupportedOperationError(
            f"{text!r} is a URL, and checkpoints are kept in directories of a file system; give "
            f"the path of one that all ranks see (a local directory {scheme[1]}: is ./{text})"
        )
    try:
        return Path(text).absolute()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{text!r} is relative, and the working directory of this process has been removed; "
            "give an absolute path"
        ) from error


def check_same(what: str, group: ProcessGroup) -> None:
    """Raise on all ranks unless `what`, such as a path and a step, is the same on all of them.

    Raises
    ------
    CollectiveMismatchError
        On every rank, with the same message, which names the first rank that differs from rank 0.

    Notes
    -----
    Collective over `group`; blocks. One all_gather of 16 bytes.
    """
    digest = np.frombuffer(xxhash.xxh3_128_digest(os.fsencode(what)), np.uint8)
    table = all_gather(digest, group).reshape(group.size, -1)
    if (table == table[0]).all():
        return
    texts = all_gather_object(what, group)
    rank = next(rank for rank, other in enumerate(texts) if other != texts[0])
    raise CollectiveMismatchError(
        f"rank {rank} of group {group.name!r} has {texts[rank]}, and rank 0 has {texts[0]}; give "
        "all ranks the same arguments, with an absolute path where their working directories differ"
    )


_STEP = re.compile(r"step-(\d{6,19})", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes
    ----------
    directory : Path
        Where its files are; absolute.

    Notes
    -----
    Everything else is read from its manifest when it is asked for first, unless `load` has given it
    to all ranks, and verified: it may raise the errors of `parse_manifest`.
    """

    directory: Path
    _known: Manifest | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", absolute(self.directory))

    @cached_property
    def manifest(self) -> Manifest:
        """All that it states about itself."""
        if self._known is not None:
            return self._known
        path = self.directory / MANIFEST
        try:
            return manifest_of(self.directory, read_regular(path, MOST_BYTES + 1))
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"{self.directory} holds no complete checkpoint: there is no {MANIFEST}"
            ) from error
        except OSError as error:
            message = f"{path} cannot be read: {type(error).__name__}: {error}"
            raise CheckpointError(message) from error

    @property
    def step(self) -> int:
        """The step that it was saved at."""
        return step_of(self.directory)

    @property
    def world_size(self) -> int:
        """The number of ranks that saved it."""
        return self.manifest.world_size

    @property
    def created(self) -> str:
        """When it was committed, ISO 8601, UTC."""
        return self.manifest.created

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of mpidist and of the libraries that wrote it."""
        return self.manifest.versions

    @property
    def metadata(self) -> JSON:
        """What the user gave to `save` as metadata."""
        return self.manifest.metadata

    @property
    def values(self) -> Mapping[str, JSON]:
        """Everything that is not an array, by name."""
        return self.manifest.values

    @property
    def arrays(self) -> Mapping[str, StoredArray]:
        """Dtype, shape and boxes of its arrays, by name."""
        return self.manifest.arrays

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def manifest_of(directory: Path, data: bytes) -> Manifest:
    """Return the manifest in the directory of a step; raises as `parse_manifest`.

    CheckpointCorruptError also if it is of another step than the directory.
    """
    path = directory / MANIFEST
    manifest = parse_manifest(data, path)
    if manifest.step != step_of(directory):
        raise CheckpointCorruptError(
            f"{path} is of step {manifest.step}: {directory.name} holds the checkpoint of step "
            f"{manifest.step}; give the directory its name back, or load another step"
        )
    return manifest


def step_directory(path: str | os.PathLike[str], step: int) -> Path:
    """Return where the checkpoint of a step is, or would be; ValueError as `step_number`."""
    return absolute(path) / f"step-{step_number(step):06d}"


def step_of(directory: Path) -> int:
    """Undo `step_directory`; ValueError for other names."""
    step = _step_in(directory.name)
    if step is None:
        raise ValueError(f"{directory} is not the directory of a step, such as step-000100")
    return step


def _step_in(name: str) -> int | None:
    """Return the step that a directory is named by, or None: each step has one name."""
    match = _STEP.fullmatch(name)
    step = MOST_STEP + 1 if match is None else int(match[1])
    return step if step <= MOST_STEP and name == f"step-{step:06d}" else None


def list(path: str | os.PathLike[str]) -> builtins.list[Checkpoint]:  # noqa: A001
    """Return the complete checkpoints of a directory.

    Parameters
    ----------
    path : path
        The directory that was given to `save`.

    Returns
    -------
    list of Checkpoint
        By step; none if the directory is not there. Their manifests exist; `verify` checks
        their files.

    Raises
    ------
    CheckpointError
        If the directory, or what is in it, cannot be looked at.

    Notes
    -----
    Local.
    """
    return [Checkpoint(step_path) for step_path in _steps(path, complete=True)]


def latest(path: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the complete checkpoint with the highest step, or None if there is none.

    Notes
    -----
    Local. On several ranks the answers may differ while one is being committed; `load` asks once.
    """
    checkpoints = list(path)
    return checkpoints[-1] if checkpoints else None


def find(path: str | os.PathLike[str], step: int | str) -> Checkpoint:
    """Return the checkpoint of a step, or of ``"latest"``.

    Raises
    ------
    CheckpointNotFoundError
        If there is none; it says which there are.
    """
    path = absolute(path)
    try:
        step = step if step == "latest" else step_number(step)
    except ValueError as error:
        raise CheckpointNotFoundError(f"{path}: {error}; or give 'latest'") from None
    complete = list(path)
    chosen = complete[-1:] if step == "latest" else [c for c in complete if c.step == step]
    if chosen:
        return chosen[0]
    what = "any step" if step == "latest" else f"step {step}"
    steps = ", ".join(str(c.step) for c in complete[-5:]) or "none"
    others = "" if path.is_dir() else "; there is no such directory"
    raise CheckpointNotFoundError(
        f"no complete checkpoint of {what} in {path}; complete are: {steps}{others}"
    )


def partial(path: str | os.PathLike[str]) -> builtins.list[Path]:
    """Return the directories of steps that are no checkpoints: left by a kill, or being written."""
    return _steps(path, complete=False)


def create_directory(directory: Path, identity: str) -> None:
    """Make the directory of a step for a save, or empty one that a killed save has left.

    The id of the save is put into what is going to be the manifest, under its temporary name, and
    says to which save the directory belongs; see `claimed`.

    Raises
    ------
    CheckpointError
        If there is a complete checkpoint.
    OSError
        If it cannot be made.
    """
    if exists(directory / MANIFEST):
        raise CheckpointError(
            "there is a complete checkpoint of this step, which is never overwritten; save to "
            "another directory or step, or remove that one first"
        )
    if exists(directory):
        remove(directory)
    fresh = [parent for parent in directory.parents if not exists(parent)]
    directory.mkdir(parents=True)
    claim = temporary(directory / MANIFEST)
    try:
        with naming(claim):
            descriptor = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_at(descriptor, np.frombuffer(identity.encode(), np.uint8), 0)
            finally:
                os.close(descriptor)
        for made in fresh:
            sync_directory(made.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


@contextmanager
def claimed(directory: Path, identity: str) -> Iterator[int]:
    """Open what is going to be the manifest, if the directory still belongs to a save with this id.

    Raises CheckpointError if another process has removed the directory since, or saves the same
    step.
    """
    claim = temporary(directory / MANIFEST)
    try:
        descriptor = os.open(claim, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError(_LOST.format(directory)) from None
    try:
        if os.pread(descriptor, len(identity) + 1, 0) != identity.encode():
            raise CheckpointError(_LOST.format(directory))
        yield descriptor
    finally:
        os.close(descriptor)


_LOST = (
    "another process has removed {}, or saves the same step there; let each run have a directory "
    "of its own"
)


def commit(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, all other files being on disk: from then on the checkpoint exists.

    Raises
    ------
    OSError
        If it cannot be written; there is none then, unless the disk does not even take it back.
    CheckpointError
        If it is larger than what is read, or the directory belongs to another save by now.
    """
    sync_directory(directory.parent)
    path = directory / MANIFEST
    part = temporary(path)
    data = np.frombuffer(manifest.to_bytes(), np.uint8)
    if data.nbytes > MOST_BYTES:
        raise CheckpointError(
            f"the manifest would have {data.nbytes} bytes, and at most {MOST_BYTES} are read; save "
            "fewer or larger pieces"
        )
    with naming(part, data.nbytes), claimed(directory, manifest.id) as descriptor:
        os.ftruncate(descriptor, 0)
        write_at(descriptor, data, 0)
        os.fsync(descriptor)
    try:
        rename_synced(part, path)
    except FileExistsError:  # another save's, which is complete
        raise
    except OSError:
        with suppress(OSError):  # the first one says more
            path.replace(part)
        raise


def clear(directory: Path, identity: str) -> str:
    """Remove what a failed save has left, unless it belongs to another save by now.

    Returns a sentence that says whether there is a checkpoint now.

    Notes
    -----
    The manifest goes first: where it cannot, the files stay that it names, which loading needs.
    """
    manifest = directory / MANIFEST
    try:
        if not exists(directory):
            return "There is no such checkpoint"
        if not _belongs(directory, identity):
            return "What is there belongs to another save, and was left alone"
        manifest.unlink(missing_ok=True)
    except (OSError, CheckpointError):
        return "Its manifest could not be taken away again: it may be there, and complete"
    shutil.rmtree(directory, ignore_errors=True)
    return "There is no such checkpoint"


def _belongs(directory: Path, identity: str) -> bool:
    """Return whether a directory is still that of a save: by its manifest, or what becomes one."""
    manifest = directory / MANIFEST
    for path in (manifest, temporary(manifest)):
        with suppress(FileNotFoundError):
            return identity.encode() in read_regular(path, MOST_BYTES + 1)
    return False


def remove(directory: Path) -> None:
    """Remove the directory of a step, the manifest first; of a symbolic link nothing but itself.

    Raises CheckpointError if the system refuses to.
    """
    manifest = directory / MANIFEST
    try:
        if directory.is_symlink():
            directory.unlink()
            return
        if exists(manifest):
            manifest.replace(temporary(manifest))
            sync_directory(directory)
        shutil.rmtree(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be removed: {error}") from error


def set_aside(directory: Path) -> Path:
    """Give the directory of a step a name under which it is none, and return that.

    Raises CheckpointError if the system refuses to.
    """
    try:
        names = (directory.with_name(f"{directory.name}.aside-{number}") for number in count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        directory.rename(aside)
        sync_directory(directory.parent)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be set aside: {error}") from error
    return aside


def _steps(path: str | os.PathLike[str], *, complete: bool) -> builtins.list[Path]:
    """Return the directories of steps that have a manifest, or that have none, by step."""
    root = absolute(path)
    # Not `Path.is_dir`, which takes what it cannot see for something that is not there.
    with looking(root):
        try:
            with os.scandir(root) as entries:
                names = [e.name for e in entries if _step_in(e.name) is not None and e.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        steps = sorted((root / name for name in names), key=step_of)
        return [step for step in steps if exists(step / MANIFEST) is complete]


@contextmanager
def looking(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise CheckpointError, naming a path, for what the system raises in the block."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
