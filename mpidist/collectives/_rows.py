"""How verbs count rows: along the first dimension, a 0-d array being one row."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from mpidist._types import Array
from mpidist.collectives._checks import check_counts
from mpidist.errors import SizeMismatchError
from mpidist.group import ProcessGroup

__all__ = ["contributed_rows", "cut_rows", "elements_in", "rows_of"]


def rows_of(x: Array) -> tuple[int, ...]:
    """Return the shape of `x`, a 0-d array being one row."""
    return x.shape or (1,)


def elements_in(rows: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of elements in each number of rows."""
    row = prod(shape[1:])
    return tuple(count * row for count in rows)


def contributed_rows(
    x: Array, group: ProcessGroup, counts: Sequence[int] | None, verb: str
) -> tuple[int, ...]:
    """Return the rows that each rank contributes, checked against this rank's."""
    mine = rows_of(x)[0]
    if counts is None:
        return (mine,) * group.size
    numbers = check_counts(counts, verb, group)
    if numbers[group.rank] != mine:
        raise SizeMismatchError(
            f"{verb} on {group}: counts says {numbers[group.rank]} rows for this rank, "
            f"x has shape {x.shape}"
        )
    return numbers


def cut_rows(
    shape: tuple[int, ...], group: ProcessGroup, counts: Sequence[int] | None, verb: str
) -> tuple[int, ...]:
    """Return the rows that each rank gets of an array that is cut up."""
    if not shape:
        raise SizeMismatchError(f"{verb} on {group}: x is 0-d and has no rows to share out")
    if counts is None:
        if shape[0] % group.size:
            raise SizeMismatchError(
                f"{verb} on {group}: the first dimension of x must be a multiple of {group.size}, "
                f"got shape {shape}; for uneven shares give counts"
            )
        return (shape[0] // group.size,) * group.size
    numbers = check_counts(counts, verb, group)
    if sum(numbers) != shape[0]:
        raise SizeMismatchError(
            f"{verb} on {group}: counts {numbers} add up to {sum(numbers)} rows, "
            f"x has shape {shape}"
        )
    return numbers
