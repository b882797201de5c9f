"""Whether boxes cover an array, each element once."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist.boxes import Box, overlapping
from mpidist.errors import SizeMismatchError

__all__ = ["check_cover"]


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
    pair = overlapping(boxes)
    if pair is not None:
        raise SizeMismatchError(f"{pair[0]} and {pair[1]} overlap")
    missing = whole.count - sum(box.count for box in boxes)
    if missing:
        raise SizeMismatchError(
            f"{missing} of {whole.count} elements of shape {tuple(shape)} are in no box"
        )
