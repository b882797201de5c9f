"""The model, the batch and the oracle of the tests of pipelines: one process, in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.group import ProcessGroup
from mpidist.mesh import DeviceMesh
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
TIED = ("0.weight", "2.weight")
"""The parameters that `build_connected` has in several layers."""
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
    """Return a model of 16 layers with connections over few and over nearly all of them.

    One parameter is in the first and the last layer, and one in three, of which two are neighbours.
    """
    rng = np.random.default_rng(0)

    def linear(d_in: int = WIDTH, d_out: int = WIDTH) -> Linear:
        return Linear(d_in, d_out, rng=rng, dtype=dtype)

    embedding = Embedding(WORDS, WIDTH, rng=rng, std=1.0, dtype=dtype)
    alike, head = [linear() for _ in range(3)], linear(WIDTH, WORDS)
    head.weight = embedding.weight
    alike[1].weight = alike[2].weight = alike[0].weight
    return Sequential(
        embedding,
        Stash("all but two"),
        alike[0],
        Stash("three"),
        GELU(),
        Dropout(0.2),
        Pop("three"),
        alike[1],
        alike[2],
        Stash("wide"),
        GELU(),
        Pop("wide", merge=CONCAT, axis=-1),
        linear(2 * WIDTH),
        Pop("all but two"),
        LayerNorm(WIDTH, dtype=dtype),
        head,
    )


def batch(samples: int = SAMPLES) -> tuple[Array, Array]:
    """Return (samples, 3) integers and a class for each."""
    rng = np.random.default_rng(7)
    return rng.integers(0, WORDS, (samples, 3)), rng.integers(0, CLASSES, (samples, 3))


def share(mesh: DeviceMesh, samples: int = SAMPLES) -> slice:
    """Return an uneven share of the batch: of three parts the first pipeline has one."""
    index, number = mesh["dp"].group.rank, mesh["dp"].group.size
    ends = [samples * (i + 1) * (i + 2) // (number * (number + 1)) for i in range(-1, number)]
    return slice(ends[index], ends[index + 1])


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
    """Return what all ranks together have; what is tied may be on several, with the same bits."""
    grads: dict[str, Array] = {}
    for _, own in everyone:
        for name in grads.keys() & own.keys():
            assert name in TIED
            np.testing.assert_array_equal(own[name], grads[name], err_msg=name, strict=True)
        grads |= own
    (loss,) = (result.loss for result, _ in everyone if result.samples)
    assert all(np.isnan(result.loss) for result, _ in everyone if not result.samples)
    return Gave(loss, grads)


def assert_same_bits(got: Gave, expected: Gave) -> None:
    assert got.loss == expected.loss
    assert got.grads.keys() == expected.grads.keys()
    for name, array in expected.grads.items():
        np.testing.assert_array_equal(got.grads[name], array, err_msg=name, strict=True)
