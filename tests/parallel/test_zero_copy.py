"""A gradient is born where it is reduced: a step makes no array of its size and touches it once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mpidist.nn import Conv2d, Embedding, LayerNorm, Linear, Parameter, Residual, Sequential
from mpidist.parallel import DDP, BucketSizes
from tests.parallel.checks import TRAINING

WIDE = 768  # a matrix of 2.25 MiB in float32
SIZES = BucketSizes(first=1 << 19, rest=1 << 21)


def build():
    return Sequential(
        Embedding(WIDE, WIDE, rng=0),
        Linear(WIDE, WIDE, rng=1),
        Residual(Sequential(LayerNorm(WIDE), Linear(WIDE, WIDE, rng=2))),
        LayerNorm(WIDE),
    )


def steps(ddp, count):
    x = np.arange(6).reshape(2, 3) * 100 + ddp.group.rank
    for _ in range(count):
        ddp.module.zero_grad()
        y, ctx = ddp.forward(x, TRAINING)
        ddp.backward(ctx, np.ones_like(y))


@pytest.mark.ranks(2, 3)
def test_a_step_makes_no_array_of_a_gradients_size(world):
    with DDP(build(), world, sizes=SIZES) as ddp:
        steps(ddp, 2)
        tracemalloc.start()
        try:
            steps(ddp, 1)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            steps(ddp, 2)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # A quarter, since what counts lines for coverage may grow its tables meanwhile.
    assert peak - before < WIDE * WIDE * 4 / 4


@pytest.mark.ranks(2)
def test_nobody_writes_into_a_bucket_but_the_layers_and_the_reduction(world, monkeypatch):
    """Whatever zeroes, packs or unpacks would be seen when a layer asks for its memory."""
    asked = []
    own_memory = Parameter._own_memory

    def watched(parameter):
        memory = own_memory(parameter)
        if armed and parameter not in asked:
            assert np.isnan(memory).all(), parameter
            asked.append(parameter)
        return memory

    monkeypatch.setattr(Parameter, "_own_memory", watched)
    armed = False
    with DDP(build(), world, sizes=SIZES) as ddp:
        steps(ddp, 1)
        parameters = list(ddp.module.parameters())
        homes = [parameter.grad for parameter in parameters]
        before = [home.copy() for home in homes]
        ddp.module.zero_grad()
        for home in homes:
            home[...] = np.nan
        x = np.arange(6).reshape(2, 3) * 100 + world.rank
        y, ctx = ddp.forward(x, TRAINING)
        backward = ddp.module.backward

        def begin(*args):
            nonlocal armed
            armed = True
            return backward(*args)

        ddp.module.backward = begin
        ddp.backward(ctx, np.ones_like(y))
        assert set(asked) == set(parameters)
        for parameter, home, old in zip(parameters, homes, before, strict=True):
            assert parameter.grad is home
            np.testing.assert_array_equal(home, old)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolutions_gradient_is_written_in_place(batch):
    layer = Conv2d(96, 2000, 3, padding=1, rng=0)
    size = layer.weight.data.nbytes
    memory = np.full(layer.weight.shape, np.nan, np.float32)
    layer.weight.attach(memory)
    x = np.random.default_rng(0).standard_normal((batch, 96, 4, 5), np.float32)
    y, ctx = layer.forward(x, TRAINING)
    _, wctx = layer.backward_input(ctx, np.ones_like(y))
    tracemalloc.start()
    try:
        layer.backward_weight(wctx)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 2
    assert layer.weight.grad is memory
    # dweight[o, c, i, j] is the sum of the pixels that place (i, j) of the kernel meets.
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    expected = [
        [padded[:, :, i : i + 4, j : j + 5].sum((0, 2, 3)) for j in range(3)] for i in range(3)
    ]
    np.testing.assert_allclose(
        memory, np.broadcast_to(np.transpose(expected, (2, 0, 1)), memory.shape), atol=1e-4
    )
