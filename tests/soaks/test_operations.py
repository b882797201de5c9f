"""The soak of random operations, for seconds instead of hours."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.testing import Faults, Mode, run_ranks
from tests.soaks import operations
from tests.soaks.operations import soak


@pytest.mark.ranks(3, full=(2, 4))
def test_random_operations_on_real_ranks(world, full):
    assert soak(world, seed=world.size, seconds=30 if full else 2) > 0


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
def test_random_operations_on_simulated_ranks(mode):
    done = run_ranks(3, lambda group: soak(group, seed=7, seconds=30, rounds=12), mode=mode)
    assert len(set(done)) == 1


def test_random_operations_over_a_slow_network():
    faults = Faults(delay=0.002)
    run_ranks(4, lambda group: soak(group, seed=8, seconds=30, rounds=6), faults=faults)


def test_a_wrong_result_is_found(monkeypatch):
    def wrong(draw, group):
        work, expected = operations._all_reduce(draw, group)
        return work, None if expected is None else np.where(expected == expected, 99, expected)

    monkeypatch.setattr(operations, "_VERBS", {"all_reduce": wrong})
    with pytest.raises(AssertionError, match="seed 1, round 1"):
        run_ranks(1, lambda group: soak(group, seed=1, seconds=30, rounds=50))
