"""`MaxPool2d` and `AvgPool2d`."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, ParameterFree
from mpidist.nn.windows import Extent, Window, channels_first, channels_last


class _Pool2d(ParameterFree):
    """Pooling: one number for each window of an image."""

    def __init__(
        self, kernel_size: Extent, *, stride: Extent | None = None, padding: Extent = 0
    ) -> None:
        operation = type(self).__name__
        stride = kernel_size if stride is None else stride
        self.window = Window.of(kernel_size, stride, padding, operation=operation)
        if any(2 * p > k for p, k in zip(self.window.padding, self.window.kernel, strict=True)):
            # Otherwise a window could lie in the border alone.
            raise ValueError(
                f"{operation}: expected a padding of at most half the kernel {self.window.kernel}, "
                f"got {self.window.padding}"
            )


class MaxPool2d(_Pool2d):
    """Largest pixel of each window.

    Parameters
    ----------
    kernel_size : int or tuple of int
        Height and width of the window, in pixels.
    stride : int or tuple of int, optional
        Pixels between neighbouring windows. Default: the kernel's size.
    padding : int or tuple of int, optional
        Border of minus infinity on each side, in pixels; at most half the kernel.

    Raises
    ------
    ValueError
        If a size is out of range.

    Notes
    -----
    Of several equal largest pixels the first in row order receives the gradient.
    """

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, channels, height, width) to y (batch, channels, out_h, out_w)."""
        xp = array_namespace(x)
        self.window.output_size(*x.shape[2:])
        padded = self.window.pad(x, -np.inf)
        taps = self.window.taps(padded)
        y: Array = xp.array(next(taps)[2])
        winner = xp.zeros(y.shape, dtype=xp.int32)
        for number, (_, _, pixels) in enumerate(taps, start=1):
            xp.copyto(winner, number, where=pixels > y)
            xp.maximum(y, pixels, out=y)
        return channels_first(y), Context((padded.shape, winner))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Give each element of `dy` to the pixel that won."""
        xp = array_namespace(dy)
        shape, winner = ctx.saved
        dpadded = xp.zeros(shape, dtype=dy.dtype)
        dy = channels_last(dy)
        for number, (_, _, pixels) in enumerate(self.window.taps(dpadded)):
            xp.add(pixels, dy * (winner == number), out=pixels)
        return self.window.unpad(dpadded), None


class AvgPool2d(_Pool2d):
    """Mean of the pixels of each window.

    Parameters
    ----------
    kernel_size : int or tuple of int
        Height and width of the window, in pixels.
    stride : int or tuple of int, optional
        Pixels between neighbouring windows. Default: the kernel's size.
    padding : int or tuple of int, optional
        Border of zeros on each side, in pixels, counted in the mean; at most half the kernel.

    Raises
    ------
    ValueError
        If a size is out of range.
    """

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, channels, height, width) to y (batch, channels, out_h, out_w)."""
        self.window.output_size(*x.shape[2:])
        padded = self.window.pad(x, 0.0)
        taps = self.window.taps(padded)
        y: Array = array_namespace(x).array(next(taps)[2])
        for _, _, pixels in taps:
            y += pixels
        y *= self._share()
        return channels_first(y), Context(padded.shape)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Spread each element of `dy` evenly over its window."""
        xp = array_namespace(dy)
        dpadded = xp.zeros(ctx.saved, dtype=dy.dtype)
        share = channels_last(dy) * self._share()
        for _, _, pixels in self.window.taps(dpadded):
            xp.add(pixels, share, out=pixels)
        return self.window.unpad(dpadded), None

    def _share(self) -> float:
        return 1.0 / (self.window.kernel[0] * self.window.kernel[1])
