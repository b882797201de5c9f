"""Connections that skip layers: values and gradients against numpy, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import (
    ADD,
    CONCAT,
    Dropout,
    Linear,
    Mode,
    Pop,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    Stash,
)
from mpidist.testing.gradcheck import check_gradients, check_halves, gradients

MODE = Mode(training=True, seed=4, step=5, sample_offset=6)


def linear(d_in, d_out, seed, dtype=np.float64):
    return Linear(d_in, d_out, rng=seed, dtype=dtype)


def overlapping(dtype=np.float64):
    """Return a model with two connections that overlap, one of which doubles the width."""
    return Sequential(
        linear(3, 4, 0, dtype),
        Stash("a"),
        linear(4, 4, 1, dtype),
        Stash("b"),
        ReLU(),
        Pop("a", merge=CONCAT),
        linear(8, 4, 2, dtype),
        Pop("b"),
        Dropout(0.3),
    )


def test_gradients_are_those_of_numpy():
    x, dy = np.random.default_rng(1).normal(size=(2, 5, 3))
    dy = np.tile(dy, (1, 2))[:, :4]
    model = overlapping()
    first, second, third = (model.layers[i] for i in (0, 2, 6))
    model.layers = model.layers[:-1]  # without dropout
    got = gradients(model, x, dy)

    a = x @ first.weight.data.T + first.bias.data
    b = a @ second.weight.data.T + second.bias.data
    joined = np.concatenate([np.maximum(b, 0), a], axis=1)
    np.testing.assert_allclose(got["y"], joined @ third.weight.data.T + third.bias.data + b)
    d_joined = dy @ third.weight.data
    db = dy + d_joined[:, :4] * (b > 0)
    da = db @ second.weight.data + d_joined[:, 4:]
    expected = {"6.weight": dy.T @ joined, "2.weight": db.T @ a, "0.weight": da.T @ x}
    expected |= {"dx": da @ first.weight.data, "0.bias": da.sum(0), "2.bias": db.sum(0)}
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-12, atol=1e-12, err_msg=name)


def test_gradients_and_halves():
    x = np.random.default_rng(1).normal(size=(3, 3))
    check_gradients(overlapping(), x.copy(), mode=MODE)
    check_halves(overlapping(), [x, x[:1], x[:0]], mode=MODE)
    # Connections of an inner Sequential are its own, whatever their names.
    inner = Recompute(Sequential(Stash("a"), linear(3, 3, 5), Pop("a")))
    outer = Sequential(Stash("a"), inner, Pop("a", merge=CONCAT, axis=-1), linear(6, 2, 6))
    check_gradients(outer, x.copy())
    check_halves(outer, [x, x])


def test_adding_has_the_bits_of_a_residual():
    x = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    layers = [linear(3, 3, seed, np.float32) for seed in range(3)]
    around = Sequential(layers[0], Residual(Sequential(layers[1], ReLU())), layers[2])
    expected = gradients(around, x)
    got = gradients(Sequential(layers[0], Stash("a"), layers[1], ReLU(), Pop("a"), layers[2]), x)
    assert [*got] != [*expected]
    for one, other in zip(got.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize("axis", [1, -3])
def test_channels_of_images_are_concatenated(axis):
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 4))
    model = Sequential(Stash("a"), ReLU(), Pop("a", merge=CONCAT, axis=axis))
    y, ctx = model.forward(x, MODE)
    np.testing.assert_array_equal(y, np.concatenate([np.maximum(x, 0), x], axis=1))
    dx = model.backward(ctx, y)
    np.testing.assert_array_equal(dx, x + np.maximum(x, 0))


def test_parts_pass_on_what_is_stashed():
    x = np.random.default_rng(1).normal(size=(3, 3))
    whole = overlapping()
    expected = gradients(whole, x, mode=MODE)
    whole.zero_grad()
    parts = [whole.part(a, b) for a, b in ((0, 3), (3, 5), (5, 6), (6, 9))]
    skips, y, contexts = {}, x, []
    for part, present in zip(parts, ({"a"}, {"a", "b"}, {"b"}, set()), strict=True):
        y, ctx = part.forward(y, MODE, skips)
        contexts.append(ctx)
        assert skips.keys() == present
    dy = np.random.default_rng(20240229).normal(size=y.shape)
    for part, ctx in zip(reversed(parts), reversed(contexts), strict=True):
        dy = part.backward(ctx, dy, skips)
    assert skips == {}
    np.testing.assert_array_equal(dy, expected["dx"])
    for name, parameter in whole.named_parameters():
        np.testing.assert_array_equal(parameter.grad, expected[name], err_msg=name)


REFUSED = {
    "without its Pop": (
        (ReLU(), Stash("a"), ReLU()),
        r"layer 1 is Stash\('a'\), and no layer is Pop\('a'\)",
    ),
    "without its Stash": (
        (ReLU(), Pop("a"), Stash("b"), Pop("b")),
        r"layer 1 is Pop\('a'\), and no layer is Stash\('a'\)",
    ),
    "within another module": (
        (Residual(Stash("a")), Pop("a")),
        r"layer 1 is Pop\('a'\), and no layer is Stash\('a'\)",
    ),
    "the wrong direction": (
        (Pop("a"), ReLU(), Stash("a")),
        r"layer 0, Pop\('a'\), is before layer 2, Stash\('a'\); .* exchange the two",
    ),
    "a name twice": (
        (Stash("a"), Pop("a"), Stash("a"), Pop("a")),
        r"the layers 0 and 2 both are Stash\('a'\); give each connection a name of its own",
    ),
    "popped twice": (
        (Stash("a"), Pop("a"), Pop("a")),
        r"the layers 1 and 2 both are Pop\('a'\); give each connection a name of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_connections_have_two_ends(name):
    layers, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        Sequential(*layers)


def test_arguments_that_do_not_fit():
    with pytest.raises(TypeError, match=r"Stash: expected as name of the connection a str.*got 3"):
        Stash(3)
    with pytest.raises(TypeError, match=r"Pop: expected as name of the connection a str.*got ''"):
        Pop("")
    with pytest.raises(TypeError, match=r"Pop\('a'\): expected merge=ADD or merge=CONCAT, got 'ad"):
        Pop("a", merge="add")


def test_shapes_that_do_not_fit():
    x = np.ones((2, 3))
    for merge, words in (
        (ADD, r"of shape \(2, 3\), as was stashed; got \(2, 1\)"),
        (CONCAT, r"of shape \(2, 3\), as was stashed, but for axis 0; got \(2, 1\)"),
    ):
        model = Sequential(Stash("a"), linear(3, 1, 0), Pop("a", merge=merge, axis=0))
        with pytest.raises(ValueError, match=words):
            model.forward(x, MODE)


def test_what_is_no_layer_of_a_sequential_is_not_run():
    x = np.ones((2, 3))
    with pytest.raises(RuntimeError, match=r"Stash\('a'\) was run by something else than a Seq"):
        Residual(Stash("a")).forward(x, MODE)
    whole = Sequential(Stash("a"), ReLU(), Pop("a"))
    with pytest.raises(RuntimeError, match=r"Pop\('a'\): Stash\('a'\) has left nothing for it"):
        whole.part(1, 3).forward(x, MODE)
    _, ctx = whole.part(0, 2).forward(x, MODE)
    with pytest.raises(RuntimeError, match=r"Stash\('a'\): Pop\('a'\) has left nothing for it"):
        whole.part(0, 2).backward(ctx, x)
