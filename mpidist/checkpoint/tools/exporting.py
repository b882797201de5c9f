"""Checkpoints for other packages, and from them: safetensors and npz."""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

from mpidist._new_file import create_unique
from mpidist._optional import require
from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import BFLOAT16, DTYPES, as_bytes
from mpidist.checkpoint.directory import Checkpoint, absolute
from mpidist.checkpoint.format.files import naming, open_regular, rename_synced, write_at
from mpidist.checkpoint.format.manifest import JSON, StoredArray, decode, encode, step_number
from mpidist.checkpoint.loading.reading import check_files, contiguous_ranges
from mpidist.checkpoint.state import flatten
from mpidist.checkpoint.tools.resharding import (
    ArraySource,
    Progress,
    Reader,
    build,
    ignore_progress,
)
from mpidist.errors import (
    BackendUnavailableError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointIncompatibleError,
    DistributedError,
    UnsupportedOperationError,
)


@dataclass(frozen=True)
class Foreign:
    """What a file of another package holds.

    Attributes
    ----------
    sources : mapping of str to ArraySource
        Its arrays, by name, to be read while the file is open.
    values : mapping of str to JSON value
        What is no array, if mpidist has exported it.
    metadata : JSON value
        As given to `save`; of files of others what they say of themselves.
    step : int or None
        The step of the exported checkpoint, if mpidist wrote the file.
    """

    sources: Mapping[str, ArraySource]
    values: Mapping[str, JSON] = field(default_factory=dict)
    metadata: JSON = None
    step: int | None = None


def description(checkpoint: Checkpoint, **more: JSON) -> str:
    """Return, as JSON, what a checkpoint says that is no array."""
    manifest = checkpoint.manifest
    return json.dumps(
        {
            "step": manifest.step,
            "created": manifest.created,
            "versions": dict(manifest.versions),
            "metadata": encode(manifest.metadata),
            "values": encode(dict(manifest.values)),
            **more,
        },
        allow_nan=False,
    )


def described(text: str | bytes, sources: Mapping[str, ArraySource], path: Path) -> Foreign:
    """Return what a file holds that has such a description."""
    try:
        content = json.loads(text)
        values = dict(decode(content["values"]).items())
        return Foreign(sources, values, decode(content["metadata"]), index(content["step"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path}: what mpidist wrote into it beside the arrays is damaged: "
            f"{type(error).__name__}: {error}; export it anew"
        ) from error


@contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[IO[bytes]]:
    """Open a new file under a temporary name; it gets its own, synced, if nothing is raised."""
    with naming(path.parent):
        descriptor, name = create_unique(path.parent, path.name, ".tmp", mode=0o666)
    part = Path(name)
    try:
        with naming(part, nbytes), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename_synced(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def copy_array(
    reader: Reader, name: str, array: StoredArray, descriptor: int, byte: int, progress: Progress
) -> None:
    """Write the elements of an array into a file from an offset on, in C order, little-endian."""
    for item, data in reader.items(name, Box.whole(array.shape)):
        region = item.region.placed_in(array.boxes[item.number].box)
        offset, flat = 0, as_bytes(data)
        for first, count in contiguous_ranges(region, array.shape):
            nbytes = count * array.dtype.itemsize
            write_at(
                descriptor, flat[offset : offset + nbytes], byte + first * array.dtype.itemsize
            )
            offset += nbytes
        progress(data.nbytes)


_DESCRIPTION = "mpidist.json"
"""The entry with what is no array, and the names of arrays of bfloat16, which npy does not know."""

_BLOCK = 1 << 20

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    NotImplementedError,  # of compressions
    RuntimeError,  # of passwords
)


def write_npz(checkpoint: Checkpoint, path: Path, file: IO[bytes], progress: Progress) -> None:
    """Write a checkpoint to an open file as `numpy.savez` does; `path` is its later name.

    Notes
    -----
    Disk: the largest array a second time, in a temporary file without a name beside `path`: the
    entries of a zip file are written from front to back, and chunks do not come in this order.
    """
    halves = [name for name, array in checkpoint.arrays.items() if array.dtype == BFLOAT16]
    with (
        zipfile.ZipFile(file, "w", allowZip64=True) as archive,
        tempfile.TemporaryFile(dir=path.parent) as scratch,
        Reader(checkpoint) as reader,
    ):
        archive.writestr(zipfile.ZipInfo(_DESCRIPTION), description(checkpoint, bfloat16=halves))
        for name, array in checkpoint.arrays.items():
            scratch.seek(0)
            scratch.truncate()
            scratch.write(_header(array))
            scratch.flush()
            copy_array(reader, name, array, scratch.fileno(), scratch.tell(), progress)
            scratch.seek(0)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                shutil.copyfileobj(scratch, entry, _BLOCK)


def _header(array: StoredArray) -> bytes:
    """Return what stands before the elements in an npy file."""
    dtype = np.dtype(np.uint16) if array.dtype == BFLOAT16 else array.dtype
    descr = np.lib.format.dtype_to_descr(dtype.newbyteorder("<"))
    fields = {"descr": descr, "fortran_order": False, "shape": array.shape}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


@contextmanager
def open_npz(path: Path) -> Iterator[Foreign]:
    """Open an npz file.

    Raises CheckpointCorruptError if it is no such file, or damaged, and CheckpointIncompatibleError
    if an array has a dtype that mpidist has not. Disk: the largest array a second time, in a
    temporary file.
    """
    with ExitStack() as stack:
        try:
            archive = _Archive(stack.enter_context(zipfile.ZipFile(path)), path)
            stack.callback(archive.close)
            text = archive.description()
            halves = () if text is None else json.loads(text)["bfloat16"]
            sources = archive.sources(frozenset(halves))
        except CheckpointIncompatibleError:  # which is a ValueError
            raise
        except (*_DAMAGE, KeyError, TypeError) as error:
            raise _damaged(path, error) from error
        yield Foreign(sources) if text is None else described(text, sources, path)


def _damaged(path: Path, error: Exception) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{path} is no npz file of arrays, or is damaged: {type(error).__name__}: {error}"
    )


