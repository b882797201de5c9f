from __future__ import annotations

from random import Random

import numpy as np
import pytest

from mpidist import Box
from mpidist.checkpoint.format import parsing
from mpidist.checkpoint.format.parsing import check_cover
from mpidist.errors import SizeMismatchError


def cut(random, box, number):
    """Cut a box into so many, now along one dimension and now along another."""
    boxes = [box]
    while len(boxes) < number:
        one = boxes.pop(random.randrange(len(boxes)))
        long = [d for d, size in enumerate(one.sizes) if size > 1]
        if not long:
            boxes.append(one)
            continue
        dimension = random.choice(long)
        first = random.randrange(1, one.sizes[dimension])
        boxes.append(one.along(dimension, 0, first))
        boxes.append(one.along(dimension, first, one.sizes[dimension] - first))
    random.shuffle(boxes)
    return boxes


def moved(box, dimension, by, longer):
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dimension] = max(offsets[dimension] + by, 0)
    sizes[dimension] = max(sizes[dimension] + longer, 0)
    return Box(tuple(offsets), tuple(sizes))


def is_covered(shape, boxes):
    """What numpy says, by counting."""
    times = np.zeros([2 * length + 2 for length in shape], int)
    for box in boxes:
        times[box.slices] += 1
    inside = tuple(slice(0, length) for length in shape)
    return (times[inside] == 1).all() and times.sum() == times[inside].sum()


@pytest.mark.parametrize("number", [1, 2, 6, 7, 40])
def test_any_cover_is_one_and_no_other(number):
    random = Random(number)
    outcomes = []
    for _ in range(150):
        shape = tuple(random.randint(1, 12) for _ in range(random.randint(1, 3)))
        boxes = cut(random, Box.whole(shape), min(number, int(np.prod(shape))))
        for _ in range(random.randint(0, 2)):
            chosen = random.randrange(len(boxes))
            dimension = random.randrange(len(shape))
            by, longer = random.choice([(1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (0, 0)])
            boxes[chosen] = moved(boxes[chosen], dimension, by, longer)
        if random.random() < 0.2:
            boxes.append(random.choice(boxes))
        boxes.append(moved(boxes[0], 0, 1, -100))  # an empty one, which does not matter
        covered = is_covered(shape, boxes)
        outcomes.append(covered)
        if covered:
            check_cover(shape, boxes)
        else:
            with pytest.raises(SizeMismatchError):
                check_cover(shape, boxes)
    assert {True, False} == set(outcomes)


def test_a_cover_that_cannot_be_cut_straight():
    """Four around one, as the wings of a windmill; and many of them."""
    wings = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    boxes = [
        Box((3 * i + a, 3 * j + b), sizes)
        for i in range(20)
        for j in range(20)
        for (a, b), sizes in wings
    ]
    check_cover((60, 60), boxes)
    boxes[77] = Box(boxes[77].offsets, (1, 1))
    with pytest.raises(SizeMismatchError, match="1 of 3600 elements"):
        check_cover((60, 60), boxes)


def test_what_is_wrong_with_many_is_said_soon(monkeypatch):
    monkeypatch.setattr(parsing, "_NAMED", 100)
    boxes = [Box((0, column), (2, 1)) for column in range(1000)]
    check_cover((2, 1000), boxes)
    with pytest.raises(SizeMismatchError, match=r"2 of 2000 elements of shape .* are in no box"):
        check_cover((2, 1000), boxes[1:])
    with pytest.raises(SizeMismatchError, match="of 1001 boxes some overlap"):
        check_cover((2, 1000), [*boxes, boxes[5]])
    with pytest.raises(SizeMismatchError, match="does not lie inside"):
        check_cover((2, 1000), [*boxes, Box((2, 0), (1, 1))])
    with pytest.raises(SizeMismatchError, match="does not lie inside"):
        check_cover((2, 1000), [*boxes, Box((2,), (1,))])
