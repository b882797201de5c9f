from __future__ import annotations

import weakref

import numpy as np

from mpidist.nn import (
    GELU,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Dropout,
    Flatten,
    LayerNorm,
    Linear,
    Mode,
    Module,
    Recompute,
    ReLU,
    Residual,
    Sequential,
)
from mpidist.testing.gradcheck import gradients

MODE = Mode(training=True, seed=4, step=5, sample_offset=6)


def _transformer(*, recompute: bool) -> Sequential:
    rng = np.random.default_rng(0)

    def wrap(inner: Module) -> Module:
        return Recompute(inner) if recompute else inner

    return Sequential(
        wrap(Residual(Sequential(LayerNorm(8), CausalSelfAttention(8, 2, rng=rng), Dropout(0.3)))),
        wrap(Residual(Sequential(Linear(8, 8, rng=rng), ReLU(), Dropout(0.3)))),
    )


def _convolutional(*, recompute: bool) -> Sequential:
    rng = np.random.default_rng(0)
    body = Sequential(Conv2d(1, 2, 3, rng=rng), BatchNorm2d(2), ReLU(), Dropout(0.4))
    return Sequential(Recompute(body) if recompute else body, Flatten(), Linear(8, 3, rng=rng))


def test_recompute_gives_the_same_bits_with_dropout():
    x = np.random.default_rng(1).normal(size=(3, 5, 8)).astype(np.float32)
    plain = gradients(_transformer(recompute=False), x, mode=MODE)
    again = gradients(_transformer(recompute=True), x, mode=MODE)
    for (name, expected), got in zip(plain.items(), again.values(), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=name)


def test_recompute_updates_running_statistics_once():
    x = np.random.default_rng(1).normal(size=(3, 1, 4, 4)).astype(np.float32)
    models = [_convolutional(recompute=flag) for flag in (False, True)]
    plain, again = (gradients(model, x, mode=MODE) for model in models)
    for (name, expected), got in zip(plain.items(), again.values(), strict=True):
        np.testing.assert_array_equal(got, expected, err_msg=name)
    for (_, expected), (_, got) in zip(*(m.named_buffers() for m in models), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_recompute_keeps_the_uses_but_no_activation():
    class Spy(Linear):
        last: weakref.ref

        def forward(self, x, mode):
            y, ctx = super().forward(x, mode)
            self.last = weakref.ref(y)
            return y, ctx

    layer = Spy(2, 2, rng=0)
    x = np.ones((1, 2), dtype=np.float32)
    model = Sequential(layer, GELU())  # which keeps its input
    _, kept = model.forward(x, MODE)
    assert layer.last() is not None
    del kept
    _, ctx = Recompute(model).forward(x, MODE)
    assert layer.last() is None
    assert ctx.uses == {layer.weight: 1, layer.bias: 1}
    assert ctx.saved[0] is x


def test_recompute_may_be_nested():
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)

    def model(wrap) -> Sequential:
        rng = np.random.default_rng(0)
        inner = Sequential(Linear(4, 4, rng=rng), wrap(Sequential(Dropout(0.5), ReLU())))
        return Sequential(wrap(inner), Linear(4, 2, rng=rng))

    expected, got = gradients(model(lambda m: m), x), gradients(model(Recompute), x)
    for a, b in zip(expected.values(), got.values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_empty_sequence_is_the_identity():
    model = Sequential()
    x = np.ones((2, 3))
    y, ctx = model.forward(x, MODE)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(model.backward(ctx, 2 * x), 2 * x)
    assert ctx.uses == {}
