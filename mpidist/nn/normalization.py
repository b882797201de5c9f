"""`BatchNorm2d` and `LayerNorm`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.arrays import array_namespace
from mpidist.nn._windows import channels_first, channels_last
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, count_uses
from mpidist.nn.parameter import Parameter

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
        Of parameters and buffers.

    Notes
    -----
    Parameters: `weight` and `bias`, (channels,), beginning at 1 and 0. Buffers: `running_mean`
    and `running_var`, (channels,), beginning at 0 and 1; they are used outside training and
    updated in training, with the unbiased variance. An empty batch and a replay leave them alone.

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
        self.eps = eps
        self.momentum = momentum
        self.weight = Parameter(np.ones(channels, dtype=dtype))
        self.bias = Parameter(np.zeros(channels, dtype=dtype))
        self.running_mean: Array = np.zeros(channels, dtype=dtype)
        self.running_var: Array = np.ones(channels, dtype=dtype)

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, channels, height, width) to the same shape."""
        xp = array_namespace(x)
        image = channels_last(x)
        rows = image.reshape(-1, x.shape[1])
        if mode.training and rows.shape[0]:
            mean = rows.mean(axis=0)
            centred = rows - mean
            var = xp.square(centred).mean(axis=0)
            if not mode.replay:
                self._update(mean, var, rows.shape[0])
        else:
            centred, var = rows - self.running_mean, self.running_var
        inv_std = 1.0 / xp.sqrt(var + self.eps)
        centred *= inv_std
        y = (centred * self.weight.data + self.bias.data).reshape(image.shape)
        saved = (centred, inv_std, mode.training)
        return channels_first(y), Context(saved, count_uses(self.weight, self.bias))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (batch, channels, height, width) to the same shape."""
        x_hat, inv_std, training = ctx.saved
        image = channels_last(dy)
        rows = image.reshape(x_hat.shape)
        dweight, dbias = (rows * x_hat).sum(axis=0), rows.sum(axis=0)
        if training:
            # The batch's own mean and variance depend on every input.
            count = max(rows.shape[0], 1)
            rows = rows - x_hat * (dweight / count) - dbias / count
        dx = (rows * (self.weight.data * inv_std)).reshape(image.shape)
        return channels_first(dx), (dweight, dbias)

    def backward_weight(self, wctx: Any) -> None:
        """Add the sums over batch, height and width that the first half has made."""
        dweight, dbias = wctx
        self.weight.add_grad(dweight)
        self.bias.add_grad(dbias)

    def _update(self, mean: Array, var: Array, count: int) -> None:
        self._blend(self.running_mean, mean)
        self._blend(self.running_var, var * (count / max(count - 1, 1)))

    def _blend(self, running: Array, new: Array) -> None:
        running *= 1.0 - self.momentum
        running += self.momentum * new


class LayerNorm(Module):
    """Normalises the last axis by its own mean and variance.

    Parameters
    ----------
    dim : int
        Size of the last axis.
    eps : float, optional
        Added to the variance.
    dtype : dtype, optional
        Of the parameters.

    Notes
    -----
    Parameters: `weight` and `bias`, (dim,), beginning at 1 and 0.

    References
    ----------
    Ba, Kiros, Hinton (2016), Layer Normalization, equations 3 and 4.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, dtype: npt.DTypeLike = np.float32) -> None:
        self.eps = eps
        self.weight = Parameter(np.ones(dim, dtype=dtype))
        self.bias = Parameter(np.zeros(dim, dtype=dtype))

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (..., dim) to the same shape."""
        xp = array_namespace(x)
        x_hat = x - x.mean(axis=-1, keepdims=True)
        inv_std = 1.0 / xp.sqrt(xp.square(x_hat).mean(axis=-1, keepdims=True) + self.eps)
        x_hat *= inv_std
        y = x_hat * self.weight.data
        y += self.bias.data
        return y, Context((x_hat, inv_std), count_uses(self.weight, self.bias))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (..., dim) to the same shape."""
        x_hat, inv_std = ctx.saved
        dx = dy * self.weight.data
        along = (dx * x_hat).mean(axis=-1, keepdims=True)
        dx -= dx.mean(axis=-1, keepdims=True)
        dx -= x_hat * along
        dx *= inv_std
        return dx, (x_hat, dy)

    def backward_weight(self, wctx: Any) -> None:
        """Add the sums over all rows of dy times the normalised input, and of dy."""
        x_hat, dy = wctx
        xp = array_namespace(dy)
        dim = dy.shape[-1]
        product = (dy * x_hat).reshape(-1, dim)
        self.weight.add_grad(xp.sum(product, axis=0, out=self.weight.first_grad()))
        rows = dy.reshape(-1, dim)
        self.bias.add_grad(xp.sum(rows, axis=0, out=self.bias.first_grad()))
