from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mpidist.nn import cross_entropy, mse_loss
from mpidist.testing.gradcheck import numerical_gradient


def _batch(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=shape), rng.integers(0, shape[-1], shape[:-1])


def _plain_cross_entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the loss of each position, by the definition."""
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return -np.log(np.take_along_axis(p, target[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_cross_entropy_is_the_mean_over_positions(shape):
    logits, target = _batch(*shape)
    loss, dlogits = cross_entropy(logits, target)
    np.testing.assert_allclose(loss, _plain_cross_entropy(logits, target).mean(), rtol=1e-12)
    assert loss.shape == ()
    expected = numerical_gradient(lambda: float(cross_entropy(logits, target)[0]), logits)
    np.testing.assert_allclose(dlogits, expected, atol=1e-8)


def test_mse_is_the_mean_over_elements():
    pred, target = np.random.default_rng(0).normal(size=(2, 3, 4))
    loss, dpred = mse_loss(pred, target)
    np.testing.assert_allclose(loss, ((pred - target) ** 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(dpred, 2 * (pred - target) / 12, rtol=1e-12)


def test_shares_with_a_denominator_add_up_to_the_joined_mean():
    logits, target = _batch(7, 4)
    joined, djoined = cross_entropy(logits, target)
    parts = [
        cross_entropy(logits[a:b], target[a:b], denominator=7) for a, b in ((0, 5), (5, 5), (5, 7))
    ]
    np.testing.assert_allclose(sum(float(loss) for loss, _ in parts), joined, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([d for _, d in parts]), djoined, rtol=1e-14)
    square, dsquare = mse_loss(logits, 0 * logits)
    parts = [mse_loss(logits[a:b], 0 * logits[a:b], denominator=28) for a, b in ((0, 0), (0, 7))]
    np.testing.assert_allclose(sum(float(loss) for loss, _ in parts), square, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([d for _, d in parts]), dsquare, rtol=1e-14)


@pytest.mark.parametrize("denominator", [None, 8])
def test_an_empty_batch_has_loss_zero(denominator):
    loss, d = cross_entropy(np.zeros((0, 4)), np.zeros(0, dtype=int), denominator=denominator)
    assert (float(loss), d.shape) == (0.0, (0, 4))
    loss, d = mse_loss(np.zeros((0, 4)), np.zeros((0, 4)), denominator=denominator)
    assert (float(loss), d.shape) == (0.0, (0, 4))


def test_large_logits_neither_overflow_nor_lose_the_loss():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32)
    loss, dlogits = cross_entropy(logits, np.array([0, 0]))
    assert float(loss) == 5000.0
    np.testing.assert_array_equal(dlogits, [[0, 0], [-0.5, 0.5]])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ],
)
def test_gradients_keep_the_dtype_and_losses_are_float32_or_wider(dtype, wide):
    logits, target = _batch(6, 3)
    exact = float(cross_entropy(logits, target)[0])
    for loss, d in (
        cross_entropy(logits.astype(dtype), target),
        mse_loss(logits.astype(dtype), np.zeros((6, 3), dtype=dtype)),
    ):
        assert (loss.dtype, d.dtype) == (wide, dtype)
    loss, _ = cross_entropy(logits.astype(dtype), target)
    np.testing.assert_allclose(float(loss), exact, rtol=2e-2)


def test_the_inputs_are_left_alone():
    logits, target = _batch(3, 4)
    before = logits.copy()
    cross_entropy(logits, target)
    mse_loss(logits, np.zeros_like(logits))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "target", "options", "message"),
    [
        (np.zeros((2, 3)), np.zeros(3, dtype=int), {}, r"shape \(2,\)"),
        (np.zeros((2, 3)), np.zeros(2), {}, "integer"),
        (np.zeros((2, 3)), np.array([0, 3]), {}, r"0\.\.2, got 0\.\.3"),
        (np.zeros((2, 3)), np.array([0, -1]), {}, r"0\.\.2"),
        (np.zeros((2, 3)), np.array([0, 1]), {"denominator": 0}, "positive"),
    ],
)
def test_bad_arguments_are_refused(logits, target, options, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, target, **options)


def test_mse_does_not_broadcast():
    with pytest.raises(ValueError, match="not broadcast"):
        mse_loss(np.zeros((2, 3)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="positive"):
        mse_loss(np.zeros(2), np.zeros(2), denominator=-1)
