"""`CausalSelfAttention`: every position looks at itself and at those before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace
from mpidist.nn.initial_values import Rng
from mpidist.nn.layers import Linear
from mpidist.nn.mode import Mode
from mpidist.nn.module import Context, Module, count_uses


class CausalSelfAttention(Module):
    """Multi-head scaled dot-product attention of a sequence to its own past.

    Parameters
    ----------
    dim : int
        Size of the last axis of input and output.
    heads : int
        Number of heads; divides `dim`.
    rng : numpy.random.Generator or int
        Draws the initial values.
    dtype : dtype, optional
        Of the parameters: float16, float32 or float64.

    Raises
    ------
    ValueError
        If `heads` does not divide `dim`, or there is no arithmetic for `dtype`.

    Notes
    -----
    Children: `qkv`, a `Linear` from dim to 3 * dim whose output is all heads' queries, then keys,
    then values; and `proj`, a `Linear` from dim to dim. Keeps the attention weights (batch, heads,
    time, time) for backward.

    References
    ----------
    Vaswani et al. (2017), Attention Is All You Need, sections 3.2.1 to 3.2.3.
    """

    def __init__(
        self, dim: int, heads: int, *, rng: Rng, dtype: npt.DTypeLike = np.float32
    ) -> None:
        if heads < 1 or dim % heads:
            raise ValueError(
                f"CausalSelfAttention: expected a number of heads that divides dim {dim}, "
                f"got {heads}"
            )
        rng = np.random.default_rng(rng)
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = Linear(dim, 3 * dim, rng=rng, dtype=dtype)
        self.proj = Linear(dim, dim, rng=rng, dtype=dtype)

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        """Map `x` (batch, time, dim) to the same shape."""
        qkv, qkv_ctx = self.qkv.forward(x, mode)
        q, k, v = _split_heads(qkv, self.head_dim)
        q = q * (1.0 / math.sqrt(self.head_dim))
        # Not the width of `x`: `qkv` may have only some of the heads.
        shape = (*x.shape[:-1], qkv.shape[-1] // 3)
        mixed = array_namespace(x).empty(shape, dtype=qkv.dtype)
        weights = _causal_softmax(q, k)
        _as_heads(mixed, self.head_dim)[...] = weights @ v
        y, proj_ctx = self.proj.forward(mixed, mode)
        return y, Context((qkv_ctx, (q, k, v, weights), proj_ctx), count_uses(qkv_ctx, proj_ctx))

    def backward(self, ctx: Context, dy: Array) -> Array:
        """Run the children's whole backward passes, last first."""
        qkv_ctx, attention, proj_ctx = ctx.saved
        dmixed = self.proj.backward(proj_ctx, dy)
        return self.qkv.backward(qkv_ctx, self._attention_backward(attention, dmixed))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        """Map `dy` (batch, time, dim) to the same shape."""
        qkv_ctx, attention, proj_ctx = ctx.saved
        dmixed, proj_wctx = self.proj.backward_input(proj_ctx, dy)
        dqkv = self._attention_backward(attention, dmixed)
        dx, qkv_wctx = self.qkv.backward_input(qkv_ctx, dqkv)
        return dx, (qkv_wctx, proj_wctx)

    def backward_weight(self, wctx: Any) -> None:
        """Run the children's second halves, last first."""
        qkv_wctx, proj_wctx = wctx
        self.proj.backward_weight(proj_wctx)
        self.qkv.backward_weight(qkv_wctx)

    def _attention_backward(self, saved: tuple[Array, ...], dmixed: Array) -> Array:
        """Map dmixed (batch, time, width) to dqkv (batch, time, 3 * width)."""
        q, k, v, weights = saved
        batch, time, width = dmixed.shape
        dout = _as_heads(dmixed, self.head_dim)
        dqkv: Array = array_namespace(dmixed).empty((batch, time, 3 * width), dtype=dmixed.dtype)
        dq, dk, dv = _split_heads(dqkv, self.head_dim)
        dv[...] = weights.swapaxes(-1, -2) @ dout
        # Softmax: each row of scores moves by weights * (its gradient - their weighted mean).
        dscores = dout @ v.swapaxes(-1, -2)
        dscores -= (dscores * weights).sum(axis=-1, keepdims=True)
        dscores *= weights
        dk[...] = dscores.swapaxes(-1, -2) @ q  # q is already scaled
        dq[...] = dscores @ k
        dq *= 1.0 / math.sqrt(self.head_dim)
        return dqkv


def _as_heads(x: Array, head_dim: int) -> Array:
    """View (batch, time, heads * head_dim) as (batch, heads, time, head_dim)."""
    batch, time, width = x.shape
    view: Array = x.reshape(batch, time, width // head_dim, head_dim).transpose(0, 2, 1, 3)
    return view


def _split_heads(qkv: Array, head_dim: int) -> tuple[Array, Array, Array]:
    """View (batch, time, 3 * width) as queries, keys, values (batch, heads, time, head_dim)."""
    width = qkv.shape[-1] // 3
    q, k, v = (_as_heads(qkv[..., i * width : (i + 1) * width], head_dim) for i in range(3))
    return q, k, v


def _causal_softmax(q: Array, k: Array) -> Array:
    """Return the weights (batch, heads, time, time) of each query over the keys up to it."""
    xp = array_namespace(q)
    time = q.shape[2]
    scores: Array = q @ k.swapaxes(-1, -2)
    scores += xp.triu(xp.full((time, time), -xp.inf, dtype=scores.dtype), k=1)
    scores -= scores.max(axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
