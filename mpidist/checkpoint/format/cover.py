"""Whether boxes cover an array, each element once.

[Note: covering] To compare many boxes pair by pair takes too long, so a sum is taken instead. In
each dimension every index gets a random number r, and a box counts the product over the dimensions
of r[start] - r[stop]. If the boxes cover the whole, each element once, their sum is what the whole
counts: cutting a box in two leaves the sum as it is, and every cover has a common refinement. If
they do not, both are different polynomials in the random numbers, and agree with a probability of
at most the number of dimensions over the modulus (Schwartz and Zippel). Two sums modulo 2**31 - 1
agree by chance less than once in 10**15 times, whoever chose the boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box, corners, overlapping
from mpidist.errors import SizeMismatchError

__all__ = ["check_cover"]

_FEW = 6
"""Boxes that are compared pair by pair: for so few the sum takes longer."""

_NAMED = 10_000
"""Boxes of which two that overlap are looked for, to name them."""

_PRIME = np.uint64((1 << 31) - 1)


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raise unless boxes cover an array, each element once.

    Parameters
    ----------
    shape : sequence of int
        Shape of the array.
    boxes : sequence of Box
        In any order; empty ones do not matter.

    Raises
    ------
    SizeMismatchError
        If two overlap, one is not inside, or elements are in none. It names the first of them, but
        for an overlap of more than 10,000 boxes.

    Notes
    -----
    Time: that of sorting the boxes; see [Note: covering].
    """
    whole = Box.whole(shape)
    if len(boxes) == 1 and boxes[0] == whole:
        return  # most often
    boxes = [box for box in boxes if not box.empty]
    for box in boxes:
        if len(box.sizes) != len(whole.sizes):
            raise SizeMismatchError(f"{box} does not lie inside {whole}")
    if len(boxes) > _FEW and whole.sizes and _has_the_sum_of(whole, boxes):
        return
    for box in boxes:
        box.relative_to(whole)
    pair = overlapping(boxes) if len(boxes) <= _NAMED else None
    if pair is not None:
        raise SizeMismatchError(f"{pair[0]} and {pair[1]} overlap")
    missing = whole.count - sum(box.count for box in boxes)
    if missing > 0:
        raise SizeMismatchError(
            f"{missing} of {whole.count} elements of shape {tuple(shape)} are in no box"
        )
    if len(boxes) > _NAMED:
        raise SizeMismatchError(f"of {len(boxes)} boxes some overlap")


def _has_the_sum_of(whole: Box, boxes: Sequence[Box]) -> bool:
    """Return whether boxes cover another one, each element once; see [Note: covering]."""
    starts, stops = corners([*boxes, whole])
    count = starts.shape[1]
    indices = [
        np.unique(np.concatenate(both), return_inverse=True)
        for both in zip(starts, stops, strict=True)
    ]
    random = np.random.default_rng()
    for _ in range(2):
        products: Array = np.ones(count, np.uint64)
        for values, position in indices:
            numbers = random.integers(int(_PRIME), size=len(values), dtype=np.uint64)
            drawn = numbers[position]
            products = products * (drawn[:count] + _PRIME - drawn[count:]) % _PRIME
        if products[:-1].sum() % _PRIME != products[-1]:
            return False
    return True
