"""All gradients as few arrays; on a device, one kernel for a whole bucket.

Each kernel reads and writes a bucket once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import HALVES, array_namespace, is_device, like_device
from mpidist.nn.parameter import Parameters, named_list

__all__ = ["all_finite_divided", "cast", "gradient_arrays", "scale", "scaled", "sum_of_squares"]

_THREADS = 1 << 17
"""Partial sums per bucket: enough to keep a GPU's memory busy, and few to add up."""


def gradient_arrays(
    parameters: Parameters, caller: str, *, may_be_empty: bool = False
) -> tuple[list[Array], list[Array]]:
    """Return arrays that hold the gradients of these parameters and nothing else.

    Parameters
    ----------
    parameters : Module, DDP or iterable of Parameter
        Those without a gradient are passed over.
    caller : str
        The function that was called; begins the messages of errors.
    may_be_empty : bool, optional
        Whether an iterator may yield nothing.

    Returns
    -------
    host : list of Array
        The gradients on the host, one by one.
    device : list of Array
        Those on a device: neighbours in a bucket as one flat array, with the zeros between them.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If an iterator yields nothing: it may have been used before.
    """
    named = named_list(parameters, caller)
    if not (named or may_be_empty) and isinstance(parameters, Iterator):
        raise ValueError(
            f"{caller}: got no parameter; an iterator can be used only once: pass "
            "model.parameters() anew"
        )
    host: list[Array] = []
    device: list[Array] = []
    parts: dict[FlatBuffer, set[str]] = {}
    for _, parameter in named:
        grad = parameter.grad
        if grad is None:
            continue
        if not is_device(grad):
            host.append(grad)
        elif parameter.location is None:
            device.append(grad)
        else:
            flat, name = parameter.location
            parts.setdefault(flat, set()).add(name)
    for flat, names in parts.items():
        device += [flat.data[segment] for _, segment in flat.segments(dict.fromkeys(names))]
    return host, device


def cast(x: Array, out: Array) -> None:
    """Copy elements into an array of another float type or elsewhere, rounding to nearest.

    Parameters
    ----------
    x : Array, float
        The elements, on the host or on a device.
    out : Array, shape of `x`, float
        Receives them. Infinite where an element is beyond its range.

    Notes
    -----
    Local; blocks the host where one is on a device and the other is not.
    """
    x = like_device(out, x)
    if is_device(x) and x.dtype != out.dtype:
        _cast(array_namespace(x))(x, out)
        return
    # A gradient beyond a half's range becomes an infinity, for GradScaler to find. An error on
    # this rank would leave the others waiting.
    with np.errstate(all="ignore"):
        array_namespace(out).copyto(out, x, casting="unsafe")


@cache
def _cast(xp: ModuleType) -> Any:
    # By way of float, as the host makes one half of another.
    return xp.ElementwiseKernel("T x", "U y", "y = (U)(float)x;", "mpidist_cast")


def scaled(x: Array, factor: float) -> Array:
    """Return `x` times a factor, in its own dtype, calculated in float32 at least.

    Parameters
    ----------
    x : Array, float
        The elements, on a device.
    factor : float
        May be beyond the range of a half.

    Returns
    -------
    Array, shape and dtype of `x`
        A new array.

    Notes
    -----
    Local; does not block the host.
    """
    xp = array_namespace(x)
    out: Array = xp.empty(x.shape, x.dtype)
    _scaled(xp, *_wide(x))(x, factor, out)
    return out


@cache
def _scaled(xp: ModuleType, kind: str, wide: str) -> Any:
    return xp.ElementwiseKernel(
        f"T x, {kind} factor", "T y", f"y = ({wide})x * factor;", "mpidist_scaled"
    )


def scale(x: Array, factor: float) -> None:
    """Multiply by a factor in place, in float64, and round to the dtype.

    Parameters
    ----------
    x : Array, float
        The elements, on a device.
    factor : float
        May be beyond the precision of the dtype.

    Notes
    -----
    Local; does not block the host.
    """
    _, wide = _wide(x)
    _scale(array_namespace(x), wide)(factor, x)


@cache
def _scale(xp: ModuleType, wide: str) -> Any:
    # By way of float where a half is made of it, as in `_cast`.
    return xp.ElementwiseKernel(
        "float64 factor", "T x", f"x = ({wide})((double)x * factor);", "mpidist_scale"
    )


def all_finite_divided(arrays: Sequence[Array], factor: float) -> bool:
    """Divide arrays in place, and return whether all their elements were finite.

    Parameters
    ----------
    arrays : sequence of Array, float
        On one device; divided whether they are finite or not.
    factor : float
        What the elements are divided by.

    Returns
    -------
    bool
        Whether there was no infinity and no NaN.

    Notes
    -----
    Local. One kernel per array; blocks the host once, for the answer.
    """
    if not arrays:
        return True
    xp = array_namespace(arrays[0])
    not_finite = xp.zeros(1, np.int32)
    for array in arrays:
        _divided(xp, *_wide(array))(factor, array, not_finite)
    return not int(not_finite[0])


@cache
def _divided(xp: ModuleType, kind: str, wide: str) -> Any:
    # All threads that write `not_finite` write the same, so they need no order.
    return xp.ElementwiseKernel(
        f"{kind} factor",
        "T x, raw int32 not_finite",
        f"""
        {wide} value = x;
        if (!(value - value == 0)) not_finite[0] = 1;
        x = value / factor;
        """,
        "mpidist_divided",
    )


def sum_of_squares(arrays: Sequence[Array]) -> float:
    """Add up the squares of all elements, in float64.

    Parameters
    ----------
    arrays : sequence of Array, float
        The elements; all arrays on one device.

    Returns
    -------
    float
        The sum; the same bits for the same arrays.

    Notes
    -----
    Local. One kernel per array, and one for all; blocks the host once, for the answer.
    """
    arrays = [array for array in arrays if array.size]
    if not arrays:
        return 0.0
    xp = array_namespace(arrays[0])
    counts = [min(array.size, _THREADS) for array in arrays]
    partial, start = xp.empty(sum(counts), np.float64), 0
    for array, count in zip(arrays, counts, strict=True):
        _squares(xp)(array, array.size, count, partial[start : start + count])
        start += count
    return float(partial.sum())


@cache
def _squares(xp: ModuleType) -> Any:
    # Neighbouring threads read neighbouring elements.
    return xp.ElementwiseKernel(
        "raw T x, int64 size, int64 threads",
        "float64 sum",
        """
        double total = 0;
        for (long long k = i; k < size; k += threads) {
            double value = x[k];
            total += value * value;
        }
        sum = total;
        """,
        "mpidist_squares",
    )


def _wide(x: Array) -> tuple[str, str]:
    """Return what to calculate in, as a kernel's type and as CUDA's."""
    wide = np.dtype(np.float32) if x.dtype in HALVES else x.dtype
    return str(wide), "double" if wide == np.float64 else "float"
