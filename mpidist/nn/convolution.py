"""`Conv2d`: a convolution as one product of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.initial_values import Rng, fan_in_uniform, parameter_dtype
from mpidist.nn.layers import column_sums
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, count_uses
from mpidist.nn.parameter import Parameter
from mpidist.nn.windows import Extent, Window, channels_first, channels_last

_TURNED = 2 << 20
"""Bytes of a gradient that are turned at a time: most kernels are smaller than this, and a product
of few rows is slow."""


class Conv2d(Module):
    """Cross-correlation of images with learned kernels.

    Parameters
    ----------
    c_in, c_out : int
        Channels of input and output.
    kernel_size : int or tuple of int
        Height and width of a kernel, in pixels.
    rng : numpy.random.Generator or int
        Draws the initial values, uniform on +-1/sqrt(c_in * height * width).
    stride : int or tuple of int, optional
        Pixels between neighbouring positions of the kernel.
    padding : int or tuple of int, optional
        Border of zeros on each side, in pixels.
    bias : bool, optional
        Whether there is a bias per output channel.
    dtype : dtype, optional
        Of the parameters: float16, float32 or float64.

    Raises
    ------
    ValueError
        If a size is out of range, or there is no arithmetic for `dtype`.

    Notes
    -----
    Parameters: `weight` (c_out, c_in, height, width) and `bias` (c_out,) or None. The input is
    kept for backward; the copy of its windows, height * width times as large, is made again.

    References
    ----------
    Chellapilla, Puri, Simard (2006), High Performance Convolutional Neural Networks for Document
    Processing, section 3 (windows unrolled into a matrix).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: Extent,
        *,
        rng: Rng,
        stride: Extent = 1,
        padding: Extent = 0,
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        dtype = parameter_dtype("Conv2d", dtype)
        rng = np.random.default_rng(rng)
        self.window = Window.of(kernel_size, stride, padding, operation="Conv2d")
        kh, kw = self.window.kernel
        fan_in = c_in * kh * kw
        self.weight = Parameter(fan_in_uniform(rng, (c_out, c_in, kh, kw), fan_in, dtype))
        self.bias = Parameter(fan_in_uniform(rng, (c_out,), fan_in, dtype)) if bias else None

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, c_in, height, width) to y (batch, c_out, out_height, out_width)."""
        c_out, c_in = self.weight.shape[:2]
        if x.ndim != 4 or x.shape[1] != c_in:
            raise ValueError(f"Conv2d: expected (batch, {c_in}, height, width), got {x.shape}")
        height, width = self.window.output_size(*x.shape[2:])
        padded = self.window.pad(x, 0.0)
        kernels = channels_last(self.weight.data).reshape(c_out, -1)
        y: Array = array_namespace(x).matmul(self.window.columns(padded), kernels.T)
        if self.bias is not None:
            y += self.bias.data
        y = channels_first(y.reshape(x.shape[0], height, width, c_out))
        return y, Context(padded, count_uses(self.weight, self.bias))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Spread `dy` (batch, c_out, out_height, out_width) over the pixels it depends on."""
        xp = array_namespace(dy)
        padded = ctx.saved
        # Copied once if the channels are not last in memory, since every product reads it.
        pixels = xp.ascontiguousarray(channels_last(dy))
        rows = pixels.reshape(-1, dy.shape[1])
        kernels = xp.ascontiguousarray(self.weight.data.transpose(2, 3, 0, 1))
        dpadded = xp.zeros(padded.shape, dtype=dy.dtype)
        product = xp.empty((rows.shape[0], padded.shape[3]), dtype=dy.dtype)
        # One product per position in the kernel stays in the cache; one product for all does not.
        for i, j, met in self.window.taps(dpadded):
            xp.matmul(rows, kernels[i, j], out=product)
            xp.add(met, product.reshape(met.shape), out=met)
        return self.window.unpad(dpadded), (padded, rows)

    def backward_weight(self, wctx: Any) -> None:
        """Add the products of output gradients and windows, and dy's sum per channel."""
        padded, rows = wctx
        if self.weight.trainable:
            self.weight.add_grad(self._weight_grad(padded, rows))
        if self.bias is not None and self.bias.trainable:
            self.bias.add_grad(column_sums(rows))

    def _weight_grad(self, padded: Array, rows: Array) -> Array:
        xp = array_namespace(rows)
        c_out, c_in, kh, kw = self.weight.shape
        columns = self.window.columns(padded)
        grad = self.weight.empty_grad()
        # The columns have their channels last and the gradient has them first: some of its rows
        # at a time are turned, so that there is no second array of its size.
        height = max(_TURNED // max(columns.shape[1] * rows.dtype.itemsize, 1), 1)
        for start in range(0, c_out, height):
            part = slice(start, start + height)
            # Not kept in a name: it would live while the next one is made.
            grad[part] = channels_first(
                xp.matmul(rows[:, part].T, columns).reshape(-1, kh, kw, c_in)
            )
        return grad
