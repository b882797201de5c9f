"""Boxes: the only arithmetic of shards.

A box is a rectangular region of an array, given by where it begins and how far it extends. Who
owns what is a list of boxes, and moving from one owner to another is their intersections.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, ge, le, sub

from mpidist.errors import SizeMismatchError

__all__ = ["Box", "boxes_of_range", "split_evenly"]


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

    def __reduce__(self) -> tuple[type[Box], tuple[tuple[int, ...], tuple[int, ...]]]:
        # Shorter and faster than what dataclasses make of slots: ranks exchange many boxes.
        return Box, (self.offsets, self.sizes)

    def placed_in(self, origin: Box) -> Box:
        """Undo `relative_to`: count from where the first index of `origin` is counted from."""
        return Box(
            tuple(a + b for a, b in zip(self.offsets, origin.offsets, strict=True)), self.sizes
        )


def split_evenly(length: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Cut a length into parts that differ by at most one.

    Parameters
    ----------
    length : int
        What is cut, at least 0.
    parts : int
        Number of parts, at least 1.

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


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut a range of an array's flattened elements into boxes.

    Parameters
    ----------
    shape : sequence of int
        Shape of the array.
    start, stop : int
        First element of the range, in C order, and one past the last.

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
    whole = Box.whole(shape)
    if not 0 <= start <= stop <= whole.count:
        raise SizeMismatchError(
            f"boxes_of_range: an array of shape {whole.sizes} has {whole.count} elements; "
            f"the range from {start} to {stop} does not lie inside"
        )
    return list(_cut(whole.sizes, start, stop))


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
