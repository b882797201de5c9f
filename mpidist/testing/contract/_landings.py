"""How arrays lie in memory: layouts of inputs, and ways to pass `out`.

A layout takes an array and returns one of the same shape. A landing takes an input and the expected
result, a host array (None where a rank gets none), and returns the `x` and `out` of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace
from mpidist.testing.contract._values import byte_swapped

Layout: TypeAlias = Callable[[Array], Array]

Landing: TypeAlias = Callable[[Array, "Array | None"], "tuple[Array, Array | None]"]


def plain(x: Array) -> Array:
    """Return `x` itself."""
    return x


def strided(x: Array) -> Array:
    """Return a view of every second element of a larger array."""
    wide: Array = array_namespace(x).zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def reversed_rows(x: Array) -> Array:
    """Return a view with a negative stride."""
    copy: Array = x[::-1].copy()
    return copy[::-1]


def fortran(x: Array) -> Array:
    """Return a copy whose first dimension is contiguous."""
    copy: Array = x.copy(order="F")
    return copy


def repeated(x: Array) -> Array:
    """Return the first row, repeated without memory of its own."""
    view: Array = array_namespace(x).broadcast_to(x[:1], x.shape)
    return view


def read_only(x: Array) -> Array:
    """Return a copy that must not be written."""
    copy: Array = x.copy()
    copy.flags.writeable = False
    return copy


LAYOUTS: tuple[Layout, ...] = (strided, reversed_rows, fortran, repeated)
HOST_LAYOUTS: tuple[Layout, ...] = (byte_swapped, read_only)


def _empty(x: Array, result: Array, order: str = "C") -> Array:
    """Return memory for a result, beside `x`."""
    memory: Array = array_namespace(x).empty(result.shape, result.dtype, order=order)
    return memory


def fresh(x: Array, _: Array | None) -> tuple[Array, Array | None]:
    """Pass no `out`."""
    return x, None


def given(x: Array, result: Array | None) -> tuple[Array, Array | None]:
    """Pass a plain array as `out`."""
    return x, None if result is None else _empty(x, result)


def given_strided(x: Array, result: Array | None) -> tuple[Array, Array | None]:
    """Pass a view of every second element as `out`."""
    return x, None if result is None else strided(_empty(x, result))


def given_fortran(x: Array, result: Array | None) -> tuple[Array, Array | None]:
    """Pass an array whose first dimension is contiguous as `out`."""
    return x, None if result is None else _empty(x, result, order="F")


def given_swapped(x: Array, result: Array | None) -> tuple[Array, Array | None]:
    """Pass an array of the other byte order as `out`."""
    return x, None if result is None else byte_swapped(np.zeros_like(result, order="C"))


def overlapping(x: Array, result: Array | None) -> tuple[Array, Array | None]:
    """Pass an `out` that begins one element behind the beginning of `x`."""
    if result is None:
        return x, None
    memory = array_namespace(x).empty(max(x.size, result.size + 1), x.dtype)
    source = memory[: x.size].reshape(x.shape)
    source[...] = x
    return source, memory[1 : 1 + result.size].reshape(result.shape)


LANDINGS: tuple[Landing, ...] = (given, given_strided, given_fortran, overlapping)
HOST_LANDINGS: tuple[Landing, ...] = (given_swapped,)


def in_place(x: Array, _: Array | None) -> tuple[Array, Array | None]:
    """Pass `x` itself as `out`."""
    return x, x