class _Header(NamedTuple):
    """What an npy file says of its array, and where the elements begin."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: DType
    byte: int


class _Archive:
    """An npz file, of which one array at a time is outside, in a temporary file."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self._path = path
        self._file: IO[bytes] | None = None
        self._current: tuple[str, Array] | None = None

    def close(self) -> None:
        """Close the temporary file."""
        self._current = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def description(self) -> bytes | None:
        """Return what mpidist has written about the arrays, if it has."""
        return (
            self._archive.read(_DESCRIPTION) if _DESCRIPTION in self._archive.namelist() else None
        )

    def sources(self, halves: frozenset[str]) -> Mapping[str, ArraySource]:
        """Return the arrays by name."""
        entries = {}
        for info in self._archive.infolist():
            if info.filename == _DESCRIPTION:
                continue
            name, dot, suffix = info.filename.rpartition(".")
            if (dot, suffix) != (".", "npy") or name in entries:
                raise ValueError(f"{info.filename!r} is no array, or comes twice")
            with self._archive.open(info) as file:
                header = _read_header(file)
            native = header.dtype.newbyteorder("=")
            if native not in DTYPES:
                raise CheckpointIncompatibleError(
                    f"{self._path}: {name!r} has dtype {header.dtype}, which a checkpoint cannot "
                    "keep; what is pickled is never read"
                )
            half = name in halves and native == np.uint16
            dtype = BFLOAT16 if half else header.dtype
            entries[name] = ArraySource(header.shape, dtype, partial(self._read, name, dtype))
        return entries

    def _read(self, name: str, dtype: DType, box: Box) -> Array:
        part = np.asarray(self.array(name)[box.slices])
        return part.view(BFLOAT16) if dtype == BFLOAT16 else part

    def array(self, name: str) -> Array:
        """Return an array, as a map of the temporary file; the one before is gone."""
        if self._current is None or self._current[0] != name:
            self.close()
            self._current = (name, self._extracted(f"{name}.npy"))
        return self._current[1]

    def _extracted(self, entry: str) -> Array:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # until `close`
        try:
            with self._archive.open(entry) as packed:
                shutil.copyfileobj(packed, self._file, _BLOCK)  # verifies the archive's sums
            self._file.seek(0)
            header = _read_header(self._file)
            self._file.flush()
            order: Any = "F" if header.fortran else "C"
            return np.memmap(
                self._file, header.dtype, "r", offset=header.byte, shape=header.shape, order=order
            )
        except _DAMAGE as error:
            raise _damaged(self._path, error) from error


def _read_header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of npy, which only tables have")
    return _Header(*header, file.tell())


_KEY = "mpidist"
"""Of what is no array, in the metadata of such a file: texts by name."""

