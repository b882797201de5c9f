from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays.namespaces import BFLOAT16
from mpidist.nn import Parameter
from mpidist.parallel import GradScaler
from mpidist.testing import run_ranks
from tests.parallel.checks import scaled_step


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64])
def test_scaling_there_and_back_changes_nothing(dtype):
    def body(group):
        scaler = GradScaler(group, initial=4096)
        dy = np.array([0.5, 1], dtype)
        scaled = scaler.scale(dy)
        assert scaled.dtype == dy.dtype
        np.testing.assert_array_equal(scaled.astype(np.float64), [2048.0, 4096.0])
        good, grad = scaled_step(scaler, 0.5, dtype)
        assert good
        np.testing.assert_array_equal(grad.astype(np.float64), [0.5, 1.0])

    run_ranks(2, body)


def test_a_factor_beyond_float16_may_scale_what_is_small():
    def body(group):
        scaled = GradScaler(group, initial=2.0**20).scale(np.array([2.0**-14, 1], np.float16))
        np.testing.assert_array_equal(scaled, np.array([64, np.inf], np.float16))

    run_ranks(1, body)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("who", [0, 2])
def test_one_bad_gradient_on_one_rank_stops_all(bad, who):
    def body(group):
        scaler = GradScaler(group, initial=8)
        good, grad = scaled_step(scaler, bad if group.rank == who else 1.0)
        # The gradients are left as they came.
        return good, scaler.factor, float(grad[1])

    assert run_ranks(3, body) == [(False, 4.0, 8.0)] * 3


def test_the_factor_grows_after_good_steps_in_a_row():
    def body(group):
        scaler = GradScaler(group, initial=8, growth=3, backoff=0.25, interval=2)
        factors = []
        for value in (1, 1, 1, np.nan, 1, 1, 1):
            scaled_step(scaler, value)
            factors.append(scaler.factor)
        return factors

    assert run_ranks(2, body) == [[8.0, 24.0, 24.0, 6.0, 6.0, 18.0, 18.0]] * 2


def test_the_state_can_be_taken_over():
    def body(group):
        one = GradScaler(group, initial=8, interval=2)
        scaled_step(one, 1)
        other = GradScaler(group, interval=2)
        other.load_state_dict(one.state_dict())
        scaled_step(other, 1)
        return other.factor

    assert run_ranks(2, body) == [16.0, 16.0]


def test_a_loss_that_is_never_finite_is_an_error_and_no_good_step():
    def body(group):
        scaler = GradScaler(group, initial=2.0**-22)
        bad = np.nan if group.rank == 1 else 1.0
        assert [scaled_step(scaler, bad)[0] for _ in range(2)] == [False, False]
        for _ in range(2):  # and it stays one
            with pytest.raises(FloatingPointError, match="the loss itself is not finite"):
                scaled_step(scaler, bad)
        return scaler.factor

    assert run_ranks(2, body) == [2.0**-24] * 2


def test_gradients_of_zero_do_not_let_the_factor_become_infinite():
    def body(group):
        scaler = GradScaler(group, initial=2.0**126, interval=1)
        assert all(scaled_step(scaler, 0, np.float64)[0] for _ in range(3))
        return scaler.factor

    assert run_ranks(1, body) == [2.0**127]


@pytest.mark.parametrize("value", [1.0, np.inf])
def test_a_step_is_unscaled_once(value):
    def body(group):
        scaler = GradScaler(group, initial=8)
        p = Parameter(np.zeros(1))
        for _ in range(2):  # micro-batches
            p.add_grad(scaler.scale(np.array([value])))
        scaler.unscale([p])
        before = p.grad.copy()
        with pytest.raises(RuntimeError, match="called twice in one step"):
            scaler.unscale([p])
        np.testing.assert_array_equal(p.grad, before)
        assert scaled_step(scaler, 1.0)[0]

    run_ranks(2, body)


@pytest.mark.parametrize(
    "options",
    [
        {"initial": 0},
        {"initial": np.inf},
        {"initial": 2.0**-25},
        {"growth": 1.0},
        {"backoff": 1.0},
        {"backoff": 0},
        {"interval": 0},
    ],
)
def test_numbers_out_of_range_are_refused(options):
    def body(group):
        with pytest.raises(ValueError, match="GradScaler: expected"):
            GradScaler(group, **options)

    run_ranks(1, body)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_error_state_of_the_user_does_not_stop_a_rank(dtype):
    def body(group):
        scaler = GradScaler(group, initial=2.0**20)
        p = Parameter(np.zeros(2, dtype))
        p.add_grad(np.array([np.finfo(dtype).tiny, 1], dtype))
        with np.errstate(all="raise"):
            scaled = scaler.scale(np.array([np.finfo(dtype).max], dtype))
            return float(scaled[0]), scaler.unscale([p])

    assert run_ranks(2, body) == [(np.inf, True)] * 2
