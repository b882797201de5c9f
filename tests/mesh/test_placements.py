"""Who owns what: `box_at` beside arrays that are cut by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import mpidist
from mpidist import MAX, MEAN, SUM, Box, Partial, Replicate, Shard
from mpidist.arrays.boxes import even_part, split_evenly
from mpidist.errors import InvalidRankError, SizeMismatchError, UnsupportedOperationError
from mpidist.mesh import box_at

MESHES = [(4,), (2, 2), (1, 4), (4, 1), (2, 1, 2), (3,), (2, 3)]
SHAPES = [(5, 3), (1, 7), (0, 3), (3, 2), (8, 8)]


def cut_by_hand(x, sizes, placements, coordinate):
    """Cut with numpy's own array_split, dimension by dimension."""
    for size, placement, number in zip(sizes, placements, coordinate, strict=True):
        if isinstance(placement, Shard):
            x = np.array_split(x, size, axis=placement.dim)[number]
    return x


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_box_is_what_numpy_cuts(sizes, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    kinds = [Shard(0), Shard(1), Replicate(), Partial(SUM)]
    for placements in itertools.product(kinds, repeat=len(sizes)):
        held = np.zeros(shape, int)
        for coordinate in np.ndindex(sizes):
            box = box_at(shape, sizes, placements, coordinate)
            np.testing.assert_array_equal(
                x[box.slices], cut_by_hand(x, sizes, placements, coordinate)
            )
            held[box.slices] += 1
        copies = [n for n, one in zip(sizes, placements, strict=True) if not isinstance(one, Shard)]
        assert (held == np.prod(copies, dtype=int)).all()  # each element as often as it is repeated


def test_cuts_apply_from_left_to_right():
    """Five rows over 2 x 2: what needs a placement of its own elsewhere is the order here."""
    boxes = [box_at((5,), (2, 2), [Shard(0), Shard(0)], index) for index in np.ndindex(2, 2)]
    assert boxes == [Box((0,), (2,)), Box((2,), (1,)), Box((3,), (1,)), Box((4,), (1,))]


def test_a_scalar_lies_everywhere():
    assert box_at((), (2, 2), [Replicate(), Partial(SUM)], (1, 0)) == Box((), ())


def test_one_part_is_that_of_all_parts():
    for length, parts in itertools.product(range(9), range(1, 6)):
        alone = tuple(even_part(length, parts, number) for number in range(parts))
        assert alone == split_evenly(length, parts)


def test_a_mesh_may_have_more_ranks_than_anybody_could_list():
    box = box_at((2**70,), (10**15,), [Shard(0)], (10**15 - 1,))
    assert box.stops == (2**70,)
    assert box_at((3,), (10**15,), [Shard(0)], (3,)).empty


def test_placements_are_values():
    assert Shard(np.int64(1)) == Shard(1)
    assert type(Shard(np.int64(1)).dim) is int
    assert len({Shard(0), Shard(0), Replicate(), Replicate(), Partial(), Partial(SUM)}) == 3
    assert repr([Shard(1), Replicate(), Partial(MAX)]) == "[Shard(1), Replicate(), Partial(MAX)]"
    assert mpidist.Shard is Shard


@pytest.mark.parametrize("dim", [-1, True, 1.0, "0", None, np.True_])
def test_a_dimension_is_counted_from_0(dim):
    with pytest.raises(UnsupportedOperationError, match=r"counted from 0; got .*x\.ndim - 1"):
        Shard(dim)


def test_an_operation_is_a_reduce_op():
    with pytest.raises(UnsupportedOperationError, match=r"must be a ReduceOp.*got 'sum'"):
        Partial("sum")


TWO = (2, 2)
WRONG = {
    "negative shape": (SizeMismatchError, "none negative", ((-1, 2), TWO, [Shard(0)] * 2, (0, 0))),
    "shape of floats": (SizeMismatchError, "shape must", ((2.0,), TWO, [Shard(0)] * 2, (0, 0))),
    "shape is a number": (SizeMismatchError, "shape must", (5, TWO, [Shard(0)] * 2, (0, 0))),
    "no sizes": (SizeMismatchError, "sizes must", ((5,), (), [], ())),
    "size of 0": (SizeMismatchError, "sizes must", ((5,), (0, 2), [Shard(0)] * 2, (0, 0))),
    "size of a boolean": (SizeMismatchError, "sizes must", ((5,), (True,), [Shard(0)], (0,))),
    "too few": (SizeMismatchError, "2 dimensions, got 1", ((5,), TWO, [Shard(0)], (0, 0))),
    "too many": (SizeMismatchError, "1 dimensions, got 2", ((5,), (4,), [Shard(0)] * 2, (0,))),
    "no list": (UnsupportedOperationError, "must be a list", ((5,), (4,), Shard(0), (0,))),
    "a text": (UnsupportedOperationError, "must be a list", ((5,), (4,), "S", (0,))),
    "a class": (UnsupportedOperationError, "must be a list", ((5,), (4,), [Replicate], (0,))),
    "dimension": (SizeMismatchError, r"Shard\(1\) cuts a dim", ((5,), (4,), [Shard(1)], (0,))),
    "of a scalar": (SizeMismatchError, "it has 0", ((), (4,), [Shard(0)], (0,))),
    "huge dimension": (SizeMismatchError, "not have", ((5,), (4,), [Shard(2**70)], (0,))),
    "two operations": (
        UnsupportedOperationError,
        "MEAN and SUM",
        ((5,), TWO, [Partial(SUM), Partial(MEAN)], (0, 0)),
    ),
    "outside": (InvalidRankError, "no coordinate", ((5,), (4,), [Shard(0)], (4,))),
    "negative": (InvalidRankError, "no coordinate", ((5,), (4,), [Shard(0)], (-1,))),
    "too short": (InvalidRankError, "one index per", ((5,), TWO, [Shard(0)] * 2, (0,))),
    "of a float": (InvalidRankError, "no coordinate", ((5,), (4,), [Shard(0)], (1.0,))),
    "of a boolean": (InvalidRankError, "no coordinate", ((5,), (4,), [Shard(0)], (True,))),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_fits_no_mesh_is_refused(name):
    error, message, arguments = WRONG[name]
    with pytest.raises(error, match=f"box_at: .*{message}"):
        box_at(*arguments)