_TO_NAME: dict[DType, str] = {
    np.dtype(np.bool_): "BOOL",
    **{np.dtype(f"{kind.lower()}{n // 8}"): f"{kind}{n}" for kind in "IU" for n in (8, 16, 32, 64)},
    **{np.dtype(f"f{n // 8}"): f"F{n}" for n in (16, 32, 64)},
    BFLOAT16: "BF16",
    np.dtype(np.complex64): "C64",
}
_TO_DTYPE = {name: dtype for dtype, name in _TO_NAME.items()}


def write_safetensors(
    checkpoint: Checkpoint, path: Path, file: IO[bytes], progress: Progress
) -> None:
    """Write a checkpoint as one file of safetensors; parameters as of `write_npz`.

    Raises UnsupportedOperationError if an array has a dtype or a name that the format has not.

    Not with its library, which wants all arrays in memory at once. The format is: the length of a
    header, 8 bytes; the header, JSON; the arrays, one behind the other.
    """
    arrays = checkpoint.arrays
    unknown = [
        f"{name} ({array.dtype})"
        for name, array in arrays.items()
        if array.dtype not in _TO_NAME or name == "__metadata__"
    ]
    if unknown:
        raise UnsupportedOperationError(
            f"safetensors cannot keep {', '.join(unknown[:5])} of {checkpoint.directory}; export "
            "to .npz, which can"
        )
    del path
    # As its library sorts them: whatever is in front of an array has elements of its length.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_KEY: description(checkpoint)}}
    offset, offsets = 0, {}
    for name in names:
        array = arrays[name]
        offsets[name] = offset
        header[name] = {
            "dtype": _TO_NAME[array.dtype],
            "shape": array.shape,
            "data_offsets": (offset, offset + array.nbytes),
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    front = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    begin = write_at(file.fileno(), front, 0)
    with Reader(checkpoint) as reader:
        for name in names:
            copy_array(reader, name, arrays[name], file.fileno(), begin + offsets[name], progress)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Foreign]:
    """Open a file of safetensors.

    Raises BackendUnavailableError if safetensors is not installed, CheckpointCorruptError if it is
    no such file, or damaged, and CheckpointIncompatibleError if an array has a dtype that mpidist
    has not.
    """
    library = require("safetensors", extra="safetensors", purpose="import from safetensors")
    try:
        opened = library.safe_open(path, framework="numpy")
    except library.SafetensorError as error:
        raise CheckpointCorruptError(
            f"{path} is no file of safetensors, or is damaged: {error}"
        ) from error
    with opened as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {name: str(tensor.get_dtype()) for name, tensor in tensors.items()}
        unknown = [f"{name} ({kind})" for name, kind in kinds.items() if kind not in _TO_DTYPE]
        if unknown:
            raise CheckpointIncompatibleError(
                f"{path}: a checkpoint cannot keep {', '.join(unknown[:5])}; convert it first"
            )
        sources = {
            name: ArraySource(
                tuple(tensor.get_shape()), _TO_DTYPE[kinds[name]], partial(_elements, tensor)
            )
            for name, tensor in tensors.items()
        }
        texts = file.metadata() or {}
        if _KEY in texts:
            yield described(texts[_KEY], sources, path)
        else:
            yield Foreign(sources, metadata=texts or None)


def _elements(tensor: Any, box: Box) -> Array:
    part: Array = np.asarray(tensor[box.slices])
    return part


_Write: TypeAlias = Callable[[Checkpoint, Path, IO[bytes], Progress], None]
_Open: TypeAlias = Callable[[Path], AbstractContextManager[Foreign]]

FORMATS: Mapping[str, tuple[_Write, _Open]] = {
    ".safetensors": (write_safetensors, open_safetensors),
    ".npz": (write_npz, open_npz),
}
"""By the end of the file's name."""


def export_to(path: Path, checkpoint: Checkpoint, *, progress: Progress = ignore_progress) -> None:
    """Write a checkpoint as one file for other packages; its name ends with .safetensors or .npz.

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
    write, _ = _format_of(path)
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
    """Make a file of another package (.safetensors or .npz) a checkpoint, of one rank.

    The step is that of the file when omitted, if mpidist has exported it.

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
    _, opener = _format_of(file)
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


def _format_of(path: Path) -> tuple[_Write, _Open]:
    if path.suffix not in FORMATS:
        raise UnsupportedOperationError(
            f"{path}: the end of the name says the format; known are {' and '.join(FORMATS)}"
        )
    return FORMATS[path.suffix]
