"""Boxes: rectangular regions of arrays, which shards consist of.

A box is a rectangular region of an array, given by where it begins and how far it extends. Who
owns what is a list of boxes, and moving from one owner to another is their intersections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, combinations
from math import prod
from operator import add, ge, le, sub
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.errors import SizeMismatchError

__all__ = ["Box"]

_FEW = 6
"""Boxes that are compared one by one: for so few numpy takes longer."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of an n-dimensional array.

    Parameters
    ----------
    offsets : tuple of int
        First index in each dimension.
    sizes : tuple of int
        Extent in each dimension; zero is an empty box.

    Raises
    ------
    SizeMismatchError
        If the lengths differ or a number is negative.

    Examples
    --------
    >>> a = Box((0, 2), (4, 3))
    >>> a.intersect(Box((2, 0), (4, 4)))
    Box(offsets=(2, 2), sizes=(2, 2))
    >>> a.slices
    (slice(0, 4, None), slice(2, 5, None))
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise SizeMismatchError(
                f"Box: {len(self.offsets)} offsets but {len(self.sizes)} sizes; "
                "give one of each per dimension"
            )
        if self.sizes and min(*self.offsets, *self.sizes) < 0:
            raise SizeMismatchError(
                f"Box: offsets {self.offsets} and sizes {self.sizes} must not be negative"
            )

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of a whole array of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stops(self) -> tuple[int, ...]:
        """One past the last index in each dimension."""
        return tuple(map(add, self.offsets, self.sizes))

    @property
    def count(self) -> int:
        """Number of elements; 1 for the box of a 0-d array."""
        return prod(self.sizes)

    @property
    def empty(self) -> bool:
        """Whether no element lies inside."""
        return self.count == 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that selects this region of the whole array."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the region common to both, or None where they share no element."""
        if len(self.offsets) != len(other.offsets):
            raise SizeMismatchError(
                f"Box.intersect: a box of {len(self.offsets)} dimensions "
                f"and one of {len(other.offsets)}"
            )
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(map(sub, map(min, self.stops, other.stops), offsets))
        return Box(offsets, sizes) if min(sizes, default=1) > 0 else None

    def relative_to(self, origin: Box) -> Box:
        """Return this box counted from the first index of `origin`, which contains it."""
        if not (
            len(self.offsets) == len(origin.offsets)
            and all(map(ge, self.offsets, origin.offsets))
            and all(map(le, self.stops, origin.stops))
        ):
            raise SizeMismatchError(f"Box.relative_to: {self} does not lie inside {origin}")
        return Box(tuple(map(sub, self.offsets, origin.offsets)), self.sizes)

    def along(self, dimension: int, start: int, size: int) -> Box:
        """Return the part from `start`, counted inside the box, and of `size` in one dimension."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dimension] += start
        sizes[dimension] = size
        return Box(tuple(offsets), tuple(sizes))

    def __reduce__(self) -> tuple[type[Box], tuple[tuple[int, ...], tuple[int, ...]]]:
        # Shorter and faster than what dataclasses make of slots: ranks exchange many boxes.
        return Box, (self.offsets, self.sizes)

    def placed_in(self, origin: Box) -> Box:
        """Undo `relative_to`: count from where the first index of `origin` is counted from."""
        return Box(
            tuple(a + b for a, b in zip(self.offsets, origin.offsets, strict=True)), self.sizes
        )


def view_of_box(array: Array, held: Box, box: Box) -> Array:
    """Return the elements of a box, as a view of an array that has those of a box around it."""
    index: Any = (*box.relative_to(held).slices, ...)  # with the dots a view, also of a 0-d array
    view: Array = array[index]
    return view


def boxes_of_at_most(box: Box, count: int) -> Iterator[Box]:
    """Cut a box into boxes of at most so many elements, at least 1; an empty one stays whole.

    In their order, with the elements of each in C order, they are the elements of `box`.
    """
    if box.count <= count:
        yield box
        return
    cut = next(d for d, size in enumerate(box.sizes) if size > 1)
    step = max(count // prod(box.sizes[cut + 1 :]), 1)
    for start in range(0, box.sizes[cut], step):
        size = min(step, box.sizes[cut] - start)
        yield from boxes_of_at_most(box.along(cut, start, size), count)


class BoxIndex:
    """Boxes, ordered so that those that meet another one are found without looking at all.

    All have one number of dimensions; there may be none.

    Notes
    -----
    They are sorted by where they begin in the dimension in which most begin at different indices:
    rows by the first, columns by the last. A search looks only at those that may reach the box in
    this dimension, in numpy.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes
        self._few = len(boxes) <= _FEW or not boxes[0].sizes
        if self._few:
            return
        starts, stops = corners(boxes)
        self._dimension = max(range(len(starts)), key=lambda d: len(np.unique(starts[d])))
        self._order = np.argsort(starts[self._dimension], kind="stable")
        self._starts, self._stops = starts[:, self._order], stops[:, self._order]
        self._reach = np.maximum.accumulate(self._stops[self._dimension])

    def meeting(self, box: Box) -> list[int]:
        """Return the positions of the boxes that share an element with a box, ascending."""
        if self._few:
            return [n for n, one in enumerate(self._boxes) if one.intersect(box) is not None]
        begin, end = box.offsets[self._dimension], box.stops[self._dimension]
        first = int(self._reach.searchsorted(begin, "right"))
        last = int(self._starts[self._dimension].searchsorted(end))
        starts, stops = self._starts[:, first:last], self._stops[:, first:last]
        lower, upper = (np.array(corner)[:, None] for corner in (box.offsets, box.stops))
        # An empty box may lie inside, and shares no element.
        meets = (starts < upper) & (stops > lower) & (starts < stops)
        if box.empty:
            return []
        return sorted(self._order[first + np.flatnonzero(meets.all(axis=0))].tolist())

    @property
    def in_line(self) -> bool:
        """Whether each box ends, in the dimension they are sorted by, before the next begins."""
        if self._few:
            return False
        begins = self._starts[self._dimension]
        return bool((self._reach[:-1] <= begins[1:]).all())


