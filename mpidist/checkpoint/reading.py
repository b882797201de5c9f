"""Reading parts of arrays: which tiles are needed, where they lie, and whether they are right."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpidist._types import Array
from mpidist.boxes import Box
from mpidist.checkpoint.files import read_at
from mpidist.checkpoint.manifest import ID_DATASET, Manifest, StoredFile
from mpidist.checkpoint.tiles import DIGEST_BYTES, Tiling, digest
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingShardError,
)

__all__ = [
    "UNIT",
    "Files",
    "Unit",
    "Wanted",
    "check_file",
    "check_files",
    "give",
    "runs_of",
    "units_of",
]

UNIT = 1 << 22
"""Most bytes that are read at once."""

_MOST_OPEN = 256
"""Files that are open at once: a process may often have no more than 1,024."""


class Wanted(NamedTuple):
    """A part of an array that somebody needs."""

    name: str
    box: Box


@dataclass(frozen=True, slots=True)
class Unit:
    """What is read at once: some tiles of a stored box that lie one behind the other.

    Attributes
    ----------
    name : str
        Of the array.
    number : int
        Position of the stored box among those of the array.
    first, count : int
        Which tiles.
    region : Box
        What they cover of the stored box, counted from its first index.
    nbytes : int
        Their length.
    file : int
        Which file they lie in.
    byte : int
        Where the first of them begins.
    """

    name: str
    number: int
    first: int
    count: int
    region: Box
    nbytes: int
    file: int
    byte: int


def units_of(manifest: Manifest, wanted: Sequence[Wanted]) -> list[Unit]:
    """Return what has to be read, each tile once, in the order of the files.

    Parameters
    ----------
    manifest : Manifest
        Of the checkpoint.
    wanted : sequence of Wanted
        Parts of its arrays; they may overlap.

    Returns
    -------
    list of Unit
        They cover the tiles that the parts touch.
    """
    tiles: dict[tuple[str, int], list[Array]] = {}
    tilings: dict[tuple[str, int], Tiling] = {}
    for name, box in dict.fromkeys(wanted):
        array = manifest.arrays[name]
        for number, stored in enumerate(array.boxes):
            common = None if box.empty else stored.box.intersect(box)
            if common is None:
                continue
            key = (name, number)
            if key not in tilings:
                tilings[key] = Tiling(stored.box.sizes, array.dtype.itemsize)
            region = common.relative_to(stored.box)
            tiles.setdefault(key, []).append(tilings[key].covering(region))
    units: list[Unit] = []
    for key, lists in tiles.items():
        numbers = lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))
        units += _units_of_box(manifest, key, tilings[key], numbers)
    units.sort(key=lambda unit: (unit.file, unit.byte))
    return units


def _units_of_box(
    manifest: Manifest, key: tuple[str, int], tiling: Tiling, numbers: Array
) -> Iterator[Unit]:
    name, number = key
    file = manifest.arrays[name].boxes[number].file
    for first, count, region in tiling.joined(numbers, UNIT):
        nbytes = region.count * tiling.itemsize
        byte = next(_runs(manifest, name, number, region))[0]
        yield Unit(name, number, first, count, region, nbytes, file, byte)


def _runs(manifest: Manifest, name: str, number: int, region: Box) -> Iterator[tuple[int, int]]:
    """Yield where the elements of a region lie side by side: byte in the file, and length."""
    array = manifest.arrays[name]
    stored, itemsize = array.boxes[number], array.dtype.itemsize
    dataset = manifest.files[stored.file].datasets[stored.dataset]
    sizes = stored.box.sizes
    shape = dataset.shape if len(dataset.shape) == len(sizes) else sizes
    for first, count in runs_of(region, shape):
        yield dataset.byte + (stored.first + first) * itemsize, count * itemsize


def runs_of(region: Box, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where the elements of a region lie side by side in an array, in C order.

    Parameters
    ----------
    region : Box
        Inside the array.
    shape : sequence of int
        Of the array.

    Yields
    ------
    int, int
        Position of the first element, and how many there are.
    """
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(o * s for o, s in zip(region.offsets, strides, strict=True))
    inner = len(shape)  # from here on the region is as wide as what it lies in
    while inner and region.sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    length = prod(region.sizes[outer:])
    for index in np.ndindex(*region.sizes[:outer]):
        yield begin + sum(i * s for i, s in zip(index, strides[:outer], strict=True)), length


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


