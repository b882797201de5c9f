"""Sums over samples and pixels, made in float64 without a float64 copy of the array."""

from __future__ import annotations

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace, is_host

__all__ = ["column_sums"]

# Elements that are widened at once: 512 KiB of float64, which stay in a core's cache.
_BLOCK = 1 << 16
# Elements below which the calls would cost more than the sum.
_SMALL = 1 << 12


def column_sums(a: Array, b: Array | None = None) -> Array:
    """Sum each column of `a`, or of ``a * b``.

    Parameters
    ----------
    a : Array, shape (rows, columns)
        Any floating dtype.
    b : Array, shape of `a`, optional
        Multiplied in before the sum, in the precision of the sum.

    Returns
    -------
    Array, shape (columns,), float64
        Zeros where there are no rows.

    Notes
    -----
    Along the first axis numpy adds one row after the other in the array's own precision: in
    float32 a million values near 100 have a mean that is off by 4e-3, and in float16 a sum stands
    still at 2048 times its summand. A vector of ones times blocks in float64 has no such error and
    takes less time, since it runs in the BLAS.
    """
    xp = array_namespace(a)
    dtype = np.result_type(a.dtype, np.float64)
    rows, columns = a.shape
    if a.size <= _SMALL or not is_host(a):  # one call; a device wants few large kernels
        product = a if b is None else xp.multiply(a, b, dtype=dtype)
        sums: Array = xp.sum(product, axis=0, dtype=dtype)
        return sums
    height = max(1, _BLOCK // max(1, columns))
    ones = np.ones(min(height, rows), dtype)
    total = np.zeros(columns, dtype)
    for start in range(0, rows, height):
        block = a[start : start + height].astype(dtype, copy=False)
        if b is not None:
            block = block * b[start : start + height]
        total += ones[: len(block)] @ block
    return total
