"""Layers of one matrix or none: `Linear`, `Embedding`, `PositionEmbedding`, `Flatten`."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace, is_device, is_host
from mpidist.nn.initial_values import Rng, fan_in_uniform, normal, parameter_dtype
from mpidist.nn.layer_kernels import rows_at, sum_rows_at
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, ParameterFree, check_gradient, count_uses
from mpidist.nn.parameter import Parameter

_BLOCK = 1 << 16
"""Elements that are widened at once: 512 KiB of float64, which stay in a core's cache."""

_SMALL = 1 << 12
"""Elements below which the calls would cost more than the sum."""


class Linear(Module):
    """Affine map of the last axis, ``y = x @ weight.T + bias``.

    Parameters
    ----------
    d_in, d_out : int
        Sizes of the last axis of input and output.
    rng : numpy.random.Generator or int
        Draws the initial values, uniform on +-1/sqrt(d_in).
    bias : bool, optional
        Whether there is a bias.
    dtype : dtype, optional
        Of the parameters: float16, float32 or float64.

    Raises
    ------
    ValueError
        If there is no arithmetic for `dtype`.

    Notes
    -----
    Parameters: `weight` (d_out, d_in) and `bias` (d_out,) or None.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        rng: Rng,
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        dtype = parameter_dtype("Linear", dtype)
        rng = np.random.default_rng(rng)
        self.weight = Parameter(fan_in_uniform(rng, (d_out, d_in), d_in, dtype))
        self.bias = Parameter(fan_in_uniform(rng, (d_out,), d_in, dtype)) if bias else None

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (..., d_in) to y (..., d_out).

        Raises
        ------
        ValueError
            If the last axis of `x` has another size.
        """
        d_out, d_in = self.weight.shape
        if x.shape[-1] != d_in:
            raise ValueError(f"Linear: expected an input of shape (..., {d_in}), got {x.shape}")
        y = self._product(x)
        if self.bias is not None:
            y += self.bias.data
        return y.reshape(*x.shape[:-1], d_out), Context(x, count_uses(self.weight, self.bias))

    def _product(self, x: Array) -> Array:
        """Return ``x @ weight.T`` in new memory, as a matrix."""
        # One product of two matrices: numpy would run one per leading index otherwise.
        y: Array = array_namespace(x).matmul(_rows(x), self.weight.data.T)
        return y

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (..., d_out) to dx (..., d_in)."""
        x = ctx.saved
        check_gradient(self, dy, (*x.shape[:-1], self.weight.shape[0]))
        dx = array_namespace(dy).matmul(_rows(dy), self.weight.data)
        return dx.reshape(x.shape), (x, dy)

    def backward_weight(self, wctx: Any) -> None:
        """Add dy.T @ x and the sum of dy over all rows."""
        x, dy = wctx
        xp = array_namespace(dy)
        rows = _rows(dy)
        if self.weight.trainable:
            # `out` is the bucket's own memory at the first contribution and None later.
            self.weight.add_grad(xp.matmul(rows.T, _rows(x), out=self.weight.first_grad()))
        if self.bias is not None and self.bias.trainable:
            self.bias.add_grad(column_sums(rows))


class Embedding(Module):
    """Table of vectors, one per integer.

    Parameters
    ----------
    num : int
        Rows of the table; inputs lie in 0 .. num - 1.
    dim : int
        Length of a vector.
    rng : numpy.random.Generator or int
        Draws the initial values, normal with mean 0.
    std : float, optional
        Standard deviation of the initial values.
    dtype : dtype, optional
        Of the table: float16, float32 or float64.

    Raises
    ------
    ValueError
        If there is no arithmetic for `dtype`.

    Notes
    -----
    Parameter: `weight` (num, dim).
    """

    def __init__(
        self,
        num: int,
        dim: int,
        *,
        rng: Rng,
        std: float = 0.02,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        dtype = parameter_dtype("Embedding", dtype)
        self.weight = Parameter(normal(rng, (num, dim), std, dtype))

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map integers `x` (batch, ...) to rows y (batch, ..., dim).

        Raises
        ------
        ValueError
            If `x` holds no integers, or, on the host, one outside the table. On a device, where
            looking would make the host wait, such an integer gives a row of NaN.
        """
        check_integers(x, self.weight.shape[0])
        if is_device(x):
            return rows_at(self.weight.data, x), Context(x, count_uses(self.weight))
        return self.weight.data[x], Context(x, count_uses(self.weight))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Return zeros of the input's shape: integers have no gradient."""
        xp = array_namespace(dy)
        return xp.zeros(ctx.saved.shape, dtype=dy.dtype), (ctx.saved, dy)

    def backward_weight(self, wctx: Any) -> None:
        """Add each row's sum of dy, in the order of the samples."""
        if not self.weight.trainable:
            return
        x, dy = wctx
        xp = array_namespace(dy)
        grad = self.weight.empty_grad()
        if is_device(x):
            sum_rows_at(dy, x, out=grad)
            self.weight.add_grad(grad)
            return
        grad[...] = 0
        if x.size:
            # Sorting makes the rows of one index neighbours: one sum per run, always in the
            # same order, and much faster than an unbuffered add.
            order = xp.argsort(x.reshape(-1), kind="stable")
            indices = x.reshape(-1)[order]
            later = xp.flatnonzero(indices[1:] != indices[:-1]) + 1
            starts = xp.concatenate([xp.zeros(1, dtype=later.dtype), later])
            rows = _rows(dy)[order]
            grad[indices[starts]] = xp.add.reduceat(rows, starts, axis=0)
        self.weight.add_grad(grad)


