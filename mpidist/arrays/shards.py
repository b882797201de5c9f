"""An array that is split over the ranks: its global shape, and what this rank holds of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box, boxes_of_range, overlapping, part_slices
from mpidist.arrays.namespaces import array_namespace, like_device
from mpidist.errors import SizeMismatchError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["ShardedArray"]


class ShardedArray:
    """One rank's part of an array that is split over the ranks.

    Parameters
    ----------
    shape : sequence of int
        Shape of the whole array.
    dtype : dtype
        Of the whole, and of every piece.
    pieces : mapping of Box to Array
        What this rank holds: for each box of the whole, an array of the box's sizes, on the host or
        on a device. Empty ones are left out; a rank may hold nothing at all.

    Attributes
    ----------
    shape : tuple of int
        Shape of the whole array.
    dtype : dtype
        Element type of the whole array and of every piece.
    pieces : dict of Box to Array
        As given, not copied: who writes into a piece writes into the array that was given.

    Raises
    ------
    SizeMismatchError
        If a box does not lie inside the shape, or overlaps another; if a piece does not have the
        box's sizes, or has another dtype.

    Notes
    -----
    Local. It knows nothing of other ranks: those may hold the rest, the same once more, or all hold
    nothing of some part.

    Examples
    --------
    Rank 1 of two holds the right half of each row:

    >>> right = np.zeros((4, 3))
    >>> x = ShardedArray((4, 6), np.float64, {Box((0, 3), (4, 3)): right})

    A slice of the flattened array, as a `ShardedOptimizer` holds them:

    >>> flat = np.arange(2.0, 9.0)
    >>> list(ShardedArray.of_range((3, 4), 2, flat).pieces.values())
    [array([[2., 3.]]), array([[4., 5., 6., 7.]]), array([[8.]])]
    """

    __slots__ = ("dtype", "pieces", "shape")

    shape: tuple[int, ...]
    dtype: DType
    pieces: dict[Box, Array]

    def __init__(
        self, shape: Sequence[int], dtype: npt.DTypeLike, pieces: Mapping[Box, Array]
    ) -> None:
        self.shape = tuple(map(index, shape))  # plain integers, which can be written as JSON
        self.dtype = np.dtype(dtype)
        for box, piece in pieces.items():
            self._check(box, piece)
        self.pieces = {_plain(box): piece for box, piece in pieces.items() if not box.empty}
        pair = overlapping(self.pieces)
        if pair is not None:
            raise SizeMismatchError(
                f"ShardedArray: {pair[0]} and {pair[1]} overlap; a rank holds each element once"
            )

    @classmethod
    def of_range(cls, shape: Sequence[int], start: int, piece: Array) -> ShardedArray:
        """Return the part of an array that is a range of its flattened elements.

        Parameters
        ----------
        shape : sequence of int
            Shape of the whole array.
        start : int
            Which element, in C order, `piece` begins with.
        piece : Array, shape (length,)
            The elements; there may be none.

        Returns
        -------
        ShardedArray
            At most ``2 * ndim - 1`` pieces: reshaped views of `piece`.

        Raises
        ------
        SizeMismatchError
            If `piece` has not one dimension, or the array has no such range.

        Notes
        -----
        Local; copies nothing.
        """
        if len(piece.shape) != 1:
            raise SizeMismatchError(
                f"ShardedArray.of_range: expected a piece of one dimension, got shape {piece.shape}"
            )
        pieces = {}
        taken = 0
        for box in boxes_of_range(shape, start, start + len(piece)):
            pieces[box] = piece[taken : taken + box.count].reshape(box.sizes)
            taken += box.count
        return cls(shape, piece.dtype, pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's pieces."""
        return sum(box.count for box in self.pieces) * self.dtype.itemsize

    def __repr__(self) -> str:
        return f"ShardedArray(shape={self.shape}, dtype={self.dtype}, pieces={list(self.pieces)})"

    def _check(self, box: Box, piece: Array) -> None:
        """Raise SizeMismatchError unless a piece can be there."""
        if len(box.sizes) != len(self.shape) or any(
            stop > length for stop, length in zip(box.stops, self.shape, strict=True)
        ):
            raise SizeMismatchError(
                f"ShardedArray: {box} does not lie inside the shape {self.shape}"
            )
        if piece.shape != box.sizes or piece.dtype != self.dtype:
            raise SizeMismatchError(
                f"ShardedArray: expected shape {box.sizes} and dtype {self.dtype} for the piece at "
                f"{box.offsets}, got {piece.shape} and {piece.dtype}"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """Which elements of a whole array the array of a parameter holds.

    Parameters
    ----------
    shape : tuple of int
        Shape of the whole array.
    boxes : tuple of (Box, Box)
        For each box of the whole, the box of the array here that holds it, of the same sizes.
        They are several where the pieces are not one box of the whole, as in a weight of
        queries, keys and values that is cut by heads.
    first : bool, optional
        Whether this rank is the one that counts and writes these elements, of several that hold
        the same.

    Raises
    ------
    SizeMismatchError
        If the two boxes of a pair have different sizes.

    Examples
    --------
    The second half of the rows of a (4, 3) array:

    >>> half = Part((4, 3), ((Box((2, 0), (2, 3)), Box((0, 0), (2, 3))),))
    >>> [there.offsets for there, _ in half.within(Box((1, 0), (1, 3))).boxes]
    [(3, 0)]
    """

    shape: tuple[int, ...]
    boxes: tuple[tuple[Box, Box], ...]
    first: bool = True

    def __post_init__(self) -> None:
        for there, local in self.boxes:
            if there.sizes != local.sizes:
                raise SizeMismatchError(
                    f"Part: {there} of the whole and {local} of the array here have different sizes"
                )

    def within(self, box: Box) -> Part:
        """Return the part that is left when the array here is cut to a box of it.

        Parameters
        ----------
        box : Box
            Where the new array lies in the array here.
        """
        boxes = []
        for there, local in self.boxes:
            common = local.intersect(box)
            if common is not None:
                inside = common.relative_to(local)
                boxes.append((inside.placed_in(there), common.relative_to(box)))
        return Part(self.shape, tuple(boxes), self.first)

    @classmethod
    def of_ranges(
        cls, shape: Sequence[int], dimension: int, ranges: Sequence[tuple[int, int]]
    ) -> Part:
        """Return the part that some ranges of one dimension are, side by side.

        Parameters
        ----------
        shape : sequence of int
            Of the whole array.
        dimension : int
            Which one is cut, counted from 0.
        ranges : sequence of (int, int)
            Offset and size of each, at least one; they may be empty.
        """
        whole = Box.whole(shape)
        slices = part_slices([size for _, size in ranges])
        boxes = tuple(
            (whole.along(dimension, offset, size), whole.along(dimension, local.start, size))
            for (offset, size), local in zip(ranges, slices, strict=True)
        )
        return cls(whole.sizes, boxes)

    def ranges(self, dimension: int) -> list[tuple[int, int]]:
        """Return offset and size of each box of the whole in one dimension."""
        return [(there.offsets[dimension], there.sizes[dimension]) for there, _ in self.boxes]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the array here; of one that holds nothing, zeros."""
        ends = [local.stops for _, local in self.boxes]
        return tuple(map(max, zip(*ends, strict=True))) if ends else (0,) * len(self.shape)

    def of(self, whole: Array) -> Array:
        """Return the array here, in new memory, out of a whole one.

        Parameters
        ----------
        whole : Array, shape (..., *shape)
            Leading axes stay as they are.
        """
        leading = whole.shape[: len(whole.shape) - len(self.shape)]
        piece: Array = array_namespace(whole).empty((*leading, *self.sizes), whole.dtype)
        for there, local in self.boxes:
            source: Any = (..., *there.slices)
            target: Any = (..., *local.slices)
            piece[target] = whole[source]
        return piece

    def sharded(self, array: Array) -> ShardedArray:
        """Return an array of the shape here as a part of the whole; copies nothing.

        Parameters
        ----------
        array : Array
            The values, or anything that belongs to them element by element, such as a gradient or
            an optimizer's state.
        """
        pieces = {there: array[local.slices] for there, local in self.boxes}
        return ShardedArray(self.shape, array.dtype, pieces)


@dataclass(frozen=True, slots=True)
class FlatPart:
    """The elements of a whole array that a one-dimensional array holds: a range of them in C order.

    A `Part` has boxes of the same sizes on both sides; a range that begins or ends within a row is
    none.

    Parameters
    ----------
    shape : tuple of int
        Shape of the whole array.
    start : int
        Which element of the flattened whole the array here begins with.
    first : bool, optional
        As of a `Part`.
    """

    shape: tuple[int, ...]
    start: int
    first: bool = True

    def sharded(self, array: Array) -> ShardedArray:
        """Return an array of one dimension as a part of the whole; copies nothing."""
        return ShardedArray.of_range(self.shape, self.start, array)


def check_held(what: str, held: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state of the same shapes has all that this rank holds.

    Of `held` only its ShardedArrays are looked at. `state` has whole arrays, or ShardedArrays of
    any pieces, under the same names. `what` is named in the error, which lists what is not there.
    """
    lacking = [
        f"{key}: {box}"
        for key, target in held.items()
        if isinstance(target, ShardedArray)
        for box in target.pieces
        if sum(common.count for common, _ in _overlap(box, state[key])) < box.count
    ]
    if lacking:
        raise ValueError(
            f"{what}: the state does not hold all that this rank does; give whole arrays, or "
            "ShardedArrays with at least these parts; nothing was changed:\n  "
            + "\n  ".join(lacking[:5])
        )


def copy_in(held: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Copy what the ShardedArrays of `held` hold out of a state that `check_held` accepted."""
    for key, target in held.items():
        if isinstance(target, ShardedArray):
            for box, piece in target.pieces.items():
                for common, values in _overlap(box, state[key]):
                    piece[common.relative_to(box).slices] = like_device(piece, values)


def _overlap(box: Box, source: ShardedArray | Array) -> list[tuple[Box, Array]]:
    """Return the boxes in which a source overlaps with a box, and its values there."""
    if not isinstance(source, ShardedArray):
        return [(box, source[box.slices])]
    parts = []
    for other, piece in source.pieces.items():
        common = box.intersect(other)
        if common is not None:
            parts.append((common, piece[common.relative_to(other).slices]))
    return parts


def _plain(box: Box) -> Box:
    return Box(tuple(map(index, box.offsets)), tuple(map(index, box.sizes)))
