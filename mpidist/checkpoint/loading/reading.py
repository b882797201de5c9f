"""Reading units out of the files of a checkpoint, and whether they are right."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mpidist._types import Array
from mpidist.checkpoint.format.files import open_regular, read_at
from mpidist.checkpoint.format.manifest import ID_DATASET, Manifest, StoredFile
from mpidist.checkpoint.format.tiles import DIGEST_BYTES, Tiling, digests_of
from mpidist.checkpoint.loading.units import Unit, runs_in_file
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingShardError,
)

__all__ = ["Files", "check_file", "check_files", "check_sizes"]

_MOST_PARTS = 512
"""Places in memory that one call of the system fills; it takes 1,024."""

_MOST_OPEN = 256
"""Files that are open at once: a process may often have no more than 1,024."""


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise unless all files are there, in their full length, and of the manifest's save.

    Raises
    ------
    CheckpointMissingShardError, CheckpointCorruptError
        Naming the file.

    Notes
    -----
    Where the state has values only, nothing else ties a manifest to the files beside it.
    """
    for file in manifest.files:
        check_file(directory / file.name, file, manifest.id)


def check_sizes(directory: Path, sizes: Iterable[tuple[str, int]]) -> None:
    """Raise unless files are there and have their sizes; opens none.

    Raises
    ------
    CheckpointMissingShardError, CheckpointCorruptError
        Naming the file.
    OSError
        If one cannot be looked at.
    """
    for name, size in sizes:
        path = directory / name
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise _missing(path, error) from error
        if status.st_size != size or not stat.S_ISREG(status.st_mode):
            raise _cut_off(path, size, status.st_size)


def check_file(path: Path, file: StoredFile, identity: str) -> None:
    """Raise unless a file is there, in its full length, and of the save with this id."""
    place = file.datasets.get(ID_DATASET)
    found: bytes | None = None
    try:
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if place is not None and size == file.size:  # other programs may leave it out
                found = os.pread(descriptor, len(identity), place.byte)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _missing(path, error) from error
    if size != file.size:
        raise _cut_off(path, file.size, size)
    if found not in (None, identity.encode()):
        raise CheckpointCorruptError(
            f"{path} is not of the save that the manifest beside it is of ({identity}), or is "
            "damaged; restore the files of one save, or load another step"
        )


def _missing(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointMissingShardError(
            f"{path} is missing, which the manifest beside it names; restore it from a copy, or "
            "load another step"
        )
    return CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}")


def _cut_off(path: Path, expected: int, size: int) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{path} has {size} bytes, and was written with {expected}: it was cut off, or is of "
        "another save; restore it from a copy, or load another step"
    )


class Files:
    """The files of a checkpoint, opened when they are needed.

    Parameters
    ----------
    directory : Path
        Where they are.
    manifest : Manifest
        What lies in them.
    verify : bool
        Whether to compare digests.

    Attributes
    ----------
    read : int
        Bytes read so far.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self._directory = directory
        self._manifest = manifest
        self._verify = verify
        self._open: dict[int, int] = {}
        self.read = 0

    def __enter__(self) -> Files:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def load(self, units: Sequence[Unit], memories: Sequence[Array]) -> list[Array]:
        """Read units and verify them.

        Parameters
        ----------
        units : sequence of Unit
            What to read; those that follow each other in a file in one call of the system.
        memories : sequence of Array, each shape (at least unit.nbytes,) uint8
            Receive them.

        Returns
        -------
        list of Array, each of the sizes of unit.region
            Views of the memories.

        Raises
        ------
        CheckpointError
            If one cannot be read, is cut off, or does not have its digests.
        """
        pending: list[Array] = []
        at = (-1, 0, 0)
        for unit, memory in zip(units, memories, strict=True):
            place = 0
            for byte, length in self._runs(unit):
                file, begin, count = at
                if (unit.file, byte) != (file, begin + count) or len(pending) == _MOST_PARTS:
                    self._read(at, pending)
                    at, pending = (unit.file, byte, 0), []
                pending.append(memory[place : place + length])
                at = (*at[:2], at[2] + length)
                place += length
        self._read(at, pending)
        found = [self.shaped(unit, memory) for unit, memory in zip(units, memories, strict=True)]
        if self._verify:
            for unit, data in zip(units, found, strict=True):
                self._check(unit, data)
        return found

    def _runs(self, unit: Unit) -> Iterable[tuple[int, int]]:
        """Return where the bytes of a unit lie side by side: byte in the file, and length."""
        if unit.length == unit.nbytes:
            return ((unit.byte, unit.nbytes),)
        return runs_in_file(self._manifest, unit.name, unit.number, unit.region)

    def _read(self, at: tuple[int, int, int], parts: Sequence[Array]) -> None:
        """Read what lies side by side in a file: its number, the first byte, and how many."""
        file, byte, length = at
        if not parts:
            return
        try:
            count = read_at(self._descriptor(file), parts, byte)
        except OSError as error:
            raise _missing(self._path(file), error) from error
        self.read += count
        if count != length:
            raise _cut_off(self._path(file), self._manifest.files[file].size, byte + count)

    def shaped(self, unit: Unit, memory: Array) -> Array:
        """Return what `load` has put into some memory."""
        dtype = self._manifest.arrays[unit.name].dtype
        shaped: Array = memory[: unit.nbytes].view(dtype.newbyteorder("<"))
        return shaped.reshape(unit.region.sizes)

    def _check(self, unit: Unit, data: Array) -> None:
        array = self._manifest.arrays[unit.name]
        stored = array.boxes[unit.number]
        tiling = Tiling.of(stored.box.sizes, array.dtype.itemsize)
        begin = unit.first * DIGEST_BYTES
        expected = stored.digests[begin : begin + unit.count * DIGEST_BYTES]
        found = digests_of(data, tiling.over(unit.region))
        if found != expected:
            a, b = (np.frombuffer(digests, np.int64) for digests in (found, expected))
            place = int(np.flatnonzero(a != b)[0]) * DIGEST_BYTES
            tile = slice(place, place + DIGEST_BYTES)
            raise self._damage(unit, expected[tile], found[tile])

    def _damage(self, unit: Unit, expected: bytes, found: bytes) -> CheckpointCorruptError:
        path = self._path(unit.file)
        stored = self._manifest.arrays[unit.name].boxes[unit.number]
        return CheckpointCorruptError(
            f"{path} is damaged: a part of {unit.name!r} in dataset {stored.dataset!r} has digest "
            f"{found.hex()}, and was written with {expected.hex()}; restore the file from a copy, "
            "or load another step"
        )

    def _path(self, number: int) -> Path:
        return self._directory / self._manifest.files[number].name

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            while len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path, expected = self._path(number), self._manifest.files[number].size
            try:
                descriptor = open_regular(path)
            except OSError as error:
                raise _missing(path, error) from error
            self._open[number] = descriptor
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise _cut_off(path, expected, size)
        return self._open[number]
