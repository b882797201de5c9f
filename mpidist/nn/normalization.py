"""`BatchNorm2d` and `LayerNorm`.

Both work in float32 at least, whatever the dtype of their input: the square of a float16 beyond 255
is infinite. Only the results are rounded, to the dtype that the input and the parameters have
together.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.initial_values import parameter_dtype
from mpidist.nn.layers import column_sums
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, check_gradient, count_uses
from mpidist.nn.parameter import Parameter
from mpidist.nn.windows import channels_first, channels_last

Count: TypeAlias = "float | Array"
"""A number of values; one that is summed over ranks on a device stays there, as an array ()."""


class BatchNorm2d(Module):
    """Normalises each channel by its mean and variance over batch, height and width.

    Parameters
    ----------
    channels : int
        Channels of the input.
    eps : float, optional
        Added to the variance.
    momentum : float, optional
        Weight of a batch in the running statistics.
    dtype : dtype, optional
        Of the parameters; the buffers have float32 at least.

    Raises
    ------
    ValueError
        If there is no arithmetic for `dtype`.

    Notes
    -----
    Parameters: `weight` and `bias`, (channels,), beginning at 1 and 0. Buffers: `running_mean`
    and `running_var`, (channels,), beginning at 0 and 1; they are used outside training and
    updated in training, with the unbiased variance. An empty batch and a replay leave them alone.

    A batch with one value per channel (one sample of one pixel) has no variance: its output is
    `bias`, and it moves `running_mean` alone. It is no error, since a rank's share of a batch may
    be that small when those of the others are not.

    References
    ----------
    Ioffe, Szegedy (2015), Batch Normalization, algorithms 1 and 2.
    """

    buffer_names = ("running_mean", "running_var")

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        dtype = parameter_dtype("BatchNorm2d", dtype)
        self.eps = eps
        self.momentum = momentum
        self.weight = Parameter(np.ones(channels, dtype=dtype))
        self.bias = Parameter(np.zeros(channels, dtype=dtype))
        self.running_mean: Array = np.zeros(channels, dtype=_wide(dtype))
        self.running_var: Array = np.ones(channels, dtype=_wide(dtype))

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, channels, height, width) to the same shape.

        Raises
        ------
        ValueError
            If `x` has another number of axes or channels.
        """
        channels = self.weight.shape[0]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{type(self).__name__}: expected an input of shape (batch, {channels}, height, "
                f"width), got {x.shape}"
            )
        xp = array_namespace(x)
        image = channels_last(x)
        dtype = np.result_type(x.dtype, self.weight.dtype)
        wide = _wide(dtype)
        rows = image.reshape(-1, channels)
        count: Count = 0
        if mode.training:
            count, sums = self._count_and_sums(rows)
            mean = sums / _at_least_one(count)
            centred = xp.subtract(rows, mean.astype(wide), dtype=wide)
            var = self._total(column_sums(centred, centred)) / _at_least_one(count)
            if not mode.replay:
                self._update(mean, var, count)
        else:
            centred = xp.subtract(rows, self.running_mean, dtype=wide)
            var = self.running_var
        inv_std = (1.0 / xp.sqrt(var + self.eps)).astype(wide, copy=False)
        centred *= inv_std
        y = (centred * self.weight.data + self.bias.data).astype(dtype, copy=False)
        saved = (centred, inv_std, count if mode.training else None, x.shape)
        uses = count_uses(self.weight, self.bias)
        return channels_first(y.reshape(image.shape)), Context(saved, uses)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (batch, channels, height, width) to the same shape."""
        x_hat, inv_std, count, shape = ctx.saved
        check_gradient(self, dy, shape)
        image = channels_last(dy)
        dtype = np.result_type(dy.dtype, self.weight.dtype)
        wide = _wide(dtype)
        rows = image.reshape(x_hat.shape).astype(wide, copy=False)
        sums = array_namespace(dy).stack([column_sums(rows, x_hat), column_sums(rows)])
        if count is not None:
            # The batch's own mean and variance depend on every input.
            means = (self._total(sums) / _at_least_one(count)).astype(wide)
            rows = rows - x_hat * means[0] - means[1]
        dx = (rows * (self.weight.data * inv_std)).astype(dtype, copy=False)
        return channels_first(dx.reshape(image.shape)), sums

    def backward_weight(self, wctx: Any) -> None:
        """Add the sums over batch, height and width that the first half has made."""
        dweight, dbias = wctx
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)

    def _count_and_sums(self, rows: Array) -> tuple[Count, Array]:
        """Return how many values a channel of the batch has, and their sums."""
        return rows.shape[0], column_sums(rows)

    def _total(self, sums: Array) -> Array:
        """Return the sums over the whole batch of which these are the sums over what is here."""
        return sums

    def _update(self, mean: Array, var: Array, count: Count) -> None:
        """Move the running statistics; `count` is not looked at, since it may be on a device."""
        _blend(self.running_mean, mean, self.momentum * (count > 0))
        # A single value has no unbiased variance, and its 0 would pull towards 0.
        unbiased = var * (count / _at_least_one(count - 1))
        _blend(self.running_var, unbiased, self.momentum * (count > 1))


def _at_least_one(count: Count) -> Count:
    """Return a number of values as what may be divided by."""
    if isinstance(count, (int, float)):
        return max(count, 1)
    at_least_one: Array = array_namespace(count).maximum(count, 1)
    return at_least_one


def _blend(running: Array, new: Array, momentum: Count) -> None:
    running[...] = (1.0 - momentum) * running + momentum * new


class LayerNorm(Module):
    """Normalises the last axis by its own mean and variance.

    Parameters
    ----------
    dim : int
        Size of the last axis.
    eps : float, optional
        Added to the variance.
    dtype : dtype, optional
        Of the parameters: float16, float32 or float64.

    Raises
    ------
    ValueError
        If there is no arithmetic for `dtype`.

    Notes
    -----
    Parameters: `weight` and `bias`, (dim,), beginning at 1 and 0.

    References
    ----------
    Ba, Kiros, Hinton (2016), Layer Normalization, equations 3 and 4.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, dtype: npt.DTypeLike = np.float32) -> None:
        dtype = parameter_dtype("LayerNorm", dtype)
        self.eps = eps
        self.weight = Parameter(np.ones(dim, dtype=dtype))
        self.bias = Parameter(np.zeros(dim, dtype=dtype))

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (..., dim) to the same shape."""
        xp = array_namespace(x)
        dtype = np.result_type(x.dtype, self.weight.dtype)
        wide = _wide(dtype)
        x_hat = xp.subtract(x, x.mean(axis=-1, keepdims=True, dtype=wide), dtype=wide)
        inv_std = 1.0 / xp.sqrt(xp.square(x_hat).mean(axis=-1, keepdims=True) + self.eps)
        x_hat *= inv_std
        y = x_hat * self.weight.data
        y += self.bias.data
        saved = (x_hat, inv_std)
        return y.astype(dtype, copy=False), Context(saved, count_uses(self.weight, self.bias))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (..., dim) to the same shape."""
        x_hat, inv_std = ctx.saved
        check_gradient(self, dy, x_hat.shape)
        dtype = np.result_type(dy.dtype, self.weight.dtype)
        dx = array_namespace(dy).multiply(dy, self.weight.data, dtype=_wide(dtype))
        along = (dx * x_hat).mean(axis=-1, keepdims=True)
        dx -= dx.mean(axis=-1, keepdims=True)
        dx -= x_hat * along
        dx *= inv_std
        return dx.astype(dtype, copy=False), (x_hat, dy)

    def backward_weight(self, wctx: Any) -> None:
        """Add the sums over all rows of dy times the normalised input, and of dy."""
        x_hat, dy = wctx
        rows = dy.reshape(-1, dy.shape[-1])
        self.weight.add_grad(column_sums(rows, x_hat.reshape(rows.shape)))
        self.bias.add_grad(column_sums(rows))


def _wide(dtype: npt.DTypeLike) -> DType:
    """Return what to work in: float32 at least."""
    return np.result_type(dtype, np.float32)
