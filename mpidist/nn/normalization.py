"""`BatchNorm2d` and `LayerNorm`.

Both work in float32 at least, whatever the dtype of their input: the square of a float16 beyond 255
is infinite. Only the results are rounded, to the dtype that the input and the parameters have
together.
"""

from __future__ import annotations

from typing import Any

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

__all__ = ["BatchNorm2d", "LayerNorm"]


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
        """Map `x` (batch, channels, height, width) to the same shape."""
        xp = array_namespace(x)
        image = channels_last(x)
        dtype = np.result_type(x.dtype, self.weight.dtype)
        wide = _wide(dtype)
        rows = image.reshape(-1, x.shape[1])
        count = rows.shape[0]
        if mode.training and count:
            mean = column_sums(rows) / count
            centred = xp.subtract(rows, mean.astype(wide), dtype=wide)
            var = column_sums(centred, centred) / count
            if not mode.replay:
                self._update(mean, var, count)
        else:
            centred = xp.subtract(rows, self.running_mean, dtype=wide)
            var = self.running_var
        inv_std = (1.0 / xp.sqrt(var + self.eps)).astype(wide, copy=False)
        centred *= inv_std
        y = (centred * self.weight.data + self.bias.data).astype(dtype, copy=False)
        saved = (centred, inv_std, mode.training)
        uses = count_uses(self.weight, self.bias)
        return channels_first(y.reshape(image.shape)), Context(saved, uses)

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (batch, channels, height, width) to the same shape."""
        x_hat, inv_std, training = ctx.saved
        image = channels_last(dy)
        dtype = np.result_type(dy.dtype, self.weight.dtype)
        wide = _wide(dtype)
        rows = image.reshape(x_hat.shape).astype(wide, copy=False)
        dweight, dbias = column_sums(rows, x_hat), column_sums(rows)
        if training:
            # The batch's own mean and variance depend on every input.
            count = max(rows.shape[0], 1)
            rows = rows - x_hat * (dweight / count).astype(wide) - (dbias / count).astype(wide)
        dx = (rows * (self.weight.data * inv_std)).astype(dtype, copy=False)
        return channels_first(dx.reshape(image.shape)), (dweight, dbias)

    def backward_weight(self, wctx: Any) -> None:
        """Add the sums over batch, height and width that the first half has made."""
        dweight, dbias = wctx
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)

    def _update(self, mean: Array, var: Array, count: int) -> None:
        self._blend(self.running_mean, mean)
        if count > 1:  # else there is no unbiased variance, and its 0 would pull towards 0
            self._blend(self.running_var, var * (count / (count - 1)))

    def _blend(self, running: Array, new: Array) -> None:
        running[...] = (1.0 - self.momentum) * running + self.momentum * new


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