def check_file(path: Path, file: StoredFile, identity: str) -> None:
    """Raise unless a file is there, in its full length, and of the save with this id."""
    try:
        with path.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != file.size:
                raise _cut_off(path, file.size, size)
            place = file.datasets.get(ID_DATASET)
            if place is not None:  # other programs may leave it out
                found = os.pread(opened.fileno(), len(identity), place.byte)
                if found != identity.encode():
                    raise CheckpointCorruptError(
                        f"{path} is not of the save that the manifest beside it is of "
                        f"({identity}), or is damaged; restore the files of one save, or load "
                        "another step"
                    )
    except OSError as error:
        raise _missing(path, error) from error


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

    def expect(self, units: Sequence[Unit]) -> None:
        """Let the system fetch what is read next, while this process does something else."""
        for unit in units:
            descriptor = self._descriptor(unit.file)
            runs = list(_runs(self._manifest, unit.name, unit.number, unit.region))
            if len(runs) == 1:
                os.posix_fadvise(descriptor, *runs[0], os.POSIX_FADV_WILLNEED)

    def load(self, unit: Unit, memory: Array) -> Array:
        """Read a unit and verify it.

        Parameters
        ----------
        unit : Unit
            What to read.
        memory : Array, shape (at least unit.nbytes,) uint8
            Receives it.

        Returns
        -------
        Array, of the sizes of unit.region
            A view of `memory`.

        Raises
        ------
        CheckpointError
            If it cannot be read, is cut off, or does not have its digests.
        """
        descriptor = self._descriptor(unit.file)
        place = 0
        for byte, length in _runs(self._manifest, unit.name, unit.number, unit.region):
            part = memory[place : place + length]
            try:
                count = read_at(descriptor, [part], byte)
            except OSError as error:
                raise _missing(self._path(unit.file), error) from error
            self.read += count
            if count != length:
                raise _cut_off(self._path(unit.file), self._manifest.files[unit.file].size, byte)
            place += length
        data = self.shaped(unit, memory)
        if self._verify:
            self._check(unit, data)
        return data

    def shaped(self, unit: Unit, memory: Array) -> Array:
        """Return what `load` has put into some memory."""
        dtype = self._manifest.arrays[unit.name].dtype
        shaped: Array = memory[: unit.nbytes].view(dtype.newbyteorder("<"))
        return shaped.reshape(unit.region.sizes)

    def _check(self, unit: Unit, data: Array) -> None:
        array = self._manifest.arrays[unit.name]
        stored = array.boxes[unit.number]
        tiling = Tiling(stored.box.sizes, array.dtype.itemsize)
        for number in range(unit.first, unit.first + unit.count):
            tile = tiling.box(number)
            begin = number * DIGEST_BYTES
            expected = stored.digests[begin : begin + DIGEST_BYTES]
            part = data[tile.relative_to(unit.region).slices]
            found = digest(part)
            if found != expected:
                raise self._damage(unit, expected, found)

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
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise _missing(path, error) from error
            self._open[number] = descriptor
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise _cut_off(path, expected, size)
        return self._open[number]


def give(
    manifest: Manifest, unit: Unit, data: Array, targets: Mapping[str, Sequence[tuple[Box, Array]]]
) -> None:
    """Copy from a unit to wherever its elements are wanted."""
    stored = manifest.arrays[unit.name].boxes[unit.number].box
    here = unit.region.placed_in(stored)
    for box, out in targets.get(unit.name, ()):
        common = here.intersect(box)
        if common is not None:
            out[common.relative_to(box).slices] = data[common.relative_to(here).slices]
