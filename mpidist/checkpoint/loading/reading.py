"""Reading items out of the files of a checkpoint, and whether they are right."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box, BoxIndex, view_of_box
from mpidist.checkpoint.format.files import open_regular, read_at
from mpidist.checkpoint.format.manifest import (
    DIGEST_BYTES,
    ID_DATASET,
    ChunkGrid,
    Manifest,
    StoredArray,
    StoredFile,
    digests_of,
)
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingShardError,
)

MAX_READ = 1 << 20
"""Most bytes that are read at once."""


class BoxRequest(NamedTuple):
    """A box of an array that a reader needs."""

    name: str
    box: Box


@dataclass(frozen=True, slots=True)
class ReadItem:
    """What is read at once: some chunks of a stored box that lie one behind the other.

    Attributes
    ----------
    number : int
        Position of the stored box among those of the array.
    first, count : int
        Number of the first chunk, and how many follow each other.
    region : Box
        What they cover of the stored box, counted from its first index.
    nbytes : int
        Length of all chunks together.
    file, byte : int
        Which file they lie in, and where the first of them begins.
    length : int
        How many bytes lie side by side from there: all of them, unless the box is cut in columns.
    """

    name: str
    number: int
    first: int
    count: int
    region: Box
    nbytes: int
    file: int
    byte: int
    length: int


def read_items(manifest: Manifest, requests: Sequence[BoxRequest]) -> list[ReadItem]:
    """Return what one reader has to read, each chunk once, in the order of the files."""
    return divided_read_items(manifest, [requests], 0)[0]


def divided_read_items(
    manifest: Manifest, requests: Sequence[Sequence[BoxRequest]], reader: int
) -> tuple[list[ReadItem], list[ReadItem]]:
    """Return what is needed by one of several readers only, and what several of them need.

    The requests of all readers are given; boxes may overlap.

    Returns
    -------
    list of ReadItem
        They cover the chunks that only this reader's parts touch, in the order of the files.
    list of ReadItem
        Those that parts of several readers touch; the same for all.
    """
    if len(requests) > 1 and all(other == requests[0] for other in requests[1:]):
        return [], read_items(manifest, requests[0])
    own: list[ReadItem] = []
    shared: list[ReadItem] = []
    for name, boxes in _by_name(requests).items():
        for number, grid, chunks in _touched(manifest.arrays[name], boxes, reader):
            if len(chunks) == 1:
                if reader in chunks:
                    own += _items_of_box(manifest, name, number, grid, chunks[reader])
                continue
            numbers, times = np.unique(np.concatenate(list(chunks.values())), return_counts=True)
            several = numbers[times > 1]
            if several.size:
                shared += _items_of_box(manifest, name, number, grid, several)
            alone = np.setdiff1d(chunks.get(reader, several), several, assume_unique=True)
            if alone.size:
                own += _items_of_box(manifest, name, number, grid, alone)
    for items in (own, shared):
        items.sort(key=attrgetter("file", "byte"))
    return own, shared


def _by_name(requests: Sequence[Sequence[BoxRequest]]) -> dict[str, dict[Box, list[int]]]:
    """Return which readers want which boxes of each array; no empty boxes."""
    boxes: dict[str, dict[Box, list[int]]] = {}
    for reader, own in enumerate(requests):
        for name, box in own:
            if not box.empty:
                readers = boxes.setdefault(name, {}).setdefault(box, [])
                if reader not in readers[-1:]:
                    readers.append(reader)
    return boxes


def _touched(
    array: StoredArray, boxes: Mapping[Box, Sequence[int]], reader: int
) -> Iterator[tuple[int, ChunkGrid, dict[int, Array]]]:
    """Yield the stored boxes that are touched: number, grid, and which chunks by which reader.

    Those that only another reader touches may be left out.
    """
    itemsize, numbers = array.dtype.itemsize, array.numbers
    if boxes.keys() <= numbers.keys():  # stored as it is wanted: most often, and there are no cuts
        for box, readers in boxes.items():
            if readers[0] != reader and len(readers) == 1:
                continue
            grid = ChunkGrid.of(box.sizes, itemsize)
            yield numbers[box], grid, dict.fromkeys(readers, grid.numbers)
        return
    touched: dict[int, dict[int, list[Array]]] = {}
    for box, readers in boxes.items():
        for number in array.index.meeting(box):
            stored = array.boxes[number].box
            common = stored.intersect(box)
            assert common is not None, "they overlap"
            covered = ChunkGrid.of(stored.sizes, itemsize).covering(common.relative_to(stored))
            chunks = touched.setdefault(number, {})
            for index in readers:
                chunks.setdefault(index, []).append(covered)
    for number, chunks in sorted(touched.items()):
        yield (
            number,
            ChunkGrid.of(array.boxes[number].box.sizes, itemsize),
            {
                index: lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))
                for index, lists in chunks.items()
            },
        )


def _items_of_box(
    manifest: Manifest, name: str, number: int, grid: ChunkGrid, chunks: Array
) -> Iterator[ReadItem]:
    file = manifest.arrays[name].boxes[number].file
    for first, count, region in grid.joined(chunks, MAX_READ):
        byte, length = next(file_ranges(manifest, name, number, region))
        nbytes = region.count * grid.itemsize
        yield ReadItem(name, number, first, count, region, nbytes, file, byte, length)


def file_ranges(
    manifest: Manifest, name: str, number: int, region: Box
) -> Iterator[tuple[int, int]]:
    """Yield where the elements of a region lie side by side: byte in the file, and length."""
    array = manifest.arrays[name]
    stored, itemsize = array.boxes[number], array.dtype.itemsize
    dataset = manifest.files[stored.file].datasets[stored.dataset]
    sizes = stored.box.sizes
    shape = dataset.shape if len(dataset.shape) == len(sizes) else sizes
    for first, count in contiguous_ranges(region, shape):
        yield dataset.byte + (stored.first + first) * itemsize, count * itemsize


def contiguous_ranges(region: Box, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where the elements of a region lie side by side in an array of this shape, in C order.

    Each is the position of the first element, and how many there are.
    """
    if region.sizes[1:] == tuple(shape[1:]):
        yield (region.offsets[0] * prod(shape[1:]) if shape else 0), region.count
        return
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(o * s for o, s in zip(region.offsets, strides, strict=True))
    inner = len(shape)  # from here on the region is as wide as what it lies in
    while inner and region.sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    length = prod(region.sizes[outer:])
    for index in np.ndindex(*region.sizes[:outer]):
        yield begin + sum(i * s for i, s in zip(index, strides[:outer], strict=True)), length


