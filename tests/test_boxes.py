from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mpidist.arrays.boxes import (
    Box,
    BoxIndex,
    boxes_of_at_most,
    boxes_of_range,
    overlapping,
    split_evenly,
)
from mpidist.errors import SizeMismatchError

SHAPE = (4, 5)
BOXES = [
    Box((row, column), (rows, columns))
    for row, column, rows, columns in itertools.product((0, 1, 3), (0, 2, 4), (0, 1, 2), (0, 1, 3))
    if row + rows <= 4 and column + columns <= 5
]


def covered(box: Box) -> np.ndarray:
    """Return a map of an array, true inside the box."""
    inside = np.zeros(SHAPE, bool)
    inside[box.slices] = True
    return inside


def test_intersection_is_what_both_cover() -> None:
    for a, b in itertools.product(BOXES, BOXES):
        common = covered(a) & covered(b)
        both = a.intersect(b)
        assert both == b.intersect(a)
        if both is None:
            assert not common.any()
        else:
            np.testing.assert_array_equal(covered(both), common)


def test_facts_of_a_box() -> None:
    for box in BOXES:
        assert box.count == covered(box).sum() == np.empty(SHAPE)[box.slices].size
        assert box.empty == (box.count == 0)
        assert box.stops == tuple(s.stop for s in box.slices)
        assert box.intersect(Box.whole(SHAPE)) == (None if box.empty else box)


def test_box_of_a_number() -> None:
    box = Box.whole(())
    assert box == Box((), ())
    assert (box.count, box.empty, box.slices, box.stops) == (1, False, (), ())
    assert box.intersect(box) == box


def test_relative_to_finds_the_same_elements() -> None:
    whole = np.arange(20).reshape(SHAPE)
    origin, box = Box((1, 1), (3, 4)), Box((2, 2), (1, 3))
    part = whole[origin.slices]
    np.testing.assert_array_equal(part[box.relative_to(origin).slices], whole[box.slices])
    with pytest.raises(SizeMismatchError, match=r"does not lie inside"):
        Box((0, 1), (1, 1)).relative_to(origin)
    with pytest.raises(SizeMismatchError, match=r"does not lie inside"):
        Box((3, 1), (2, 1)).relative_to(origin)


@pytest.mark.parametrize(
    ("offsets", "sizes", "words"),
    [((0,), (1, 2), "1 offsets but 2 sizes"), ((-1,), (1,), "negative"), ((0,), (-2,), "negative")],
)
def test_impossible_boxes(offsets: tuple[int, ...], sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(SizeMismatchError, match=words):
        Box(offsets, sizes)


def test_intersecting_boxes_of_other_dimensions() -> None:
    with pytest.raises(SizeMismatchError, match="2 dimensions and one of 1"):
        Box((0, 0), (1, 1)).intersect(Box((0,), (1,)))


@pytest.mark.parametrize("parts", range(1, 10))
def test_split_evenly_is_numpy_array_split(parts: int) -> None:
    for length in range(25):
        expected = np.array_split(np.arange(length), parts)
        got = split_evenly(length, parts)
        assert [size for _, size in got] == [len(part) for part in expected]
        assert all(part[0] == o for (o, _), part in zip(got, expected, strict=True) if len(part))


@pytest.mark.parametrize(("length", "parts"), [(-1, 2), (3, 0), (3, -1)])
def test_impossible_splits(length: int, parts: int) -> None:
    with pytest.raises(SizeMismatchError, match=f"a length of {length} into {parts} parts"):
        split_evenly(length, parts)


SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (2, 1, 3, 2), (0,), (3, 0, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_of_every_range_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(whole.size + 1), 2):
        boxes = boxes_of_range(shape, start, stop)
        assert len(boxes) <= max(2 * len(shape) - 1, 1)
        assert not any(box.empty for box in boxes)
        got = [whole[box.slices].ravel() for box in boxes]
        np.testing.assert_array_equal(np.concatenate([[], *got]), np.arange(start, stop))


def test_a_whole_array_is_one_box() -> None:
    for shape in SHAPES:
        box = Box.whole(shape)
        assert boxes_of_range(shape, 0, box.count) == ([] if box.empty else [box])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_impossible_ranges(start: int, stop: int) -> None:
    with pytest.raises(SizeMismatchError, match=f"12 elements; the range from {start} to {stop}"):
        boxes_of_range((3, 4), start, stop)


def test_a_part_along_a_dimension_is_counted_inside_the_box() -> None:
    whole = np.arange(20).reshape(SHAPE)
    box = Box((1, 2), (3, 2))
    np.testing.assert_array_equal(
        whole[box.along(0, 1, 2).slices], whole[box.slices][1:3], strict=True
    )
    np.testing.assert_array_equal(
        whole[box.along(1, 1, 1).slices], whole[box.slices][:, 1:2], strict=True
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100])
def test_small_boxes_in_their_order_are_the_elements_of_the_box(count: int) -> None:
    for box in (*BOXES, Box((), ())):
        whole = np.arange(20).reshape(SHAPE) if box.sizes else np.array(7)
        parts = list(boxes_of_at_most(box, count))
        assert all(part.count <= count for part in parts)
        elements = np.concatenate([whole[part.slices].ravel() for part in parts])
        np.testing.assert_array_equal(elements, whole[box.slices].ravel())


