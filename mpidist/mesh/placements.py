"""Placements: how an array is laid over the dimensions of a mesh, and who owns what of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mpidist._arguments import whole_number
from mpidist._types import SUM, ReduceOp
from mpidist.arrays.boxes import Box, even_part
from mpidist.errors import InvalidRankError, SizeMismatchError, UnsupportedOperationError

__all__ = [
    "Partial",
    "Placement",
    "Replicate",
    "Shard",
    "box_at",
    "check_placements",
    "check_shape",
]


@dataclass(frozen=True, slots=True, repr=False)
class Shard:
    """The ranks along a dimension of the mesh have consecutive parts of the array.

    Parameters
    ----------
    dim : int
        Dimension of the array that is cut, counted from 0. The parts are those of
        `mpidist.arrays.boxes.split_evenly`: they differ by at most one, the longer ones come first,
        and some are empty where there are more ranks than indices.

    Raises
    ------
    UnsupportedOperationError
        If `dim` is not a whole number, or is negative.
    """

    dim: int

    def __post_init__(self) -> None:
        try:
            dim = whole_number(self.dim)
        except TypeError:
            dim = -1
        if dim < 0:
            raise UnsupportedOperationError(
                "Shard: dim must be a dimension of the array, counted from 0; "
                f"got {self.dim!r}. The last one of an array x is x.ndim - 1"
            )
        object.__setattr__(self, "dim", dim)

    def __repr__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True, slots=True)
class Replicate:
    """The ranks along a dimension of the mesh all have the same."""


@dataclass(frozen=True, slots=True, repr=False)
class Partial:
    """The ranks along a dimension of the mesh have arrays of which the reduction is the array.

    Parameters
    ----------
    op : ReduceOp, optional
        How they are combined.

    Raises
    ------
    UnsupportedOperationError
        If `op` is no `ReduceOp`.
    """

    op: ReduceOp = SUM

    def __post_init__(self) -> None:
        if not isinstance(self.op, ReduceOp):
            raise UnsupportedOperationError(
                "Partial: op must be a ReduceOp, such as mpidist.SUM or mpidist.MAX; "
                f"got {self.op!r}"
            )

    def __repr__(self) -> str:
        return f"Partial({self.op.name})"


Placement: TypeAlias = Shard | Replicate | Partial
"""What is done with an array along one dimension of a mesh."""


def box_at(
    shape: Sequence[int],
    sizes: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[int],
) -> Box:
    """Return which part of an array lies at a coordinate of a mesh: the only rule of ownership.

    Parameters
    ----------
    shape : sequence of int
        Shape of the whole array.
    sizes : sequence of int
        Ranks along each dimension of the mesh.
    placements : sequence of Placement
        One per dimension of the mesh. They apply from left to right: each `Shard` cuts what those
        before it have left.
    coordinate : sequence of int
        Where in the mesh.

    Returns
    -------
    Box
        Empty where there are more ranks than indices. `Replicate` and `Partial` do not cut.

    Raises
    ------
    SizeMismatchError
        If the lengths of the arguments differ, a `Shard` names a dimension that the array does not
        have, or a number is negative.
    InvalidRankError
        If the mesh has no such coordinate.
    UnsupportedOperationError
        If something is no `Placement`.

    Notes
    -----
    Local; needs no ranks.

    Examples
    --------
    Five rows over a mesh of 2 x 2, which are cut twice:

    >>> placements = [Shard(0), Shard(0)]
    >>> boxes = [box_at((5,), (2, 2), placements, (i, j)) for i in (0, 1) for j in (0, 1)]
    >>> [(box.offsets[0], box.sizes[0]) for box in boxes]
    [(0, 2), (2, 1), (3, 1), (4, 1)]
    """
    shape = check_shape(shape, "box_at")
    lengths = _whole_numbers(sizes)
    if lengths is None or min(lengths, default=0) < 1:
        raise SizeMismatchError(
            f"box_at: sizes must be whole numbers of ranks, at least 1 each; got {sizes!r}"
        )
    checked = check_placements(placements, len(lengths), len(shape), "box_at")
    index = _whole_numbers(coordinate)
    if (
        index is None
        or len(index) != len(lengths)
        or not all(0 <= i < n for i, n in zip(index, lengths, strict=True))
    ):
        raise InvalidRankError(
            f"box_at: a mesh of sizes {lengths} has no coordinate {coordinate!r}; "
            "give one index per dimension, counted from 0"
        )
    return cut_to(Box.whole(shape), lengths, checked, index)


def cut_to(
    box: Box, sizes: Sequence[int], placements: Sequence[Placement], coordinate: Sequence[int]
) -> Box:
    """Return what `box_at` says, for arguments that have been checked, of any box."""
    for size, placement, number in zip(sizes, placements, coordinate, strict=True):
        if isinstance(placement, Shard):
            box = box.along(placement.dim, *even_part(box.sizes[placement.dim], size, number))
    return box


def check_shape(shape: Sequence[int], what: str) -> tuple[int, ...]:
    """Return the shape of an array as plain numbers.

    Raises
    ------
    SizeMismatchError
        If it is none.
    """
    numbers = _whole_numbers(shape)
    if numbers is None or min(numbers, default=0) < 0:
        raise SizeMismatchError(
            f"{what}: shape must hold whole numbers, none negative; got {shape!r}"
        )
    return numbers


def check_placements(
    placements: Sequence[Placement], mesh_ndim: int, ndim: int, what: str
) -> tuple[Placement, ...]:
    """Return placements as a tuple if they fit the dimensions of mesh and array.

    Parameters
    ----------
    placements : sequence of Placement
        What the caller gave.
    mesh_ndim, ndim : int
        Number of dimensions of the mesh and of the array.
    what : str
        Who asks; begins the messages.

    Raises
    ------
    UnsupportedOperationError
        If something is no placement, or two `Partial` have different operations.
    SizeMismatchError
        If there is not one for each dimension of the mesh, or one names a dimension that the array
        does not have.
    """
    try:
        checked = tuple(placements)
    except TypeError:
        checked = (None,)  # type: ignore[assignment]
    if not all(isinstance(one, (Shard, Replicate, Partial)) for one in checked):
        raise UnsupportedOperationError(
            f"{what}: placements must be a list of Shard(dim), Replicate() or Partial(op), one per "
            f"dimension of the mesh; got {placements!r}"
        )
    if len(checked) != mesh_ndim:
        raise SizeMismatchError(
            f"{what}: expected one placement for each of the mesh's {mesh_ndim} dimensions, got "
            f"{len(checked)}: {list(checked)}"
        )
    for placement in checked:
        if isinstance(placement, Shard) and placement.dim >= ndim:
            raise SizeMismatchError(
                f"{what}: {placement} cuts a dimension that the array does not have; it has "
                f"{ndim}, counted from 0"
            )
    ops = {one.op.name for one in checked if isinstance(one, Partial)}
    if len(ops) > 1:
        raise UnsupportedOperationError(
            f"{what}: {list(checked)} combines in different ways, {' and '.join(sorted(ops))}, and "
            "the result would depend on which comes first; give all Partial one op"
        )
    return checked


def _whole_numbers(values: Sequence[int]) -> tuple[int, ...] | None:
    """Return plain numbers; None if some are none."""
    try:
        return tuple(map(whole_number, values))
    except TypeError:
        return None