class ArrayTargets:
    """Memory for parts of one array, which may be many: the parts, and where each goes."""

    def __init__(self, parts: Iterable[tuple[Box, Array]] = ()) -> None:
        self.parts = list(parts)
        self._index: BoxIndex | None = None

    def add(self, box: Box, memory: Array) -> None:
        """Add a part."""
        self.parts.append((box, memory))
        self._index = None

    def meeting(self, box: Box) -> list[tuple[Box, Array]]:
        """Return the parts that share an element with a box."""
        if self._index is None:
            self._index = BoxIndex([part for part, _ in self.parts])
        return [self.parts[number] for number in self._index.meeting(box)]


def destination_of(
    manifest: Manifest, item: ReadItem, targets: Mapping[str, ArrayTargets]
) -> Array | None:
    """Return where an item may be read to, if its elements are needed there as the file has them.

    That is a view of the array that needs it, shape (item.nbytes,) uint8. None if no array needs
    all of it, several do, or the view is not contiguous.
    """
    stored = manifest.arrays[item.name].boxes[item.number].box
    region = item.region.placed_in(stored)
    targeted = targets[item.name].meeting(region)
    if len(targeted) != 1:
        return None
    ((box, out),) = targeted
    if item.region.sizes == box.sizes and stored == box:
        view = out
    else:
        if region.intersect(box) != region:
            return None
        view = view_of_box(out, box, region)
    if not view.flags.c_contiguous or view.dtype != view.dtype.newbyteorder("<"):
        return None
    flat: Array = view.reshape(-1).view(np.uint8)
    return flat


def scatter(
    manifest: Manifest, item: ReadItem, data: Array, targets: Mapping[str, ArrayTargets]
) -> None:
    """Copy the elements of an item to the arrays that need them."""
    stored = manifest.arrays[item.name].boxes[item.number].box
    region = item.region.placed_in(stored)
    if item.name not in targets:  # it is another rank's
        return
    for box, out in targets[item.name].meeting(region):
        if box == region:
            out[...] = data
            continue
        common = region.intersect(box)
        if common is not None:
            out[common.relative_to(box).slices] = data[common.relative_to(region).slices]


_MOST_PARTS = 512
"""Places in memory that one call of the system fills; it takes 1,024."""

