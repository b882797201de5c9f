"""Chunks: how a stored box is cut so that any part of it can be verified alone.

A chunk is the unit that has a digest. It is small enough that reading a part of a box, widened to
whole chunks, reads little more than that part: a cut between rows costs at most the rows of one row
of chunks, about a 128th of a box with 32 KiB per row, and a cut between columns at most 4 KiB per
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

DIGEST_BYTES = 8
"""Bytes of a digest: XXH3, 64 bits, in its canonical (big-endian) form."""

_CHUNK, _LARGEST = 1 << 16, 1 << 20
"""Most bytes of a chunk: the first in small boxes, doubled up to the second in large ones. One
element may be larger."""

_MANY = 1 << 10
"""Chunks that a box may have before they become larger."""

_RUN = 1 << 12
"""Bytes that lie side by side in a chunk, where the box has so many: as many rows of the dimensions
behind the cut as these bytes hold, which is always more than half of them."""


class ChunkGrid:
    """The chunks of a box.

    Parameters
    ----------
    sizes : sequence of int
        Extent of the box in each dimension.
    itemsize : int
        Bytes of one element.

    Attributes
    ----------
    sizes, chunk : tuple of int
        Of the box, and of a chunk; the last one in a dimension may be smaller.
    counts : tuple of int
        Number of chunks in each dimension. They are numbered in C order.
    count : int
        Number of chunks; none of an empty box, one of a 0-d array.
    cut : int
        The innermost dimension that may be cut: all behind it are whole in every chunk.
    """

    def __init__(self, sizes: Sequence[int], itemsize: int) -> None:
        self.sizes = tuple(sizes)
        self.itemsize = itemsize
        self.chunk, self.cut = _chunk_sizes(self.sizes, itemsize, _rule())
        self.counts = _counts(self.sizes, self.chunk)
        self.count = prod(self.counts)
        self._all: tuple[int, list[tuple[int, int, Box]]] | None = None

    @classmethod
    def of(cls, sizes: tuple[int, ...], itemsize: int) -> ChunkGrid:
        """Return the chunks of a box; of boxes of the same sizes mostly the same object."""
        return _chunk_grid(sizes, itemsize, _rule())

    @cached_property
    def numbers(self) -> Array:
        """Those of all chunks, ascending, int64; read-only."""
        numbers = np.arange(self.count)
        numbers.flags.writeable = False
        return numbers

    def box(self, number: int) -> Box:
        """Return what a chunk covers, counted from the first index of the box."""
        if self.count == 1:
            return Box.whole(self.sizes)
        index = [int(i) for i in np.unravel_index(number, self.counts)]
        return self.span(index, [1] * len(index))

    def span(self, index: Sequence[int], lengths: Sequence[int]) -> Box:
        """Return what so many chunks in each dimension cover, from the one with this index on."""
        offsets = tuple(i * part for i, part in zip(index, self.chunk, strict=True))
        stops = tuple(
            min((i + n) * part, size)
            for i, n, part, size in zip(index, lengths, self.chunk, self.sizes, strict=True)
        )
        return Box(offsets, tuple(b - a for a, b in zip(offsets, stops, strict=True)))

    def over(self, region: Box) -> ChunkGrid:
        """Return the chunks of a region that consists of whole ones, which are alike."""
        if region.sizes == self.sizes:
            return self
        part = copy(self)
        part.sizes = region.sizes
        part.counts = _counts(part.sizes, self.chunk)
        part.count = prod(part.counts)
        part._all = None
        part.__dict__.pop("numbers", None)
        return part

    def joined(self, numbers: Array, nbytes: int) -> Iterator[tuple[int, int, Box]]:
        """Join chunks with ascending numbers that follow each other, where together they are a box.

        What is joined has at most `nbytes` bytes; a larger chunk stays alone.

        Yields
        ------
        int, int, Box
            Number of the first chunk, how many they are, and what they cover.
        """
        if numbers is self.numbers:
            yield from self._all_joined(nbytes)
        else:
            yield from self._joined(numbers, nbytes)

    def _all_joined(self, nbytes: int) -> Sequence[tuple[int, int, Box]]:
        """Return all chunks joined; kept, since many arrays have the same few shapes."""
        if self._all is None or self._all[0] != nbytes:
            self._all = (nbytes, [*self._joined(self.numbers, nbytes)])
        return self._all[1]

    def _joined(self, numbers: Array, nbytes: int) -> Iterator[tuple[int, int, Box]]:
        if self.count == 1 or not len(numbers):
            yield from [(0, 1, Box.whole(self.sizes))][: len(numbers)]
            return
        most = max(nbytes // max(prod(self.chunk) * self.itemsize, 1), 1)
        for together in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            start, stop = int(together[0]), int(together[-1]) + 1
            for box in boxes_of_range(self.counts, start, stop):
                for part in boxes_of_at_most(box, most):
                    yield start, part.count, self.span(part.offsets, part.sizes)
                    start += part.count

    def covering(self, region: Box) -> Array:
        """Return the numbers of the chunks that a region touches, ascending, int64."""
        if region.empty or not self.count:
            return np.empty(0, np.int64)
        if region.sizes == self.sizes:
            return self.numbers
        ranges = [
            np.arange(start // part, -(-stop // part))
            for start, stop, part in zip(region.offsets, region.stops, self.chunk, strict=True)
        ]
        return np.ravel_multi_index(np.ix_(*ranges), self.counts).reshape(-1)


def number_of_chunks(sizes: tuple[int, ...], count: int, itemsize: int) -> int:
    """Return `ChunkGrid.count` of a box of `count` elements; fast where they fit into one chunk."""
    if count * itemsize <= _CHUNK:
        return int(count > 0)
    return ChunkGrid.of(sizes, itemsize).count


def _counts(sizes: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // max(part, 1)) for size, part in zip(sizes, chunk, strict=True))


_Rule: TypeAlias = tuple[int, int, int, int]


def _rule() -> _Rule:
    return _CHUNK, _LARGEST, _MANY, _RUN


@lru_cache(maxsize=1024)  # many arrays have the same few shapes
def _chunk_grid(sizes: tuple[int, ...], itemsize: int, _: _Rule) -> ChunkGrid:
    return ChunkGrid(sizes, itemsize)


def _chunk_sizes(sizes: tuple[int, ...], itemsize: int, rule: _Rule) -> tuple[tuple[int, ...], int]:
    """Return the sizes of a chunk, and the innermost dimension that it may cut."""
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
    chunk = list(sizes)
    chunk[cut] = max(run // inner, 1)
    left = most // (inner * chunk[cut])
    for dimension in reversed(range(cut)):
        chunk[dimension] = min(sizes[dimension], max(left, 1))
        left //= chunk[dimension]
    chunk[cut] = min(sizes[cut], chunk[cut] * max(left, 1))  # what no outer dimension has used
    return tuple(chunk), cut


def digests_of(array: Array, grid: ChunkGrid | None = None) -> bytes:
    """Return the digests of the chunks of an array, one behind the other.

    Returns
    -------
    bytes
        `DIGEST_BYTES` per chunk, in the order of their numbers. The digest of a chunk is that of
        its elements in C order, little-endian.

    References
    ----------
    Collet, XXH3, as of the xxHash specification 0.2.0 (the xxhash package).
    """
    grid = grid or ChunkGrid.of(array.shape, array.dtype.itemsize)
    if grid.count <= 1:
        return _digest(array) if grid.count else b""
    # Fresh memory for each chunk would cost several times the copy into it.
    scratch = np.empty(grid.chunk, array.dtype.newbyteorder("<"))
    return b"".join(
        _digest(array[_slices(index, grid.chunk)], scratch) for index in np.ndindex(*grid.counts)
    )


def _slices(index: Sequence[int], chunk: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, chunk, strict=True))


def _digest(part: Array, scratch: Array | None = None) -> bytes:
    """Return the digest of a chunk, whose elements are put side by side if they do not lie so."""
    little = part.dtype.newbyteorder("<")
    if not part.flags.c_contiguous or part.dtype != little:
        if scratch is not None and scratch.shape == part.shape:
            np.copyto(scratch, part)
            part = scratch
        else:
            part = np.ascontiguousarray(part, little)
    return xxhash.xxh3_64_digest(as_bytes(part).data)
