"""The model, the batch and the oracle of the tests of pipelines: one process, in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.group import ProcessGroup
from mpidist.nn import (
    CONCAT,
    GELU,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Mode,
    Pop,
    Recompute,
    Residual,
    Sequential,
    Stash,
    cross_entropy,
)
from mpidist.parallel import Pipeline, StepResult

WORDS, WIDTH, CLASSES, SAMPLES = 11, 12, 4, 37
MODE = Mode(training=True, seed=5, step=3, sample_offset=2)


def build(dtype: Any = np.float32) -> Sequential:
    """Return a model of 12 layers that begins with integers and draws at random."""
    rng = np.random.default_rng(0)

    def linear(d_out: int = WIDTH) -> Linear:
        return Linear(WIDTH, d_out, rng=rng, dtype=dtype)

    block = Sequential(LayerNorm(WIDTH, dtype=dtype), linear(), GELU(), Dropout(0.3), linear())
    return Sequential(
        Embedding(WORDS, WIDTH, rng=rng, std=1.0, dtype=dtype),
        linear(),
        Dropout(0.2),
        GELU(),
        Residual(block),
        linear(),
        Recompute(Sequential(linear(), Dropout(0.4), GELU())),
        linear(),
        GELU(),
        LayerNorm(WIDTH, dtype=dtype),
        Dropout(0.1),
        linear(CLASSES),
    )


def build_connected(dtype: Any = np.float32) -> Sequential:
    """Return a model of 16 layers with connections over few and over nearly all of them."""
    rng = np.random.default_rng(0)

    def linear(d_in: int = WIDTH, d_out: int = WIDTH) -> Linear:
        return Linear(d_in, d_out, rng=rng, dtype=dtype)

    return Sequential(
        Embedding(WORDS, WIDTH, rng=rng, std=1.0, dtype=dtype),
        Stash("all but two"),
        linear(),
        Stash("three"),
        GELU(),
        Dropout(0.2),
        Pop("three"),
        linear(),
        Stash("wide"),
        linear(),
        GELU(),
        Pop("wide", merge=CONCAT, axis=-1),
        linear(2 * WIDTH),
        Pop("all but two"),
        LayerNorm(WIDTH, dtype=dtype),
        linear(WIDTH, WORDS),
    )


def batch(samples: int = SAMPLES) -> tuple[Array, Array]:
    """Return (samples, 3) integers and a class for each."""
    rng = np.random.default_rng(7)
    return rng.integers(0, WORDS, (samples, 3)), rng.integers(0, CLASSES, (samples, 3))


@dataclass(frozen=True)
class Gave:
    """What a step gave: the loss, and gradients by name."""

    loss: float
    grads: Mapping[str, Array]


def alone(
    micro_batches: int,
    *,
    samples: int = SAMPLES,
    dtype: Any = np.float32,
    model: Callable[..., Sequential] = build,
) -> Gave:
    """Run the micro-batches one after the other in one process; numpy cuts the batch."""
    whole, (x, target), loss = model(dtype), batch(samples), 0.0
    for rows in np.array_split(np.arange(samples), micro_batches):
        begin = int(rows[0]) if len(rows) else samples
        y, ctx = whole.forward(x[rows], MODE.shifted(begin))
        part, dy = cross_entropy(y, target[rows], denominator=target.size)
        whole.backward(ctx, dy)
        loss += float(part)
    return Gave(loss, gradients(whole))


def gradients(model: Sequential | Pipeline) -> dict[str, Array]:
    """Return copies of the gradients that there are."""
    named = model.named_parameters()
    return {name: p.grad.copy() for name, p in named if p.grad is not None}


def step(
    group: ProcessGroup,
    micro_batches: int,
    *,
    samples: int = SAMPLES,
    dtype: Any = np.float32,
    model: Callable[..., Sequential] = build,
    **options: Any,
) -> tuple[StepResult, dict[str, Array]]:
    """Run one step, with the batch only where it is used."""
    x, target = batch(samples)
    with Pipeline(model(dtype), group, micro_batches=micro_batches, **options) as pipe:
        ranks = pipe.schedule.rank_of_stage
        result = pipe.step(
            x if group.rank == ranks[0] else None,
            target if group.rank == ranks[-1] else None,
            MODE,
        )
        return result, gradients(pipe)


def joined(everyone: list[tuple[StepResult, dict[str, Array]]]) -> Gave:
    """Return what all ranks together have; each parameter is on one of them."""
    grads: dict[str, Array] = {}
    for _, own in everyone:
        assert not grads.keys() & own.keys()
        grads |= own
    (loss,) = (result.loss for result, _ in everyone if result.samples)
    assert all(np.isnan(result.loss) for result, _ in everyone if not result.samples)
    return Gave(loss, grads)


def assert_same_bits(got: Gave, expected: Gave) -> None:
    assert got.loss == expected.loss
    assert got.grads.keys() == expected.grads.keys()
    for name, array in expected.grads.items():
        np.testing.assert_array_equal(got.grads[name], array, err_msg=name, strict=True)
