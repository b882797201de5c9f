"""Whether boxes cover an array, each element once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from mpidist.boxes import Box
from mpidist.errors import SizeMismatchError

__all__ = ["check_cover"]

_FEW = 6


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raise unless boxes cover an array, each element once.

    Parameters
    ----------
    shape : sequence of int
        Of the array.
    boxes : sequence of Box
        In any order; empty ones do not matter.

    Raises
    ------
    SizeMismatchError
        If two overlap, one is not inside, or elements are in none; it names the first of them.

    Notes
    -----
    Time: the square of the number of boxes, in numpy.
    """
    whole = Box.whole(shape)
    if len(boxes) == 1 and boxes[0] == whole:
        return  # most often
    boxes = [box for box in boxes if not box.empty]
    for box in boxes:
        box.relative_to(whole)
    if len(boxes) > 1:
        _check_disjoint(boxes)
    missing = whole.count - sum(box.count for box in boxes)
    if missing:
        raise SizeMismatchError(
            f"{missing} of {whole.count} elements of shape {tuple(shape)} are in no box"
        )


def _check_disjoint(boxes: Sequence[Box]) -> None:
    order = sorted(boxes, key=lambda box: box.offsets)
    if len(order) <= _FEW:  # numpy takes longer
        for one, other in combinations(order, 2):
            if one.intersect(other) is not None:
                raise SizeMismatchError(f"{one} and {other} overlap")
        return
    starts = np.array([box.offsets for box in order])
    stops = np.array([box.stops for box in order])
    for number in range(len(order) - 1):
        # Those that begin behind the end of this one in the first dimension cannot meet it.
        last = np.searchsorted(starts[:, 0], stops[number, 0]) if starts.shape[1] else len(order)
        later = slice(number + 1, last)
        meets = (starts[later] < stops[number]) & (stops[later] > starts[number])
        hits = np.flatnonzero(meets.all(axis=1))
        if hits.size:
            raise SizeMismatchError(f"{order[number]} and {order[number + 1 + hits[0]]} overlap")
