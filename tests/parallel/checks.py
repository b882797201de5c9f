"""What is checked alike on simulated and on real ranks."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from mpidist._types import MEAN
from mpidist.nn import BatchNorm2d, Mode, Module, Parameter, Sequential
from mpidist.nn.module import Context, count_uses
from mpidist.parallel import DDP, BucketSizes, GradientReducer, Metrics
from tests.parallel.training import digest

some_optimizers = pytest.mark.parametrize(
    "optimizer", [pytest.param("sgd", marks=pytest.mark.full), "adamw"]
)
"""On real ranks: the transport does not know which rule it is, and simulated ranks try all."""

TINY = BucketSizes(first=1, rest=1)
"""Every array is a bucket."""

TRAINING = Mode(training=True)


class Scale(Module):
    """y = w * x, used `times` times, with as many contributions as `made` says."""

    def __init__(self, times=1, made=None):
        self.w = Parameter(np.ones(()))
        self.times = times
        self.made = times if made is None else made

    def forward(self, x, mode):
        return self.times * self.w.data * x, Context(x, count_uses(*[self.w] * self.times))

    def backward_input(self, ctx, dy):
        return self.times * self.w.data * dy, (ctx.saved, dy)

    def backward_weight(self, wctx):
        x, dy = wctx
        for _ in range(self.made):
            self.w.add_grad(np.asarray(np.sum(x * dy)))


SHAPES = {"a": (3,), "b": (2, 2), "c": (), "d": (5, 1), "e": (0,)}


def likes(dtype="f8"):
    return {name: np.empty(shape, dtype) for name, shape in SHAPES.items()}


def gradient(name, rank, step=0):
    shape = SHAPES[name]
    start = 100 * step + 10 * rank + ord(name)
    return start + np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape)


def total(name, size, step=0):
    return sum(gradient(name, rank, step) for rank in range(size))


def check_reduction(group, op, sizes):
    orders = {0: "abcde", 1: "edcba", 2: "cabed", 3: "bdace"}
    with GradientReducer(likes(), group, op=op, sizes=sizes) as reducer:
        arrays = dict(reducer.grads)
        for step in range(3):
            for name in orders[group.rank]:
                reducer.grads[name][...] = gradient(name, group.rank, step)
                reducer.ready(name)
            assert reducer.wait() == frozenset(SHAPES)
            for name in SHAPES:
                expected = total(name, group.size, step) / (group.size if op is MEAN else 1)
                np.testing.assert_allclose(reducer.grads[name], expected, rtol=1e-15)
                assert reducer.grads[name] is arrays[name]


def train_norm(group, steps=3):
    norm = BatchNorm2d(2, dtype=np.float64)
    model = Sequential(norm)
    digests = []
    with DDP(model, group) as ddp:
        for step in range(steps):
            model.zero_grad()
            x = np.random.default_rng([step, group.rank]).normal(size=(3, 2, 2, 2))
            y, ctx = ddp.forward(x, TRAINING)
            ddp.backward(ctx, y)
            digests.append(digest(model))
    return norm.running_mean, norm.running_var, digests


def expected_running(steps=3):
    mean, var = np.zeros(2), np.ones(2)
    for step in range(steps):
        x = np.random.default_rng([step, 0]).normal(size=(3, 2, 2, 2))  # rank 0's
        mean = 0.9 * mean + 0.1 * x.mean(axis=(0, 2, 3))
        var = 0.9 * var + 0.1 * x.var(axis=(0, 2, 3), ddof=1)
    return mean, var


def check_running(results):
    mean, var = expected_running()
    for got_mean, got_var, digests in results:
        np.testing.assert_allclose(got_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(got_var, var, rtol=1e-12)
        assert digests == results[0][2]


def check_means(group):
    found = Metrics(group)
    for epoch in (1, 2):
        for batch in range(3):
            weight = (group.rank + 1) * (batch + 1)
            found.add("loss", epoch * 1.5 + group.rank + batch, weight=weight)
        found.add("constant", np.float32(0.25))
        weights = [(r, b, (r + 1) * (b + 1)) for r in range(group.size) for b in range(3)]
        loss = sum((epoch * 1.5 + r + b) * w for r, b, w in weights) / sum(w for *_, w in weights)
        result = found.reduce()
        assert list(result) == ["constant", "loss"]
        assert result["constant"] == 0.25
        assert result["loss"] == pytest.approx(loss, rel=1e-14)
        assert all(type(value) is float for value in result.values())


def scaled_step(scaler, value, dtype=np.float32):
    """Scale a gradient up, let it enter, and unscale it."""
    p = Parameter(np.zeros(2, dtype))
    p.add_grad(scaler.scale(np.array([value, 1], dtype)))
    return scaler.unscale([p, Parameter(np.zeros(1))]), p.grad


BASE = {"w": ((3, 4), "f4"), "b": ((4,), "f4"), "v": ((4, 2), "f8")}


def changed(**changes):
    return {**BASE, **changes}


DIFFERENCES = {
    "count": (
        {"w": BASE["w"], "v": BASE["v"]},
        "rank 2 lacks parameter 'b', compared with rank 0",
    ),
    "one too many": (
        changed(x=((1,), "f4")),
        "rank 2 has parameter 'x', compared with rank 0",
    ),
    "name": (
        {"w": BASE["w"], "bias": BASE["b"], "v": BASE["v"]},
        "rank 2 lacks parameter 'b' and rank 2 has parameter 'bias', compared with rank 0",
    ),
    "shape": (
        changed(b=((5,), "f4")),
        "parameter 'b' is (5,) float32 on rank 2 and (4,) float32 on rank 0",
    ),
    "dtype": (
        changed(v=((4, 2), "f4")),
        "parameter 'v' is (4, 2) float32 on rank 2 and (4, 2) float64 on rank 0",
    ),
    "dtype without gradients": (
        changed(b=((4,), "i8")),
        "parameter 'b' is (4,) int64 on rank 2 and (4,) float32 on rank 0",
    ),
    "order": (
        {"w": BASE["w"], "v": BASE["v"], "b": BASE["b"]},
        "rank 2 has parameter 'v' where rank 0 has parameter 'b'",
    ),
}


def check_difference(group_size, run, name):
    other, text = DIFFERENCES[name]

    def make(group):
        spec = other if group.rank == 2 else BASE
        GradientReducer({k: np.empty(s, d) for k, (s, d) in spec.items()}, group)

    messages = run(group_size, make)
    assert messages == [messages[0]] * len(messages)
    assert text in messages[0]


EXAMPLES = Path(__file__).parents[2] / "mpidist" / "examples"


def example(name):
    """Return the `main` of an example."""
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]
