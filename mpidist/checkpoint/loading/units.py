"""Units: which tiles of stored boxes are needed, where they lie, and where they go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box, BoxIndex
from mpidist.checkpoint.format.manifest import Manifest, StoredArray
from mpidist.checkpoint.format.tiles import Tiling

__all__ = [
    "UNIT",
    "Pieces",
    "Unit",
    "Wanted",
    "divided_units",
    "give",
    "place_of",
    "runs_in_file",
    "runs_of",
    "units_of",
]

UNIT = 1 << 20
"""Most bytes that are read at once."""


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


def units_of(manifest: Manifest, wanted: Sequence[Wanted]) -> list[Unit]:
    """Return what one reader has to read, each tile once, in the order of the files.

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
    return divided_units(manifest, [wanted], 0)[0]


def divided_units(
    manifest: Manifest, wanted: Sequence[Sequence[Wanted]], reader: int
) -> tuple[list[Unit], list[Unit]]:
    """Return what is needed by one of several readers only, and what several of them need.

    Parameters
    ----------
    manifest : Manifest
        Of the checkpoint.
    wanted : sequence of sequence of Wanted
        Parts of its arrays, by reader.
    reader : int
        Which one.

    Returns
    -------
    list of Unit
        They cover the tiles that only this reader's parts touch, in the order of the files.
    list of Unit
        Those that parts of several readers touch; the same for all.
    """
    if len(wanted) > 1 and all(some == wanted[0] for some in wanted[1:]):
        return [], units_of(manifest, wanted[0])
    own: list[Unit] = []
    shared: list[Unit] = []
    for name, wants in _by_name(wanted).items():
        for number, tiling, tiles in _touched(manifest.arrays[name], wants, reader):
            if len(tiles) == 1:
                if reader in tiles:
                    own += _units_of_box(manifest, name, number, tiling, tiles[reader])
                continue
            numbers, times = np.unique(np.concatenate(list(tiles.values())), return_counts=True)
            several = numbers[times > 1]
            if several.size:
                shared += _units_of_box(manifest, name, number, tiling, several)
            mine = np.setdiff1d(tiles.get(reader, several), several, assume_unique=True)
            if mine.size:
                own += _units_of_box(manifest, name, number, tiling, mine)
    for units in (own, shared):
        units.sort(key=attrgetter("file", "byte"))
    return own, shared


def _by_name(wanted: Sequence[Sequence[Wanted]]) -> dict[str, dict[Box, list[int]]]:
    """Return which readers want which boxes of each array; no empty boxes."""
    found: dict[str, dict[Box, list[int]]] = {}
    for reader, some in enumerate(wanted):
        for name, box in some:
            if not box.empty:
                readers = found.setdefault(name, {}).setdefault(box, [])
                if reader not in readers[-1:]:
                    readers.append(reader)
    return found


def _touched(
    array: StoredArray, wants: Mapping[Box, Sequence[int]], reader: int
) -> Iterator[tuple[int, Tiling, dict[int, Array]]]:
    """Yield the stored boxes that are touched: number, tiling, and which tiles by which reader.

    Those that only another reader touches may be left out.
    """
    itemsize, numbers = array.dtype.itemsize, array.numbers
    if wants.keys() <= numbers.keys():  # stored as it is wanted: most often, and there are no cuts
        for box, readers in wants.items():
            if readers[0] != reader and len(readers) == 1:
                continue
            tiling = Tiling.of(box.sizes, itemsize)
            yield numbers[box], tiling, dict.fromkeys(readers, tiling.numbers)
        return
    touched: dict[int, dict[int, list[Array]]] = {}
    for box, readers in wants.items():
        for number in array.index.meeting(box):
            stored = array.boxes[number].box
            common = stored.intersect(box)
            assert common is not None, "they meet"
            covered = Tiling.of(stored.sizes, itemsize).covering(common.relative_to(stored))
            tiles = touched.setdefault(number, {})
            for each in readers:
                tiles.setdefault(each, []).append(covered)
    for number, tiles in sorted(touched.items()):
        yield (
            number,
            Tiling.of(array.boxes[number].box.sizes, itemsize),
            {
                each: lists[0] if len(lists) == 1 else np.unique(np.concatenate(lists))
                for each, lists in tiles.items()
            },
        )


def _units_of_box(
    manifest: Manifest, name: str, number: int, tiling: Tiling, tiles: Array
) -> Iterator[Unit]:
    file = manifest.arrays[name].boxes[number].file
    for first, count, region in tiling.joined(tiles, UNIT):
        byte, length = next(runs_in_file(manifest, name, number, region))
        nbytes = region.count * tiling.itemsize
        yield Unit(name, number, first, count, region, nbytes, file, byte, length)


def runs_in_file(
    manifest: Manifest, name: str, number: int, region: Box
) -> Iterator[tuple[int, int]]:
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


class Pieces:
    """Memory for parts of one array, which may be many.

    Attributes
    ----------
    parts : list of (Box, Array)
        Which parts, and where they go.
    """

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


def place_of(manifest: Manifest, unit: Unit, targets: Mapping[str, Pieces]) -> Array | None:
    """Return where a unit may be read to, its elements being wanted there as they lie in the file.

    Returns
    -------
    Array, shape (unit.nbytes,) uint8, or None
        A view of the array that wants it; None if none wants all of it, or several do, or it does
        not lie there side by side.
    """
    stored = manifest.arrays[unit.name].boxes[unit.number].box
    wanted = targets[unit.name].meeting(unit.region.placed_in(stored))
    if len(wanted) != 1:
        return None
    ((box, out),) = wanted
    if unit.region.sizes == box.sizes and stored == box:
        place = out
    else:
        here = unit.region.placed_in(stored)
        if here.intersect(box) != here:
            return None
        index: Any = (*here.relative_to(box).slices, ...)  # a view, also of a 0-d array
        place = out[index]
    if not place.flags.c_contiguous or place.dtype != place.dtype.newbyteorder("<"):
        return None
    flat: Array = place.reshape(-1).view(np.uint8)
    return flat


def give(manifest: Manifest, unit: Unit, data: Array, targets: Mapping[str, Pieces]) -> None:
    """Copy from a unit to wherever its elements are wanted."""
    stored = manifest.arrays[unit.name].boxes[unit.number].box
    here = unit.region.placed_in(stored)
    if unit.name not in targets:  # it is another rank's
        return
    for box, out in targets[unit.name].meeting(here):
        if box == here:
            out[...] = data
            continue
        common = here.intersect(box)
        if common is not None:
            out[common.relative_to(box).slices] = data[common.relative_to(here).slices]
