"""Tiles: how a stored box is cut so that any part of it can be verified alone.

A tile is the unit that has a digest. It is small enough that reading a part of a box, widened to
whole tiles, reads little more than that part: a cut between rows costs at most the rows of one row
of tiles, about a 128th of a box with 32 KiB per row, and a cut between columns at most 4 KiB per
row, which is what a file system would read of it anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property, lru_cache
from math import prod
from typing import TypeAlias

import numpy as np
import xxhash

from mpidist._types import Array
from mpidist.arrays.boxes import Box, boxes_of_at_most, boxes_of_range
from mpidist.arrays.namespaces import as_bytes

__all__ = ["DIGEST_BYTES", "Tiling", "digests_of", "number_of_tiles"]

DIGEST_BYTES = 8
"""Bytes of a digest: XXH3, 64 bits, in its canonical (big-endian) form."""

_TILE, _LARGEST = 1 << 16, 1 << 20
"""Most bytes of a tile: the first in small boxes, doubled up to the second in large ones. One
element may be larger."""

_MANY = 1 << 10
"""Tiles that a box may have before they become larger."""

_RUN = 1 << 12
"""Bytes that lie side by side in a tile, where the box has so many: as many rows of the dimensions
behind the cut as these bytes hold, which is always more than half of them."""


class Tiling:
    """The tiles of a box.

    Parameters
    ----------
    sizes : sequence of int
        Of the box.
    itemsize : int
        Bytes of an element.

    Attributes
    ----------
    sizes, tile : tuple of int
        Of the box, and of a tile; the last one in a dimension may be smaller.
    grid : tuple of int
        Number of tiles in each dimension. They are numbered in C order.
    count : int
        Number of tiles; none of an empty box, one of a 0-d array.
    cut : int
        The innermost dimension that may be cut: all behind it are whole in every tile.
    """

    def __init__(self, sizes: Sequence[int], itemsize: int) -> None:
        self.sizes = tuple(sizes)
        self.itemsize = itemsize
        self.tile, self.cut = _tile(self.sizes, itemsize, _rule())
        self.grid = _grid(self.sizes, self.tile)
        self.count = prod(self.grid)
        self._all: tuple[int, list[tuple[int, int, Box]]] | None = None

    @classmethod
    def of(cls, sizes: tuple[int, ...], itemsize: int) -> Tiling:
        """Return the tiles of a box; of boxes of the same sizes mostly the same object."""
        return _tiling(sizes, itemsize, _rule())

    @cached_property
    def numbers(self) -> Array:
        """Those of all tiles, ascending, int64; read-only."""
        numbers = np.arange(self.count)
        numbers.flags.writeable = False
        return numbers

    def box(self, number: int) -> Box:
        """Return what a tile covers, counted from the first index of the box."""
        if self.count == 1:
            return Box.whole(self.sizes)
        index = [int(i) for i in np.unravel_index(number, self.grid)]
        return self.span(index, [1] * len(index))

    def span(self, index: Sequence[int], lengths: Sequence[int]) -> Box:
        """Return what so many tiles in each dimension cover, from the one with this index on."""
        offsets = tuple(i * part for i, part in zip(index, self.tile, strict=True))
        stops = tuple(
            min((i + n) * part, size)
            for i, n, part, size in zip(index, lengths, self.tile, self.sizes, strict=True)
        )
        return Box(offsets, tuple(b - a for a, b in zip(offsets, stops, strict=True)))

    def over(self, region: Box) -> Tiling:
        """Return the tiles of a region that consists of whole ones, which are alike."""
        if region.sizes == self.sizes:
            return self
        part = copy(self)
        part.sizes = region.sizes
        part.grid = _grid(part.sizes, self.tile)
        part.count = prod(part.grid)
        part._all = None
        part.__dict__.pop("numbers", None)
        return part

    def joined(self, numbers: Array, nbytes: int) -> Iterator[tuple[int, int, Box]]:
        """Join tiles that follow each other, where together they are a box.

        Parameters
        ----------
        numbers : Array, shape (n,) int64
            Of tiles, ascending.
        nbytes : int
            Most bytes of what is joined; a larger tile stays alone.

        Yields
        ------
        int, int, Box
            Number of the first tile, how many they are, and what they cover.
        """
        if numbers is self.numbers:
            yield from self._whole(nbytes)
        else:
            yield from self._joined(numbers, nbytes)

    def _whole(self, nbytes: int) -> Sequence[tuple[int, int, Box]]:
        """Return all tiles joined; kept, since many arrays have the same few shapes."""
        if self._all is None or self._all[0] != nbytes:
            self._all = (nbytes, [*self._joined(self.numbers, nbytes)])
        return self._all[1]

    def _joined(self, numbers: Array, nbytes: int) -> Iterator[tuple[int, int, Box]]:
        if self.count == 1 or not len(numbers):
            yield from [(0, 1, Box.whole(self.sizes))][: len(numbers)]
            return
        most = max(nbytes // max(prod(self.tile) * self.itemsize, 1), 1)
        for together in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            start, stop = int(together[0]), int(together[-1]) + 1
            for some in boxes_of_range(self.grid, start, stop):
                for part in boxes_of_at_most(some, most):
                    yield start, part.count, self.span(part.offsets, part.sizes)
                    start += part.count

    def covering(self, region: Box) -> Array:
        """Return the numbers of the tiles that a region touches, ascending, int64."""
        if region.empty or not self.count:
            return np.empty(0, np.int64)
        if region.sizes == self.sizes:
            return self.numbers
        ranges = [
            np.arange(start // part, -(-stop // part))
            for start, stop, part in zip(region.offsets, region.stops, self.tile, strict=True)
        ]
        return np.ravel_multi_index(np.ix_(*ranges), self.grid).reshape(-1)


def number_of_tiles(sizes: tuple[int, ...], count: int, itemsize: int) -> int:
    """Return `Tiling.count` of a box of so many elements, at once where they fit into one tile."""
    if count * itemsize <= _TILE:
        return int(count > 0)
    return Tiling.of(sizes, itemsize).count


def _grid(sizes: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // max(part, 1)) for size, part in zip(sizes, tile, strict=True))


_Rule: TypeAlias = tuple[int, int, int, int]


def _rule() -> _Rule:
    return _TILE, _LARGEST, _MANY, _RUN


@lru_cache(maxsize=1024)  # many arrays have the same few shapes
def _tiling(sizes: tuple[int, ...], itemsize: int, _: _Rule) -> Tiling:
    return Tiling(sizes, itemsize)


def _tile(sizes: tuple[int, ...], itemsize: int, rule: _Rule) -> tuple[tuple[int, ...], int]:
    """Return the sizes of a tile, and the innermost dimension that it may cut."""
    nbytes, largest, many, run = rule
    while nbytes < largest and nbytes * many < prod(sizes) * itemsize:
        nbytes *= 2
    most = max(nbytes // itemsize, 1)
    if prod(sizes) <= most:
        return sizes, 0
    run, inner, cut = max(run // itemsize, 1), 1, len(sizes) - 1
    while inner * sizes[cut] <= run:
        inner *= sizes[cut]
        cut -= 1
    tile = list(sizes)
    tile[cut] = max(run // inner, 1)
    left = most // (inner * tile[cut])
    for dimension in reversed(range(cut)):
        tile[dimension] = min(sizes[dimension], max(left, 1))
        left //= tile[dimension]
    tile[cut] = min(sizes[cut], tile[cut] * max(left, 1))  # what no outer dimension has used
    return tuple(tile), cut


def digests_of(array: Array, tiling: Tiling | None = None) -> bytes:
    """Return the digests of the tiles of an array, one behind the other.

    Parameters
    ----------
    array : Array
        Host memory, in any order.
    tiling : Tiling, optional
        Of the array's shape; made when omitted.

    Returns
    -------
    bytes
        `DIGEST_BYTES` per tile, in the order of their numbers. The digest of a tile is that of its
        elements in C order, little-endian.

    References
    ----------
    Collet, XXH3, as of the xxHash specification 0.2.0 (the xxhash package).
    """
    tiling = tiling or Tiling.of(array.shape, array.dtype.itemsize)
    if tiling.count <= 1:
        return _digest(array) if tiling.count else b""
    # Fresh memory for each tile would cost several times the copy into it.
    scratch = np.empty(tiling.tile, array.dtype.newbyteorder("<"))
    return b"".join(
        _digest(array[_slices(index, tiling.tile)], scratch) for index in np.ndindex(*tiling.grid)
    )


def _slices(index: Sequence[int], tile: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, tile, strict=True))


def _digest(part: Array, scratch: Array | None = None) -> bytes:
    """Return the digest of a tile, whose elements are put side by side if they do not lie so."""
    little = part.dtype.newbyteorder("<")
    if not part.flags.c_contiguous or part.dtype != little:
        if scratch is not None and scratch.shape == part.shape:
            np.copyto(scratch, part)
            part = scratch
        else:
            part = np.ascontiguousarray(part, little)
    return xxhash.xxh3_64_digest(as_bytes(part).data)
