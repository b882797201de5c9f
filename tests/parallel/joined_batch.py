"""Batch normalisation of a joined batch in plain numpy, and what is compared with it on ranks."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import to_host
from mpidist.collectives import all_gather_object
from mpidist.group import ProcessGroup
from mpidist.nn import Mode
from mpidist.parallel import SyncBatchNorm2d

CHANNELS, IMAGE = 3, (2, 5)
EPS, MOMENTUM = 1e-3, 0.3
TRAINING = Mode(training=True)

SHARES = {
    "even": (2, 2, 2, 2),
    "one has all": (0, 9, 0, 0),
    "one has none": (5, 0, 4, 1),
    "one sample each": (1, 1, 1, 1),
    "one sample in all": (0, 1, 0, 0),
    "nothing": (0, 0, 0, 0),
}
"""Samples of each rank; of fewer ranks the first ones."""

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


def joined_batch(samples: int, *, mean: float = 0.0) -> tuple[Array, Array]:
    """Return the joined batch and a gradient by its output, in float64."""
    rng = np.random.default_rng(7)
    x, dy = rng.normal(size=(2, samples, CHANNELS, *IMAGE))
    return mean + 2 * x, dy


def start(rng: np.random.Generator) -> dict[str, Array]:
    """Return what a norm begins with: weight, bias and running statistics."""
    names = ("weight", "bias", "running_mean", "running_var")
    return dict(zip(names, rng.uniform(0.5, 2, size=(4, CHANNELS)), strict=True))


def normalised(x: Array, dy: Array, state: dict[str, Array]) -> dict[str, Array]:
    """Return all that a training step of the norm gives, by the formulas of the paper."""
    axes, column = (0, 2, 3), (1, CHANNELS, 1, 1)
    values = x.size // CHANNELS
    mean = x.mean(axis=axes) if values else np.zeros(CHANNELS)
    var = x.var(axis=axes) if values else np.zeros(CHANNELS)
    inv_std = 1 / np.sqrt(var + EPS)
    x_hat = (x - mean.reshape(column)) * inv_std.reshape(column)
    dweight, dbias = (dy * x_hat).sum(axis=axes), dy.sum(axis=axes)
    d_hat = dy * state["weight"].reshape(column)
    # Equations of section 3: by the input itself, by the variance, and by the mean.
    dvar = (d_hat * (x - mean.reshape(column))).sum(axis=axes) * -0.5 * inv_std**3
    dmean = -(d_hat * inv_std.reshape(column)).sum(axis=axes)
    n = max(values, 1)
    by_var = dvar.reshape(column) * 2 * (x - mean.reshape(column)) / n
    dx = d_hat * inv_std.reshape(column) + by_var + dmean.reshape(column) / n
    new_mean, new_var = state["running_mean"], state["running_var"]
    if values:
        new_mean = (1 - MOMENTUM) * new_mean + MOMENTUM * mean
    if values > 1:
        new_var = (1 - MOMENTUM) * new_var + MOMENTUM * var * values / (values - 1)
    y = state["weight"].reshape(column) * x_hat + state["bias"].reshape(column)
    return {
        "y": y,
        "dx": dx,
        "weight": dweight,
        "bias": dbias,
        "running_mean": new_mean,
        "running_var": new_var,
    }


def check_joined(
    group: ProcessGroup,
    name: str,
    dtype: str,
    *,
    xp: Any = np,
    mean: float = 0.0,
    tolerance: float | None = None,
) -> None:
    """Compare a step on this rank's samples with that on the joined batch."""
    shares = SHARES[name][: group.size]
    x, dy = joined_batch(sum(shares), mean=mean)
    state = start(np.random.default_rng(1))
    expected = normalised(x.astype(dtype).astype(np.float64), dy, state)
    norm = SyncBatchNorm2d(CHANNELS, group, eps=EPS, momentum=MOMENTUM, dtype=dtype)
    norm.load_state_dict({key: value.astype(dtype) for key, value in state.items()})
    norm.to("cpu" if xp is np else "gpu")
    end = list(accumulate(shares))[group.rank]
    mine = slice(end - shares[group.rank], end)
    y, ctx = norm.forward(xp.asarray(x[mine].astype(dtype)), TRAINING)
    dx = norm.backward(ctx, xp.asarray(dy[mine].astype(dtype)))
    grads = {key: to_host(p.grad).astype(np.float64) for key, p in norm.named_parameters()}
    buffers = {key: to_host(b) for key, b in norm.named_buffers()}
    everyone = all_gather_object((grads, {k: b.tobytes() for k, b in buffers.items()}), group)
    got = {key: sum(rank[0][key] for rank in everyone) for key in grads} | buffers
    got |= {"y": to_host(y), "dx": to_host(dx)}
    assert all(bits == everyone[0][1] for _, bits in everyone)
    assert {got["y"].dtype, got["dx"].dtype} == {np.dtype(dtype)}
    for key, value in expected.items():
        wanted = value[mine] if key in ("y", "dx") else value
        assert got[key].shape == wanted.shape, key
        scale = max(1.0, np.abs(value).max(initial=0))
        error = np.abs(got[key] - wanted).max(initial=0)
        assert error <= (tolerance or TOLERANCE[dtype]) * scale, (key, error)
