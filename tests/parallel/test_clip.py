from __future__ import annotations

import math

import numpy as np
import pytest

from mpidist.arrays.namespaces import BFLOAT16
from mpidist.arrays.shards import FlatPart
from mpidist.nn import Parameter
from mpidist.parallel import clip_grad_norm
from mpidist.testing import run_ranks


def with_grad(grad):
    p = Parameter(np.zeros_like(grad))
    p.add_grad(grad)
    return p


def test_all_gradients_are_scaled_by_one_factor():
    grads = [np.array([3.0, 4.0]), np.array([[12.0]])]
    parameters = [with_grad(g) for g in grads] + [Parameter(np.zeros(3))]
    assert clip_grad_norm(parameters, 6.5) == 13.0
    np.testing.assert_allclose(parameters[0].grad, [1.5, 2.0], rtol=1e-15)
    np.testing.assert_allclose(parameters[1].grad, [[6.0]], rtol=1e-15)
    assert parameters[2].grad is None


def test_a_small_norm_changes_no_bit():
    p = with_grad(np.array([0.1, 0.2, 0.3], np.float32))
    before = p.grad.tobytes()
    norm = clip_grad_norm([p], 1.0)
    assert p.grad.tobytes() == before
    assert norm == pytest.approx(math.sqrt(0.14), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.complex64])
def test_the_norm_is_summed_in_float64(dtype):
    grad = np.full(200_001, 3, dtype)  # the squares of float16 alone would overflow
    p = with_grad(grad)
    norm = clip_grad_norm([p], 1.5)
    assert norm == pytest.approx(3 * math.sqrt(200_001), rel=1e-14)
    assert p.grad.dtype == grad.dtype
    np.testing.assert_allclose(p.grad.astype(np.complex64), 1.5 / math.sqrt(200_001), rtol=1e-2)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_is_returned_and_nothing_scaled(bad):
    parameters = [with_grad(np.array([1.0, bad])), with_grad(np.array([5.0]))]
    assert not math.isfinite(clip_grad_norm(parameters, 1.0))
    assert parameters[1].grad[0] == 5.0


def test_no_gradients_have_norm_0():
    assert clip_grad_norm([Parameter(np.zeros(2))], 1.0) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_max_norm_must_be_positive(bad):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_grad_norm([], bad)


@pytest.mark.parametrize(
    ("dtype", "large"),
    [(np.float16, 6e4), (BFLOAT16, 3e38), (np.float32, 1e38), (np.complex64, 1e38)],
)
def test_the_factor_is_not_rounded_to_the_dtype(dtype, large):
    # It is a subnormal number of each of them, of which few bits or none are left.
    grad = np.full(10_000, large, dtype)
    p = with_grad(grad)
    norm = clip_grad_norm([p], 1.0)
    wide = np.complex128 if grad.dtype.kind == "c" else np.float64
    np.testing.assert_array_equal(p.grad, (grad.astype(wide) * (1 / norm)).astype(dtype))
    assert np.linalg.norm(p.grad.astype(wide)) == pytest.approx(1.0, rel=4e-3)


def test_parts_of_parameters_need_the_ranks_that_have_the_others():
    """By the norm of its parts alone, each rank would scale by another factor."""
    whole, part = with_grad(np.ones(4)), with_grad(np.ones(2))
    whole.part, part.part = FlatPart((4,), 0), FlatPart((4,), 2)
    assert clip_grad_norm([("0.weight", whole)], 9.0) == 2.0
    with pytest.raises(ValueError, match=r"'0\.bias' is this rank's part of .*\(4,\).*group="):
        clip_grad_norm([("0.weight", whole), ("0.bias", part)], 1.0)


def test_squares_that_overflow_together_are_an_infinite_norm_on_all_ranks():
    def clip(group):
        grads = [np.full(1, 1.3e154), np.full(1, 1.3e154)] if group.rank else [np.ones(1)]
        return clip_grad_norm([with_grad(grad) for grad in grads], 1.0, group=group)

    assert run_ranks(2, clip) == [math.inf, math.inf]


def test_the_error_state_of_the_user_does_not_stop_a_rank():
    grads = [np.full(4, 1e-40, np.float32), np.full(4, 1e30, np.float32)]
    with np.errstate(all="raise"):
        assert clip_grad_norm([with_grad(grad) for grad in grads], 1.0) == pytest.approx(2e30)
