"""Combining the arrays of several ranks where they lie, a cacheful at a time."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, TypeAlias, TypeVar

import numpy as np

from mpidist._types import LAND, LOR, LXOR, MEAN, PROD, SUM, Array, DType, ReduceOp
from mpidist.arrays.boxes import split_evenly
from mpidist.arrays.namespaces import HALVES, reduce_in_rank_order, ufunc_of

__all__ = [
    "Combine",
    "combination",
    "combining",
    "even_slices",
    "in_blocks",
    "quietly",
    "reduce_into",
    "reduce_into_all",
    "silent_context",
]

CACHE_LINE = 64

BLOCK_BYTES = 256 << 10
"""What is combined at a time: small enough to stay in a core's cache for the copies that follow."""

T = TypeVar("T")

Combine: TypeAlias = Callable[[list[Array], Array], None]
"""Combines arrays in their order into another, which may be the first of them."""


def silent_context() -> contextvars.Context:
    """Return a context in which numpy does not warn about infinities and NaN.

    They are results here, as in every MPI library, whatever the error state of the user: a rank
    that raised in the middle of a collective would leave the others waiting. Since numpy 2.0 the
    error state belongs to the context. One is entered in a tenth of the time that `numpy.errstate`
    takes, which is longer than adding a thousand numbers; by one caller at a time.
    """
    context = contextvars.Context()
    context.run(np.seterr, all="ignore")
    return context


_SILENT_CONTEXT = silent_context()


def quietly(function: Callable[..., T], *args: Any) -> T:
    """Call a function in such a context; several threads may do so at once."""
    return _SILENT_CONTEXT.copy().run(function, *args)


def combination(op: ReduceOp, dtype: DType) -> Combine:
    """Return what combines arrays of this dtype in their order; to be called `quietly`."""
    if dtype in HALVES or op in (LAND, LOR, LXOR):
        return lambda parts, out: reduce_in_rank_order(parts, op, out)
    ufunc = ufunc_of(op)

    def combine(parts: list[Array], out: Array) -> None:
        number = len(parts)
        if number == 1:
            np.copyto(out, parts[0])
            return
        ufunc(parts[0], parts[1], out=out)
        if number > 2:
            for part in parts[2:]:
                ufunc(out, part, out=out)

    def combine_and_divide(parts: list[Array], out: Array) -> None:
        combine(parts, out)
        np.divide(out, len(parts), out=out)

    return combine_and_divide if op is MEAN else combine


def combining(parts: list[Array], op: ReduceOp) -> tuple[Any, ...]:
    """Return a function and all its arguments but the last, the array that receives the result.

    Parameters
    ----------
    parts : list of Array
        What is combined, one array per rank.
    op : ReduceOp
        How.
    """
    dtype = parts[0].dtype
    if len(parts) == 2 and op in (SUM, PROD) and dtype not in HALVES:
        return (ufunc_of(op), *parts)
    return (combination(op, dtype), parts)


def even_slices(count: int, itemsize: int, size: int) -> list[slice]:
    """Cut so many elements into one slice per rank, each beginning on a cache line."""
    per_line = CACHE_LINE // gcd(CACHE_LINE, itemsize)
    return [
        slice(min(start * per_line, count), min((start + length) * per_line, count))
        for start, length in split_evenly(-(-count // per_line), size)
    ]


def in_blocks(arrays: Sequence[Array]) -> list[list[Array]]:
    """Cut arrays of one size into pieces of `BLOCK_BYTES`, those of all arrays together."""
    count, step = arrays[0].size, max(BLOCK_BYTES // arrays[0].itemsize, 1)
    return [[array[start : start + step] for array in arrays] for start in range(0, count, step)]


def reduce_into_all(blocks: Sequence[list[Array]], combine: Combine) -> None:
    """Combine arrays in their order, block by block, and write the result into each of them."""
    for arrays in blocks:
        first = arrays[0]
        combine(arrays, first)
        for other in arrays[1:]:
            np.copyto(other, first)


def reduce_into(arrays: Sequence[Array], combine: Combine, out: Array) -> None:
    """Combine arrays in their order into `out`."""
    for *blocks, target in in_blocks([*arrays, out]):
        combine(blocks, target)