_MOST_OPEN = 256
"""Files that are open at once: a process may often have no more than 1,024."""


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise unless all files are there, in their full length, and of the manifest's save.

    Where the state has values only, nothing else ties a manifest to the files beside it. Raises
    CheckpointMissingShardError or CheckpointCorruptError with the first file that is wrong.
    """
    for file in manifest.files:
        check_file(directory / file.name, file, manifest.id)


def check_sizes(directory: Path, sizes: Iterable[tuple[str, int]]) -> None:
    """Raise unless files are there and have their sizes; opens none.

    Raises CheckpointMissingShardError or CheckpointCorruptError with the first file that is wrong,
    and OSError if one cannot be looked at.
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
    dataset = file.datasets.get(ID_DATASET)
    stored: bytes | None = None
    try:
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if dataset is not None and size == file.size:  # other programs may leave it out
                stored = os.pread(descriptor, len(identity), dataset.byte)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _missing(path, error) from error
    if size != file.size:
        raise _cut_off(path, file.size, size)
    if stored not in (None, identity.encode()):
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

    `verify` says whether `load` compares the digests of chunks; `read` counts the bytes read so
    far.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self._directory = directory
        self.manifest = manifest
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

    def load(self, items: Sequence[ReadItem], memories: Sequence[Array]) -> list[Array]:
        """Read items and verify them.

        Parameters
        ----------
        items : sequence of ReadItem
            What to read; those that follow each other in a file in one call of the system.
        memories : sequence of Array, each shape (at least item.nbytes,) uint8
            Memory for each item.

        Returns
        -------
        list of Array, each of the sizes of item.region
            The elements of each item: views of the memories.

        Raises
        ------
        CheckpointError
            If one cannot be read, is cut off, or does not have its digests.
        """
        pending: list[Array] = []
        at = (-1, 0, 0)
        for item, memory in zip(items, memories, strict=True):
            offset = 0
            for byte, length in self._ranges(item):
                file, begin, count = at
                if (item.file, byte) != (file, begin + count) or len(pending) == _MOST_PARTS:
                    self._read(at, pending)
                    at, pending = (item.file, byte, 0), []
                pending.append(memory[offset : offset + length])
                at = (*at[:2], at[2] + length)
                offset += length
        self._read(at, pending)
        arrays = [self.shaped(item, memory) for item, memory in zip(items, memories, strict=True)]
        if self._verify:
            for item, data in zip(items, arrays, strict=True):
                self._check(item, data)
        return arrays

    def _ranges(self, item: ReadItem) -> Iterable[tuple[int, int]]:
        """Return where the bytes of an item lie side by side: byte in the file, and length."""
        if item.length == item.nbytes:
            return ((item.byte, item.nbytes),)
        return file_ranges(self.manifest, item.name, item.number, item.region)

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
            raise _cut_off(self._path(file), self.manifest.files[file].size, byte + count)

    def shaped(self, item: ReadItem, memory: Array) -> Array:
        """Return what `load` has put into some memory."""
        dtype = self.manifest.arrays[item.name].dtype
        shaped: Array = memory[: item.nbytes].view(dtype.newbyteorder("<"))
        return shaped.reshape(item.region.sizes)

    def _check(self, item: ReadItem, data: Array) -> None:
        array = self.manifest.arrays[item.name]
        stored = array.boxes[item.number]
        grid = ChunkGrid.of(stored.box.sizes, array.dtype.itemsize)
        begin = item.first * DIGEST_BYTES
        expected = stored.digests[begin : begin + item.count * DIGEST_BYTES]
        actual = digests_of(data, grid.over(item.region))
        if actual != expected:
            a, b = (np.frombuffer(digests, np.int64) for digests in (actual, expected))
            first = int(np.flatnonzero(a != b)[0]) * DIGEST_BYTES
            digest = slice(first, first + DIGEST_BYTES)
            raise CheckpointCorruptError(
                f"{self._path(item.file)} is damaged: a part of {item.name!r} in dataset "
                f"{stored.dataset!r} has digest {actual[digest].hex()}, and was written with "
                f"{expected[digest].hex()}; restore the file from a copy, or load another step"
            )

    def _path(self, number: int) -> Path:
        return self._directory / self.manifest.files[number].name

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            while len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path, expected = self._path(number), self.manifest.files[number].size
            try:
                descriptor = open_regular(path)
            except OSError as error:
                raise _missing(path, error) from error
            self._open[number] = descriptor
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise _cut_off(path, expected, size)
        return self._open[number]
