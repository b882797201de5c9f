"""Kernels for layers on a device, where the host's algorithm would block the host or be slow.

Each is one kernel of cupy's, in CUDA's C. Results are functions of their arguments alone: no atomic
additions, whose order changes from run to run.
"""

from __future__ import annotations

from functools import cache
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace

_WORD = 2**64 - 1


def rows_at(table: Array, indices: Array) -> Array:
    """Look rows up in a table, all on one device.

    Parameters
    ----------
    table : Array, shape (rows, width), float
    indices : Array, shape (...), integer

    Returns
    -------
    Array, shape (..., width), dtype of `table`
        NaN where an index is below 0 or too large.
    """
    rows, width = table.shape
    xp = array_namespace(table)
    out: Array = xp.empty((*indices.shape, width), table.dtype)
    _lookup(xp)(table, indices, rows, width, np.nan, out)
    return out


@cache
def _lookup(xp: ModuleType) -> Any:
    return xp.ElementwiseKernel(
        "raw T table, raw I indices, int64 rows, int64 width, T outside",
        "T y",
        """
        long long row = indices[i / width];
        y = row >= 0 && row < rows ? table[row * width + i % width] : outside;
        """,
        "mpidist_rows_at",
    )


def sum_rows_at(rows: Array, indices: Array, *, out: Array) -> None:
    """Add up rows that have the same index.

    Parameters
    ----------
    rows : Array, shape (..., width), float
        What is added up, on a device.
    indices : Array, shape (...), integer
        One per row; rows of an index outside the table are left out.
    out : Array, shape (table's rows, width), dtype of `rows`, C-contiguous
        Receives the sums, each in the order of the rows; zeros where there are none.

    Notes
    -----
    Sorts the indices. A thread adds up one column of one index, so an index that most rows have
    takes as long as all.
    """
    xp = array_namespace(rows)
    num, width = out.shape
    flat = indices.reshape(-1).astype(np.int64, copy=False)
    order = xp.argsort(flat, kind="stable")
    begins = xp.searchsorted(flat[order], xp.arange(num + 1))
    _sums(xp, "float" if out.dtype.itemsize < 8 else "double")(rows, order, begins, width, out)


@cache
def _sums(xp: ModuleType, wide: str) -> Any:
    return xp.ElementwiseKernel(
        "raw T rows, raw int64 order, raw int64 begins, int64 width",
        "T total",
        f"""
        {wide} sum = 0;
        for (long long k = begins[i / width]; k < begins[i / width + 1]; ++k) {{
            sum += ({wide})rows[order[k] * width + i % width];
        }}
        total = sum;
        """,
        "mpidist_sum_rows_at",
    )


def philox_at_least(
    threshold: np.uint32, key: tuple[int, int], counter: tuple[int, int], *, like: Array
) -> Array:
    """Draw random 32-bit integers, and return which are not below a threshold.

    Parameters
    ----------
    key : (int, int)
        The key of Philox: the seed and the layer.
    counter : (int, int)
        The upper words of the counter for the first sample; the last one counts samples.
    like : Array, shape (samples, ...)
        On a device; only its shape is looked at.

    Returns
    -------
    Array, shape of `like`, bool
        What `numpy.random.Philox` gives, a stream per sample: see `mpidist.nn.dropout`.

    References
    ----------
    Salmon, Moraes, Dror, Shaw (2011), Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3.
    """
    xp = array_namespace(like)
    out: Array = xp.empty(like.shape, np.bool_)
    integers = [np.uint64(number & _WORD) for number in (*key, *counter)]
    _philox(xp)(*integers, prod(like.shape[1:]), threshold, out)
    return out


# Philox4x64 with ten rounds. numpy counts up before it draws, so a sample's first four words have
# the counter 1. Each thread makes the block of four words that its own half word lies in.
_PHILOX = """
__device__ inline unsigned long long mpidist_high(unsigned long long a, unsigned long long b) {
    unsigned long long a0 = a & 0xFFFFFFFFULL, a1 = a >> 32, b0 = b & 0xFFFFFFFFULL, b1 = b >> 32;
    unsigned long long middle = a1 * b0 + (a0 * b0 >> 32);
    return a1 * b1 + (middle >> 32) + ((a0 * b1 + (middle & 0xFFFFFFFFULL)) >> 32);
}
"""

_ROUNDS = """
unsigned long long place = i % size, sample = i / size;
unsigned long long c0 = place / 8 + 1, c1 = 0, c2 = step, c3 = first + sample;
unsigned long long k0 = key0, k1 = key1;
for (int round = 0; round < 10; ++round) {
    unsigned long long high0 = mpidist_high(0xD2E7470EE14C6C93ULL, c0);
    unsigned long long high1 = mpidist_high(0xCA5A826395121157ULL, c2);
    unsigned long long low0 = 0xD2E7470EE14C6C93ULL * c0, low1 = 0xCA5A826395121157ULL * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B97F4A7C15ULL;
    k1 += 0xBB67AE8584CAA73BULL;
}
int lane = (int)(place / 2 % 4);
unsigned long long word = lane == 0 ? c0 : lane == 1 ? c1 : lane == 2 ? c2 : c3;
unsigned int half = (unsigned int)(place % 2 ? word >> 32 : word);
stays = half >= threshold;
"""


@cache
def _philox(xp: ModuleType) -> Any:
    return xp.ElementwiseKernel(
        "uint64 key0, uint64 key1, uint64 step, uint64 first, int64 size, uint32 threshold",
        "bool stays",
        _ROUNDS,
        "mpidist_philox",
        preamble=_PHILOX,
    )