def check_integers(x: Array, num: int) -> None:
    """Raise unless an embedding of `num` rows can look `x` up, as far as the host can say."""
    if x.dtype.kind not in "iu":
        raise ValueError(f"Embedding: expected an integer array, got {x.dtype}")
    if is_host(x) and x.size and (int(x.min()) < 0 or int(x.max()) >= num):
        raise ValueError(
            f"Embedding: expected integers in 0..{num - 1}, got {int(x.min())}..{int(x.max())}"
        )


class PositionEmbedding(Module):
    """Adds a learned vector per position.

    Parameters
    ----------
    length : int
        Most positions a sample may have.
    dim : int
        Length of a vector.
    rng : numpy.random.Generator or int
        Draws the initial values, normal with mean 0.
    std : float, optional
        Standard deviation of the initial values.
    dtype : dtype, optional
        Of the table: float16, float32 or float64.

    Raises
    ------
    ValueError
        If there is no arithmetic for `dtype`.

    Notes
    -----
    Parameter: `weight` (length, dim).
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        rng: Rng,
        std: float = 0.02,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        dtype = parameter_dtype("PositionEmbedding", dtype)
        self.weight = Parameter(normal(rng, (length, dim), std, dtype))

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, time, dim) to ``x + weight[:time]``.

        Raises
        ------
        ValueError
            If a sample is longer than the table.
        """
        time, length = x.shape[1], self.weight.shape[0]
        if time > length:
            raise ValueError(f"PositionEmbedding: expected at most {length} positions, got {time}")
        return x + self.weight.data[:time], Context(None, count_uses(self.weight))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Pass `dy` (batch, time, dim) on."""
        return dy, dy

    def backward_weight(self, wctx: Any) -> None:
        """Add the sum of dy over the batch."""
        if not self.weight.trainable:
            return
        xp = array_namespace(wctx)
        time = wctx.shape[1]
        grad = self.weight.empty_grad()
        xp.sum(wctx, axis=0, out=grad[:time])
        grad[time:] = 0
        self.weight.add_grad(grad)


class Flatten(ParameterFree):
    """Joins all axes but the first."""

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, ...) to y (batch, size of a sample)."""
        size = int(np.prod(x.shape[1:]))
        return x.reshape(x.shape[0], size), Context(x.shape)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Give `dy` the input's shape."""
        return dy.reshape(ctx.saved), None


def _rows(x: Array) -> Array:
    """View (..., size) as a matrix; `size` may be 0, where numpy cannot tell how many rows."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def column_sums(a: Array, b: Array | None = None) -> Array:
    """Sum each column of `a` (rows, columns), or of ``a * b``, in float64.

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
