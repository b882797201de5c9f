"""Losses that give their value and their gradient in one call.

``loss, dy = cross_entropy(y, target)`` and then ``model.backward(ctx, dy)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import array_namespace, is_device


def cross_entropy(
    logits: Array, target: Array, *, denominator: float | None = None
) -> tuple[Array, Array]:
    """Compute the mean negative log-likelihood of the target classes under softmax(logits).

    Parameters
    ----------
    logits : Array, shape (..., classes), float
        Logarithms of the probabilities, up to a constant per position.
    target : Array, shape (...), integer
        The class of each position, in 0 .. classes - 1.
    denominator : float, optional
        What the sum over positions is divided by. Default: the number of positions here. Give
        the number in the batch joined over all ranks and micro-batches, and the sum of their
        losses and gradients is exactly the joined batch's mean, whatever each one's share is.

    Returns
    -------
    loss : Array, shape (), float32 or wider
        0 for an empty batch.
    dlogits : Array, shape and dtype of `logits`
        Gradient of `loss`.

    Raises
    ------
    ValueError
        If shapes do not fit, `target` is not integer, or `denominator` is not positive. On the
        host also if a target is out of range; on a device, where looking would make the host
        wait, the loss and that position's gradient are NaN then.
    """
    xp = array_namespace(logits)
    classes = logits.shape[-1]
    check_target(target, logits.shape[:-1], classes, "cross_entropy")
    scale = 1.0 / divisor(target.size, denominator)
    wide = xp.result_type(logits.dtype, xp.float32)  # halves are summed in float32
    rows = logits.reshape(-1, classes).astype(wide, copy=True)
    target = target.reshape(-1)
    weight: Any = scale
    if is_device(logits):
        target, weight = _weigh(target, classes, scale, wide)
    picked = (xp.arange(target.size), target)
    rows -= rows.max(axis=-1, keepdims=True)
    shifted = rows[picked]
    xp.exp(rows, out=rows)
    sums = rows.sum(axis=-1, keepdims=True)
    losses = xp.log(sums[:, 0]) - shifted
    if is_device(logits):
        loss = (losses * weight).sum()
        rows *= weight[:, None] / sums
    else:
        loss = np.asarray(losses.sum() * scale, dtype=wide)
        rows *= scale / sums
    rows[picked] -= weight
    return loss, rows.reshape(logits.shape).astype(logits.dtype, copy=False)


def mse_loss(
    pred: Array, target: Array, *, denominator: float | None = None
) -> tuple[Array, Array]:
    """Compute the mean squared error.

    Parameters
    ----------
    pred, target : Array, same shape, float
        Predictions and what they should be.
    denominator : float, optional
        What the sum over elements is divided by. Default: the number of elements here. See
        `cross_entropy`.

    Returns
    -------
    loss : Array, shape (), float32 or wider
        0 for an empty batch.
    dpred : Array, shape and dtype of `pred`
        Gradient of `loss`.

    Raises
    ------
    ValueError
        If shapes differ or `denominator` is not positive.
    """
    xp = array_namespace(pred)
    if pred.shape != target.shape:
        raise ValueError(
            f"mse_loss: expected a target of the prediction's shape {pred.shape}, "
            f"got {target.shape}; shapes are not broadcast"
        )
    scale = 1.0 / divisor(pred.size, denominator)
    wide = xp.result_type(pred.dtype, xp.float32)
    error = xp.subtract(pred, target, dtype=wide)
    loss = xp.asarray(xp.square(error).sum() * scale, dtype=wide)
    error *= 2.0 * scale
    return loss, error.astype(pred.dtype, copy=False)


def divisor(count: int, denominator: float | None) -> float:
    """Return what a sum over `count` elements is divided by; ValueError unless positive."""
    if denominator is None:
        return float(max(count, 1))
    if not denominator > 0:
        raise ValueError(
            f"expected a positive denominator, got {denominator}; give the number of samples of "
            "the batch joined over all ranks"
        )
    return float(denominator)


def check_target(target: Array, shape: tuple[int, ...], classes: int, what: str) -> None:
    """Raise ValueError unless `target` holds classes for logits of shape (*shape, classes)."""
    if tuple(target.shape) != tuple(shape):
        raise ValueError(
            f"{what}: expected a target of shape {tuple(shape)} for logits of shape "
            f"{(*shape, classes)}, got {tuple(target.shape)}"
        )
    if not np.issubdtype(target.dtype, np.integer):
        raise ValueError(f"{what}: expected integer targets, got {target.dtype}")
    if is_device(target):
        return  # see _weigh
    if target.size and (int(target.min()) < 0 or int(target.max()) >= classes):
        raise ValueError(
            f"{what}: expected targets in 0..{classes - 1}, "
            f"got {int(target.min())}..{int(target.max())}"
        )


def _weigh(target: Array, classes: int, scale: float, dtype: DType) -> tuple[Array, Array]:
    """Return targets that are all in range, and the weight of each: NaN of one that was not."""
    xp = array_namespace(target)
    inside = (target >= 0) & (target < classes)
    weights: Array = xp.where(inside, scale, np.nan).astype(dtype)
    return xp.where(inside, target, 0), weights
