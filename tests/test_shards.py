from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from mpidist import Box, ShardedArray
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.errors import SizeMismatchError

SHAPES = [(), (6,), (3, 4), (2, 3, 2), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_of_range_holds_the_range(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape, dtype=int))
    flat = np.arange(1, size + 1, dtype=np.float32)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        x = ShardedArray.of_range(shape, start, flat[start:stop])
        assert (x.shape, x.dtype, x.nbytes) == (shape, np.float32, 4 * (stop - start))
        painted = np.zeros(shape, np.float32)
        for box, piece in x.pieces.items():
            assert piece.shape == box.sizes
            painted[box.slices] = piece
        expected = np.zeros(size, np.float32)
        expected[start:stop] = flat[start:stop]
        np.testing.assert_array_equal(painted.ravel(), expected)


def test_pieces_are_the_memory_that_was_given() -> None:
    flat = np.zeros(7)
    for value, piece in enumerate(ShardedArray.of_range((3, 4), 2, flat).pieces.values(), 1):
        piece[...] = value
    np.testing.assert_array_equal(flat, [1, 1, 2, 2, 2, 2, 3])
    strided = np.zeros(14)
    for piece in ShardedArray.of_range((3, 4), 2, strided[::2]).pieces.values():
        piece[...] = 1
    np.testing.assert_array_equal(strided, np.tile([1, 0], 7))


def test_read_only_memory_stays_so() -> None:
    flat = np.zeros(7)
    flat.flags.writeable = False
    pieces = ShardedArray.of_range((3, 4), 2, flat).pieces
    assert not any(piece.flags.writeable for piece in pieces.values())


def test_a_rank_may_hold_nothing() -> None:
    x = ShardedArray([4, 0, 2], "float64", {Box((1, 0, 0), (2, 0, 2)): np.empty((2, 0, 2))})
    assert (x.shape, x.pieces, x.nbytes) == ((4, 0, 2), {}, 0)
    assert ShardedArray.of_range((3,), 3, np.empty(0, BFLOAT16)).dtype == BFLOAT16


def test_only_shape_and_dtype_of_a_piece_are_looked_at() -> None:
    """So an array on a device can be one."""
    piece = SimpleNamespace(shape=(2, 1), dtype=np.dtype(np.float32))
    box = Box((1, 2), (2, 1))
    assert ShardedArray((3, 3), np.float32, {box: piece}).pieces == {box: piece}


@pytest.mark.parametrize(
    ("box", "piece", "words"),
    [
        (Box((2, 0), (2, 4)), np.zeros((2, 4)), r"does not lie inside the shape \(3, 4\)"),
        (Box((0,), (4,)), np.zeros(4), r"does not lie inside the shape \(3, 4\)"),
        (Box((0, 0), (2, 2)), np.zeros((2, 3)), r"expected shape \(2, 2\) .* got \(2, 3\)"),
        (Box((0, 0), (2, 2)), np.zeros((2, 2), np.float32), r"dtype float64 .* and float32"),
        (Box((0, 4), (2, 0)), np.zeros((3, 0)), r"expected shape \(2, 0\)"),
    ],
)
def test_pieces_that_do_not_fit(box: Box, piece: np.ndarray, words: str) -> None:
    with pytest.raises(SizeMismatchError, match=words):
        ShardedArray((3, 4), np.float64, {box: piece})


BOXES = [
    Box((row, column), (rows, columns))
    for row, column, rows, columns in itertools.product((0, 1, 2), (0, 1), (1, 2), (1, 2))
]


def test_pieces_must_not_overlap() -> None:
    for boxes in itertools.combinations(BOXES, 3):
        times = np.zeros((4, 3), int)
        for box in boxes:
            times[box.slices] += 1
        pieces = {box: np.zeros(box.sizes) for box in boxes}
        if times.max() > 1:
            with pytest.raises(SizeMismatchError, match="overlap"):
                ShardedArray((4, 3), np.float64, pieces)
        else:
            assert ShardedArray((4, 3), np.float64, pieces).pieces == pieces


def test_of_range_takes_one_dimension_and_a_range_of_the_array() -> None:
    with pytest.raises(SizeMismatchError, match=r"one dimension, got shape \(2, 2\)"):
        ShardedArray.of_range((3, 4), 0, np.zeros((2, 2)))
    with pytest.raises(SizeMismatchError, match="from 10 to 13 does not lie inside"):
        ShardedArray.of_range((3, 4), 10, np.zeros(3))
