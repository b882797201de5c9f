from __future__ import annotations

import numpy as np
import pytest

from mpidist.arrays import BFLOAT16
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


@pytest.mark.parametrize(
    "options", [{"initial": 0}, {"growth": 1.0}, {"backoff": 1.0}, {"backoff": 0}, {"interval": 0}]
)
def test_numbers_out_of_range_are_refused(options):
    def body(group):
        with pytest.raises(ValueError, match="GradScaler: expected"):
            GradScaler(group, **options)

    run_ranks(1, body)