@pytest.mark.parametrize("number", [2, 3, 200])  # few are compared without numpy
def test_boxes_overlap_where_an_element_is_in_two(number: int) -> None:
    random = np.random.default_rng(number)
    outcomes = set()
    for trial in range(60):
        side = (number, 400)[trial % 2]
        cells = random.choice(side * side, size=number, replace=False)
        sizes = np.ones((number, 2), int) if trial % 3 else random.integers(1, 4, (number, 2))
        boxes = [
            Box((int(cell) // side, int(cell) % side), (int(a), int(b)))
            for cell, (a, b) in zip(cells, sizes, strict=True)
        ]
        times = np.zeros((side + 4, side + 4), int)
        for box in boxes:
            times[box.slices] += 1
        found = overlapping(boxes)
        assert (found is not None) == (times.max() > 1)
        assert found is None or (found[0].intersect(found[1]) is not None and found[0] in boxes)
        outcomes.add(found is not None)
    assert outcomes == {True, False}


@pytest.mark.parametrize("number", [0, 1, 3, 7, 60])
@pytest.mark.parametrize("ndim", [0, 1, 2, 3])
def test_an_index_finds_the_boxes_that_share_an_element(number: int, ndim: int) -> None:
    random = np.random.default_rng([number, ndim])

    def some() -> Box:
        offsets, sizes = random.integers(0, 9, ndim), random.integers(0, 4, ndim)
        return Box(tuple(map(int, offsets)), tuple(map(int, sizes)))

    for _ in range(20):
        boxes = [some() for _ in range(number)]
        index = BoxIndex(boxes)
        for box in (some() for _ in range(20)):
            expected = [n for n, one in enumerate(boxes) if one.intersect(box) is not None]
            assert index.meeting(box) == expected


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_many_boxes_in_line_are_compared_in_no_time(way: str) -> None:
    turn = slice(None, None, 1 if way == "rows" else -1)
    boxes = [Box((n, 0)[turn], (1, 5)[turn]) for n in range(50_000)]
    before = time.process_time()
    assert overlapping(boxes) is None
    assert time.process_time() - before < 2
    last = Box((49_999, 2)[turn], (1, 1)[turn])
    assert overlapping([last, *boxes]) in [(boxes[-1], last), (last, boxes[-1])]


def test_numbers_without_dimensions_overlap() -> None:
    assert overlapping([Box((), ())]) is None
    assert overlapping([Box((), ()), Box((), ())]) is not None
    assert overlapping([]) is None
