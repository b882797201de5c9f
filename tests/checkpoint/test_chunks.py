from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
import xxhash

from mpidist import Box
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.checkpoint.format.manifest import DIGEST_BYTES, ChunkGrid, digests_of
from tests.checkpoint.cases import random_array, small_sizes

RUN = 1 << 12


def most_bytes(nbytes: int) -> int:
    """64 KiB, doubled up to 1 MiB while a box would have more than 1,024 chunks."""
    return min(1 << 20, max(1 << 16, 1 << (-(-nbytes // 1024) - 1).bit_length()))


SHAPES = [
    ((), 8),
    ((0, 3), 4),
    ((7,), 1),
    ((1 << 20,), 4),
    ((70_001,), 16),
    ((2048, 2048), 4),
    ((3, 500_000), 2),
    ((500_000, 3), 8),
    ((1, 1, 300_000), 8),
    ((90, 7, 11, 13), 16),
    ((40_000, 1, 2), 4),
    ((2, 3, 4, 5_000, 3), 4),
]


def chunk_of(grid: ChunkGrid, number: int) -> Box:
    """What a chunk covers, counted from the first index of the box."""
    index = [int(i) for i in np.unravel_index(number, grid.counts)]
    return grid.span(index, [1] * len(index))


def painted(grid: ChunkGrid) -> np.ndarray:
    """How often each element is in a chunk."""
    times = np.zeros(grid.sizes, np.uint8)
    for number in range(grid.count):
        times[chunk_of(grid, number).slices] += 1
    return times


def longest_run(chunk: Box, sizes: tuple[int, ...], itemsize: int) -> int:
    """Bytes that lie side by side in a chunk."""
    run = itemsize
    for part, size in zip(reversed(chunk.sizes), reversed(sizes), strict=True):
        run *= part
        if part != size:
            break
    return run


@pytest.mark.parametrize(("sizes", "itemsize"), SHAPES)
def test_tiles_cover_a_box_once_and_are_neither_large_nor_thin(sizes, itemsize):
    grid = ChunkGrid(sizes, itemsize)
    times = painted(grid)
    assert (times == 1).all()
    assert grid.count == prod(grid.counts)
    most = most_bytes(prod(sizes) * itemsize)
    for number in range(grid.count):
        chunk = chunk_of(grid, number)
        assert 0 < chunk.count * itemsize <= most
    if grid.count > 1:  # those at the far edge may be thinner, and smaller
        assert longest_run(chunk_of(grid, 0), sizes, itemsize) > RUN / 2
        assert chunk_of(grid, 0).count * itemsize > most / 2


def test_an_element_larger_than_a_tile_is_one():
    with small_sizes(8, 4, 1 << 20):
        grid = ChunkGrid((3, 2), 16)
        assert grid.count == 6
        assert (painted(grid) == 1).all()


@pytest.mark.parametrize("chunk", [4, 24, 100])
@pytest.mark.parametrize("sizes", [(7,), (4, 5), (3, 4, 3), (2, 2, 3, 2)])
def test_covering_is_what_a_brush_touches(chunk, sizes):
    with small_sizes(chunk, 8, 1 << 20):
        grid = ChunkGrid(sizes, 4)
    chunks = [chunk_of(grid, number) for number in range(grid.count)]
    spans = [
        [(a, b) for a, b in itertools.combinations(range(size + 1), 2) if (a + b) % 3 != 1]
        for size in sizes
    ]
    for ranges in itertools.product(*spans):
        region = Box(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
        brush = np.zeros(sizes, bool)
        brush[region.slices] = True
        touched = [number for number, box in enumerate(chunks) if brush[box.slices].any()]
        assert grid.covering(region).tolist() == touched


def test_nothing_touches_no_tile():
    assert ChunkGrid((4, 5), 4).covering(Box((1, 2), (0, 3))).size == 0
    assert ChunkGrid((0, 5), 4).covering(Box((0, 0), (0, 5))).size == 0
    assert ChunkGrid((), 4).covering(Box((), ())).tolist() == [0]


def test_a_span_is_the_tiles_beside_each_other():
    with small_sizes(16, 4, 1 << 20):
        grid = ChunkGrid((5, 3, 2), 4)
    numbers = np.arange(grid.count).reshape(grid.counts)
    for index in np.ndindex(*grid.counts):
        for stop in itertools.product(
            *(range(i + 1, n + 1) for i, n in zip(index, grid.counts, strict=True))
        ):
            slices = tuple(slice(i, n) for i, n in zip(index, stop, strict=True))
            parts = [chunk_of(grid, number) for number in numbers[slices].reshape(-1).tolist()]
            span = grid.span(index, [n - i for i, n in zip(index, stop, strict=True)])
            assert span.count == sum(part.count for part in parts)
            for part in parts:
                part.relative_to(span)


@pytest.mark.parametrize("nbytes", [1, 40, 100, 10_000])
def test_tiles_are_joined_to_boxes_of_so_many_bytes(nbytes):
    with small_sizes(16, 4, 1 << 20):
        grid = ChunkGrid((5, 3, 4), 4)
    everything = np.arange(grid.count)
    some = (everything[3:-2], everything[everything % 5 > 0], everything[:1], everything[:0])
    for numbers in (everything, *some):
        found = list(grid.joined(numbers, nbytes))
        joined = [n for first, count, _ in found for n in range(first, first + count)]
        assert joined == numbers.tolist()
        for first, count, region in found:
            parts = [chunk_of(grid, number) for number in range(first, first + count)]
            assert region.count == sum(part.count for part in parts)
            assert count == 1 or region.count * 4 <= nbytes
            assert grid.over(region).count == count
            for number, part in enumerate(parts):
                assert chunk_of(grid.over(region), number) == part.relative_to(region)


@pytest.mark.parametrize("dtype", [np.dtype(bool), np.dtype(np.complex64), BFLOAT16])
@pytest.mark.parametrize("shape", [(), (0, 2), (5,), (6, 7), (3, 4, 5)])
def test_a_digest_is_that_of_the_tiles_elements_in_c_order(dtype, shape):
    array = random_array(dtype, shape, 1)
    with small_sizes(32, 8, 1 << 20):
        grid = ChunkGrid(shape, dtype.itemsize)
        expected = b"".join(
            xxhash.xxh3_64_digest(
                np.array(array[chunk_of(grid, number).slices], order="C").tobytes()
            )
            for number in range(grid.count)
        )
        for ordered in (array, np.asfortranarray(array)):
            assert digests_of(ordered.reshape(shape)) == expected
    assert len(expected) == grid.count * DIGEST_BYTES


def test_digests_of_a_large_transposed_array():
    array = random_array(np.dtype(np.float32), (700, 900), 2).T
    grid = ChunkGrid(array.shape, 4)
    assert grid.count > 5
    parts = [
        xxhash.xxh3_64_digest(np.ascontiguousarray(array[chunk_of(grid, n).slices]).tobytes())
        for n in range(grid.count)
    ]
    assert digests_of(array) == b"".join(parts)
