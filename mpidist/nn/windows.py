"""Sliding windows over images, shared by convolution and pooling.

Images are (batch, channels, height, width) by their shape. In memory the channels come last
wherever this package makes an image: a window's rows are then contiguous runs, which makes copying
windows 3 to 4 times quicker, and moving the channels to the end and back costs nothing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import TypeAlias

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace

Extent: TypeAlias = int | tuple[int, int]
"""A height and a width, or one number for both."""


def channels_last(x: Array) -> Array:
    """View (batch, channels, height, width) as (batch, height, width, channels)."""
    view: Array = x.transpose(0, 2, 3, 1)
    return view


def channels_first(x: Array) -> Array:
    """View (batch, height, width, channels) as (batch, channels, height, width)."""
    view: Array = x.transpose(0, 3, 1, 2)
    return view


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """The positions of a kernel on an image; (height, width) each, in pixels."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @staticmethod
    def of(kernel: Extent, stride: Extent, padding: Extent, *, operation: str) -> Window:
        """Make a window from numbers or pairs.

        Raises
        ------
        ValueError
            If kernel or stride is below 1 or padding below 0.
        """
        window = Window(_pair(kernel), _pair(stride), _pair(padding))
        if min(window.kernel + window.stride) < 1 or min(window.padding) < 0:
            raise ValueError(
                f"{operation}: expected kernel and stride of at least 1 and no negative padding, "
                f"got kernel {kernel}, stride {stride}, padding {padding}"
            )
        return window

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Count the positions of the kernel on an unpadded image of this size.

        Raises ValueError if the kernel is larger than the padded image.
        """
        padded = (height + 2 * self.padding[0], width + 2 * self.padding[1])
        if padded[0] < self.kernel[0] or padded[1] < self.kernel[1]:
            raise ValueError(
                f"expected a padded image of at least {self.kernel} pixels, got {padded}"
            )
        return (
            (padded[0] - self.kernel[0]) // self.stride[0] + 1,
            (padded[1] - self.kernel[1]) // self.stride[1] + 1,
        )

    def pad(self, x: Array, value: float) -> Array:
        """Return `x`, channels last, with a border of `value`; a view of `x` without padding."""
        top, left = self.padding
        if top == left == 0:
            return channels_last(x)
        n, c, h, w = x.shape
        padded: Array = array_namespace(x).full((n, h + 2 * top, w + 2 * left, c), value, x.dtype)
        padded[:, top : top + h, left : left + w] = channels_last(x)
        return padded

    def unpad(self, padded: Array) -> Array:
        """Cut the border off a channels-last image and view it channels first."""
        top, left = self.padding
        height, width = padded.shape[1:3]
        return channels_first(padded[:, top : height - top, left : width - left])

    def taps(self, padded: Array) -> Iterator[tuple[int, int, Array]]:
        """Yield each position (i, j) in the kernel, and a view of the pixels under it.

        The view has the shape (batch, out_height, out_width, channels) and shares the memory of
        `padded`, which is channels last.
        """
        (kh, kw), (sh, sw) = self.kernel, self.stride
        height, width = padded.shape[1:3]
        for i in range(kh):
            for j in range(kw):
                yield i, j, padded[:, i : height - kh + i + 1 : sh, j : width - kw + j + 1 : sw]

    def columns(self, padded: Array) -> Array:
        """Copy every window into a row: (batch * out_height * out_width, kh * kw * channels)."""
        xp = array_namespace(padded)
        view = xp.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=(1, 2))
        view = view[:, :: self.stride[0], :: self.stride[1]].transpose(0, 1, 2, 4, 5, 3)
        rows = view.shape[0] * view.shape[1] * view.shape[2]
        columns: Array = view.reshape(rows, self.kernel[0] * self.kernel[1] * padded.shape[3])
        return columns


def _pair(extent: Extent) -> tuple[int, int]:
    height, width = extent if isinstance(extent, (tuple, list)) else (extent, extent)
    return operator.index(height), operator.index(width)  # numpy's integers are integers too
