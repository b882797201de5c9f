"""Pipelines on real ranks: the bits of one process, over each MPI library."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.collectives import all_gather_object
from mpidist.errors import ScheduleError
from mpidist.nn import Linear, Pop, ReLU, Sequential, Stash, mse_loss
from mpidist.parallel import Pipeline
from mpidist.parallel.pipeline.generators import SCHEDULES
from tests.parallel.pipeline import (
    MODE,
    alone,
    assert_same_bits,
    build,
    build_connected,
    joined,
    step,
)
from tests.parallel.test_pipeline import Sleeping
from tests.parallel.test_pipeline_messages import SHAPES, run

on_ranks = pytest.mark.ranks(2, 4, full=(1, 3))


@on_ranks
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_has_the_bits_of_one_process(world, schedule, full):
    for micro in (5, 6, 8, 12, 16) if full else (12,):
        try:
            SCHEDULES[schedule](world.size, micro)
        except ScheduleError:
            continue
        for model in (build, build_connected):
            got = all_gather_object(step(world, micro, schedule=schedule, model=model), world)
            assert_same_bits(joined(got), alone(micro, model=model))


@pytest.mark.ranks(2, full=(4,))
@pytest.mark.parametrize(
    "schedule", [pytest.param(s, marks=() if s == "zbv" else pytest.mark.full) for s in SCHEDULES]
)
def test_long_messages_have_the_bits_of_one_process(world, schedule):
    """Activations of 512 KiB, which the library sends only when both ranks are inside of a call.

    Also over a connection from the first layer to the last, and tied gradients of 256 KiB.
    """
    rng, width, micro = np.random.default_rng(3), 256, 2 * world.size

    def model():
        layers = [Linear(width, width, rng=seed, bias=False) for seed in range(2 * world.size)]
        layers[-1].weight = layers[0].weight
        inner = (module for layer in layers for module in (layer, ReLU()))
        return Sequential(Stash("a"), *inner, Pop("a"))

    x, target = rng.normal(size=(2, 512 * micro, width)).astype(np.float32)
    whole = model()
    for part in np.split(np.arange(len(x)), micro):
        y, ctx = whole.forward(x[part], MODE)
        _, dy = mse_loss(y, target[part], denominator=target.size)
        whole.backward(ctx, dy)
    expected = {name: p.grad for name, p in whole.named_parameters()}
    with Pipeline(model(), world, micro_batches=micro, schedule=schedule, loss=mse_loss) as pipe:
        for _ in range(2):  # the second time without envelopes
            pipe.zero_grad()
            pipe.step(x, target, MODE)
            for name, parameter in pipe.named_parameters():
                np.testing.assert_array_equal(parameter.grad, expected[name], err_msg=name)


@pytest.mark.ranks(2)
def test_what_arrives_is_what_was_sent_whatever_shapes_follow_each_other(world):
    steps = [*SHAPES, *np.repeat(list(SHAPES), 3)]
    pairs, _ = run(world, steps)
    assert len(pairs) == 2 * len(steps)
    for got, expected in pairs:
        np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.full
@pytest.mark.hosts(2, ranks=1)
def test_over_a_network_messages_arrive_while_their_sender_computes(world):
    """Forward, too: Open MPI sends long ones over TCP only inside of a call."""
    x = np.ones((2, 1 << 16), np.float32)  # 256 KiB per micro-batch
    model = Sequential(*(Sleeping(20, 0, 0) for _ in range(20)), Sleeping(0, 0, 0))
    options = {"schedule": "gpipe", "cut": [20], "loss": mse_loss}
    with Pipeline(model, world, micro_batches=2, **options) as pipe:
        pipe.step(x, x, MODE)
        (_, second, *_), (first, *_) = pipe.timeline(pipe.step(x, x, MODE)).spans
    assert (str(second.action), str(first.action)) == ("0F1", "1F0")
    arrived, computes = first.began - second.began, second.ended - second.began
    assert computes >= 0.4
    assert arrived < computes / 2, f"after {arrived} s of {computes} s"
