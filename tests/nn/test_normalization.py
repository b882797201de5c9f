"""Normalisation where the numbers are hard: halves, long sums, and a single value."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import Array
from mpidist.nn import BatchNorm2d, Conv2d, LayerNorm, Linear, Mode, Module
from mpidist.nn.layers import _BLOCK, column_sums
from mpidist.testing import run_ranks
from mpidist.testing.gradcheck import gradients, projection

TRAINING = Mode(training=True)


def _normalised(x: Array, axes: tuple[int, ...], eps: float = 1e-5) -> tuple[Array, Array]:
    """Return the plain formula's output and input gradient, in float64, for `projection`."""
    x = x.astype(np.float64)
    inv_std = 1 / np.sqrt(x.var(axis=axes, keepdims=True) + eps)
    x_hat = (x - x.mean(axis=axes, keepdims=True)) * inv_std
    dy = projection(x)
    centred = dy - dy.mean(axis=axes, keepdims=True)
    dx = inv_std * (centred - x_hat * (dy * x_hat).mean(axis=axes, keepdims=True))
    return x_hat, dx


HALF_CASES = {
    "layer norm": (LayerNorm(64, dtype=np.float16), (8, 64), (1,)),
    "batch norm": (BatchNorm2d(3, dtype=np.float16), (8, 3, 6, 5), (0, 2, 3)),
}


@pytest.mark.parametrize("name", HALF_CASES)
def test_statistics_of_float16_do_not_overflow(name: str) -> None:
    module, shape, axes = HALF_CASES[name]
    x = np.random.default_rng(0).normal(1000, 300, shape).astype(np.float16)
    got = gradients(module, x)
    y, dx = _normalised(x, axes)
    assert {array.dtype for array in got.values()} == {np.dtype(np.float16)}
    np.testing.assert_allclose(got["y"], y, rtol=2e-3, atol=2e-3)
    # As dx is about 1/300, this is 1 % of it; dy is rounded to float16 first.
    np.testing.assert_allclose(got["dx"], dx, rtol=1e-2, atol=3e-5)


def test_running_statistics_of_a_float16_layer_hold_a_large_variance() -> None:
    norm = BatchNorm2d(2, momentum=1.0, dtype=np.float16)
    x = np.random.default_rng(1).normal(0, 400, (16, 2, 4, 4)).astype(np.float16)
    norm.forward(x, TRAINING)
    expected = x.astype(np.float64).var(axis=(0, 2, 3), ddof=1)
    assert expected.max() > np.finfo(np.float16).max
    np.testing.assert_allclose(norm.running_var, expected, rtol=1e-6)
    y, _ = norm.forward(x, Mode(training=False))
    assert y.dtype == np.float16
    assert 0.9 < float(y.astype(np.float64).std()) < 1.1


def _far_from_zero() -> Array:
    x = np.random.default_rng(2).normal(100, 1, (16, 128, 128, 4)).astype(np.float32)
    return x.transpose(0, 3, 1, 2)  # channels last in memory, as this package makes its images


def test_means_over_many_pixels_are_those_of_float64() -> None:
    norm = BatchNorm2d(4, momentum=1.0)
    x = _far_from_zero()
    wide = x.astype(np.float64)
    norm.forward(x, TRAINING)
    np.testing.assert_allclose(norm.running_mean, wide.mean(axis=(0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(norm.running_var, wide.var(axis=(0, 2, 3), ddof=1), rtol=1e-6)


def test_parameter_gradients_over_many_pixels_are_those_of_float64() -> None:
    x = _far_from_zero()
    norm = BatchNorm2d(4)
    _, ctx = norm.forward(x, TRAINING)
    dy = x - np.float32(99)
    norm.backward(ctx, dy)
    wide = dy.astype(np.float64)
    x_hat, _ = _normalised(x, (0, 2, 3))
    np.testing.assert_allclose(norm.bias.grad, wide.sum(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(norm.weight.grad, (wide * x_hat).sum(axis=(0, 2, 3)), rtol=1e-5)


def _summing(dtype: np.dtype) -> list[tuple[Module, Array]]:
    rows = np.ones((5000, 2), dtype=dtype)
    image = np.ones((2, 2, 50, 50), dtype=dtype)
    return [
        (Linear(2, 2, rng=0, dtype=dtype), rows),
        (LayerNorm(2, dtype=dtype), rows),
        (Conv2d(2, 2, 1, rng=0, dtype=dtype), image),
        (BatchNorm2d(2, dtype=dtype), image),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_bias_gradient_in_float16_does_not_stand_still(number: int) -> None:
    module, x = _summing(np.dtype(np.float16))[number]
    y, ctx = module.forward(x, TRAINING)
    module.backward(ctx, np.ones_like(y))
    np.testing.assert_array_equal(module.bias.grad, np.full(2, 5000, np.float16))


@pytest.mark.parametrize("rows", [0, 1, _BLOCK // 3 - 1, _BLOCK // 3 + 1])
def test_column_sums_of_any_length(rows: int) -> None:
    a, b = np.random.default_rng(3).normal(size=(2, rows, 3)).astype(np.float32)
    wide = a.astype(np.float64)
    np.testing.assert_allclose(column_sums(a), wide.sum(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(column_sums(a, b), (wide * b).sum(axis=0), rtol=1e-9, atol=1e-9)


def test_one_value_per_channel_leaves_the_running_variance_alone() -> None:
    norm = BatchNorm2d(2, momentum=0.5)
    for _ in range(20):
        y, _ = norm.forward(np.full((1, 2, 1, 1), 8.0, np.float32), TRAINING)
        np.testing.assert_array_equal(y, np.zeros((1, 2, 1, 1)))
    np.testing.assert_array_equal(norm.running_var, [1, 1])
    np.testing.assert_allclose(norm.running_mean, [8, 8], rtol=1e-5)


def test_shares_of_one_and_of_no_sample_run_beside_larger_ones() -> None:
    x = np.random.default_rng(4).normal(size=(4, 2, 1, 1))

    def body(group):
        norm = BatchNorm2d(2, momentum=1.0, dtype=np.float64)
        got = gradients(norm, x[: group.rank])
        assert all(np.isfinite(array).all() for array in got.values())
        return norm.running_var.copy()

    none, one, two = run_ranks(3, body)
    np.testing.assert_array_equal([none, one], np.ones((2, 2)))
    np.testing.assert_allclose(two, x[:2].var(axis=(0, 2, 3), ddof=1), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (2, 1, 5, 5), (2, 3, 5)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    expected = r"BatchNorm2d: expected an input of shape \(batch, 3, height, width\), got \(2, "
    with pytest.raises(ValueError, match=expected):
        BatchNorm2d(3).forward(np.ones(shape), TRAINING)
