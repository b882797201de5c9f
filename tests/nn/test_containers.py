from __future__ import annotations

import weakref

import numpy as np
import pytest

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
from mpidist.nn.names import former_names
from mpidist.optim import Adam
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


# -- names ---------------------------------------------------------------------------------------


def _blocks(wrap):
    rng = np.random.default_rng(0)
    block = Sequential(Linear(4, 4, rng=rng), Dropout(0.5))
    return Sequential(Linear(4, 4, rng=rng), Residual(wrap(block)), wrap(BatchNorm2d(2)))


def test_recompute_is_no_part_of_names():
    plain, wrapped = _blocks(lambda module: module), _blocks(Recompute)
    twice = _blocks(lambda module: Recompute(Recompute(module)))
    for model in (wrapped, twice):
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [p.name for p in model.parameters()] == [p.name for p in plain.parameters()]
    assert plain.layers[1].inner.layers[1].layer_index == 2
    assert wrapped.layers[1].inner.inner.layers[1].layer_index == 2


def _as_before(model):
    """Return the state under the names that it had when `Recompute` was a part of names."""
    old = {"1.inner.0.": "1.inner.inner.0.", "2.": "2.inner."}
    return {
        next((new + name[len(now) :] for now, new in old.items() if name.startswith(now)), name): v
        for name, v in model.state_dict().items()
    }


@pytest.mark.parametrize("wrap", [lambda module: module, Recompute])
def test_a_state_that_was_saved_with_the_names_of_wrappers_loads(wrap):
    source = _blocks(Recompute)
    for array in source.state_dict().values():
        array[...] = np.random.default_rng(array.size).normal(size=array.shape)
    state = _as_before(source)
    assert "1.inner.inner.0.weight" in state
    assert "2.inner.running_mean" in state
    model = _blocks(wrap)
    model.load_state_dict(state)
    for name, array in source.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], array, err_msg=name)
    with pytest.raises(ValueError, match=r"2\.weight: missing"):
        model.load_state_dict({name: v for name, v in state.items() if name != "2.inner.weight"})


def test_an_optimizers_state_with_the_names_of_wrappers_loads():
    model = _blocks(Recompute)
    optimizer = Adam(model, lr=0.1)
    state = {
        key.replace("1.inner.0.", "1.inner.inner.0.").replace("2.", "2.inner."): value
        for key, value in optimizer.state_dict().items()
    }
    assert "1.inner.inner.0.weight/mean" in state
    state["step"], state["2.inner.bias/updates"] = 7, 5
    state["1.inner.inner.0.weight/mean"] = np.ones((4, 4), np.float32)
    optimizer.load_state_dict(state)
    found = optimizer.state_dict()
    assert (found["step"], found["2.bias/updates"]) == (7, 5)
    np.testing.assert_array_equal(found["1.inner.0.weight/mean"], 1)


def test_names_that_could_be_two_are_not_exchanged():
    saved = ["a.inner.w", "inner.a.w", "b.w"]
    assert former_names(["a.w", "b.w"], saved) == {}
    assert former_names(["a.w", "b.w"], saved[1:]) == {"a.w": "inner.a.w"}
    assert former_names(["m/a.w/mean"], ["m/a.inner.w/mean"]) == {"m/a.w/mean": "m/a.inner.w/mean"}
    assert former_names(["winner.w"], ["w.w"]) == {}


def test_a_plain_model_does_not_load_as_a_residual_one():
    assert former_names(["0.inner.w"], ["0.w"]) == {}
    assert former_names(["0.inner.w"], ["0.inner.inner.w"]) == {"0.inner.w": "0.inner.inner.w"}
    assert former_names(["a.inner.b.w"], ["inner.a.b.w"]) == {}
    residual = Sequential(Residual(Linear(3, 3, rng=0)))
    with pytest.raises(ValueError, match=r"0\.inner\.weight: missing"):
        residual.load_state_dict(Sequential(Linear(3, 3, rng=1)).state_dict())


# -- parts ---------------------------------------------------------------------------------------


def test_parts_keep_names_and_layer_indices_of_the_whole():
    model = Sequential(*[Sequential(Linear(3, 3, rng=i), Dropout(0.5)) for i in range(4)])
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    mode = Mode(True, seed=1)
    names = list(model.state_dict())
    parts = [model.part(0, 1), model.part(1, 3).part(0, 2), model.part(3, 4), model.part(4, 4)]
    assert [name for part in parts for name in part.state_dict()] == names
    assert list(model.state_dict()) == names
    y, ctx = model.forward(x, mode)
    dx = model.backward(ctx, y)
    grads = [p.grad.copy() for p in model.parameters()]
    model.zero_grad()
    contexts, z = [], x
    for part in parts:
        z, part_ctx = part.forward(z, mode)
        contexts.append(part_ctx)
    np.testing.assert_array_equal(z, y)
    dz = y
    for part, part_ctx in zip(reversed(parts), reversed(contexts), strict=True):
        dz = part.backward(part_ctx, dz)
    np.testing.assert_array_equal(dz, dx)
    for p, grad in zip(model.parameters(), grads, strict=True):
        np.testing.assert_array_equal(p.grad, grad)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (1, 0), (0, 3)])
def test_there_must_be_such_layers(start, stop):
    with pytest.raises(ValueError, match="0 <= start <= stop <= 2"):
        Sequential(ReLU(), ReLU()).part(start, stop)
