"""Checkpoints as npz files of numpy, and such files as checkpoints. Nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import BFLOAT16, DTYPES
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.format.manifest import StoredArray
from mpidist.checkpoint.tools.foreign import Foreign, copy_array, described, description
from mpidist.checkpoint.tools.sources import Progress, Reader
from mpidist.errors import CheckpointCorruptError, CheckpointIncompatibleError

__all__ = ["open_npz", "write_npz"]

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
    """Write a checkpoint as one npz file, as `numpy.savez` does.

    Parameters
    ----------
    checkpoint : Checkpoint
        What to write.
    path : Path
        Of the file when it is complete.
    file : binary file
        The file, under a temporary name.
    progress : callable
        Is told how many more bytes are written.

    Notes
    -----
    Disk: the largest array a second time, in a temporary file without a name beside `path`: the
    entries of a zip file are written from front to back, and tiles do not come in this order.
    """
    halves = [name for name, array in checkpoint.arrays.items() if array.dtype == BFLOAT16]
    with (
        zipfile.ZipFile(file, "w", allowZip64=True) as archive,
        tempfile.TemporaryFile(dir=path.parent) as whole,
        Reader(checkpoint) as reader,
    ):
        archive.writestr(zipfile.ZipInfo(_DESCRIPTION), description(checkpoint, bfloat16=halves))
        for name, array in checkpoint.arrays.items():
            whole.seek(0)
            whole.truncate()
            whole.write(_header(array))
            whole.flush()
            copy_array(reader, name, array, whole.fileno(), whole.tell(), progress)
            whole.seek(0)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                shutil.copyfileobj(whole, entry, _BLOCK)


def _header(array: StoredArray) -> bytes:
    """Return what stands before the elements in an npy file."""
    dtype = np.dtype(np.uint16) if array.dtype == BFLOAT16 else array.dtype
    descr = np.lib.format.dtype_to_descr(dtype.newbyteorder("<"))
    told = {"descr": descr, "fortran_order": False, "shape": array.shape}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, told)
    return header.getvalue()


@contextmanager
def open_npz(path: Path) -> Iterator[Foreign]:
    """Open an npz file.

    Raises
    ------
    CheckpointCorruptError
        If it is no such file, or damaged.
    CheckpointIncompatibleError
        If an array has a dtype that mpidist has not.

    Notes
    -----
    Disk: the largest array a second time, in a temporary file.
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
        """Let the temporary file go."""
        self._current = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def description(self) -> bytes | None:
        """Return what mpidist has written beside the arrays, if it has."""
        return (
            self._archive.read(_DESCRIPTION) if _DESCRIPTION in self._archive.namelist() else None
        )

    def sources(self, halves: frozenset[str]) -> Mapping[str, _Entry]:
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
            entries[name] = _Entry(self, name, header.shape, BFLOAT16 if half else header.dtype)
        return entries

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


class _Entry:
    """An array of such a file: a `Source`."""

    def __init__(self, archive: _Archive, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._archive = archive
        self._name = name
        self.shape = shape
        self.dtype = dtype

    def read(self, box: Box) -> Array:
        """Return the elements of a part."""
        part = np.asarray(self._archive.array(self._name)[box.slices])
        return part.view(BFLOAT16) if self.dtype == BFLOAT16 else part