def corners(boxes: Sequence[Box]) -> tuple[Array, Array]:
    """Return where boxes, of one number of dimensions, begin and end in each dimension.

    Returns
    -------
    starts, stops : Array, shape (ndim, len(boxes)) int64
        One row per dimension.

    Raises
    ------
    OverflowError
        If a number has more than 64 bits.
    """
    shape = (len(boxes), len(boxes[0].sizes))
    starts, sizes = (
        np.fromiter(chain.from_iterable(numbers), np.int64, prod(shape)).reshape(shape).T.copy()
        for numbers in ((box.offsets for box in boxes), (box.sizes for box in boxes))
    )
    return starts, starts + sizes


def overlapping(boxes: Iterable[Box]) -> tuple[Box, Box] | None:
    """Return two boxes that share an element, by their offsets, or None if there are none.

    The boxes have one number of dimensions, and none is empty.

    Notes
    -----
    Time: that of sorting where the boxes follow each other in one dimension, as rows and columns
    do; at most the square of the number of boxes, in numpy.
    """
    order = sorted(boxes, key=lambda box: box.offsets)
    if len(order) <= _FEW:
        pairs = combinations(order, 2)
        return next((pair for pair in pairs if pair[0].intersect(pair[1]) is not None), None)
    index = BoxIndex(order)
    if index.in_line:
        return None
    for number, box in enumerate(order):
        for other in index.meeting(box):
            if other > number:
                return box, order[other]
    return None


def split_evenly(length: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Cut a length into parts that differ by at most one.

    Returns
    -------
    tuple of (int, int)
        Offset and size of each part; the longer parts come first.

    Raises
    ------
    SizeMismatchError
        If `length` is negative or `parts` is not positive.

    Examples
    --------
    >>> split_evenly(7, 3)
    ((0, 3), (3, 2), (5, 2))
    """
    if length < 0 or parts < 1:
        raise SizeMismatchError(
            f"split_evenly: cannot cut a length of {length} into {parts} parts; "
            "expected a length of at least 0 and at least 1 part"
        )
    quotient, remainder = divmod(length, parts)
    return tuple(
        (part * quotient + min(part, remainder), quotient + (part < remainder))
        for part in range(parts)
    )


def even_part(length: int, parts: int, number: int) -> tuple[int, int]:
    """Return offset and size of one of the parts that `split_evenly` returns, without the others.

    Parameters
    ----------
    length, parts : int
        As for `split_evenly`.
    number : int
        Which part, from 0 to ``parts - 1``.
    """
    quotient, remainder = divmod(length, parts)
    return number * quotient + min(number, remainder), quotient + (number < remainder)


def part_slices(counts: Sequence[int]) -> list[slice]:
    """Return where consecutive parts of a flat array lie, given the length of each."""
    return [slice(stop - n, stop) for n, stop in zip(counts, accumulate(counts), strict=True)]


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut a range of an array's flattened elements, in C order, into boxes.

    Returns
    -------
    list of Box
        None empty, and at most ``2 * ndim - 1`` of them. In their order, with the elements of each
        in C order, they are the elements of the range.

    Raises
    ------
    SizeMismatchError
        If the array has no such range.

    Examples
    --------
    >>> boxes_of_range((3, 4), 2, 12)
    [Box(offsets=(0, 2), sizes=(1, 2)), Box(offsets=(1, 0), sizes=(2, 4))]
    """
    full = Box.whole(shape)
    if not 0 <= start <= stop <= full.count:
        raise SizeMismatchError(
            f"boxes_of_range: an array of shape {full.sizes} has {full.count} elements; "
            f"the range from {start} to {stop} does not lie inside"
        )
    return list(_cut(full.sizes, start, stop))


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the end of a row, then the whole rows as one box, then the beginning of a row."""
    if start == stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = shape[1:]
    row = prod(inner)
    first, last = -(-start // row), stop // row  # the whole rows are first ... last - 1
    if first > last:
        yield from _within(last, inner, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(first - 1, inner, start - (first - 1) * row, row)
    if first < last:
        yield Box((first, *(0,) * len(inner)), (last - first, *inner))
    yield from _within(last, inner, 0, stop - last * row)


def _within(index: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of a range inside one row."""
    for box in _cut(shape, start, stop):
        yield Box((index, *box.offsets), (1, *box.sizes))
