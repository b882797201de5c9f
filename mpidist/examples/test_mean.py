"""Tests of a function that communicates, without MPI: python -m pytest test_mean.py"""

import numpy as np
import pytest

import mpidist
from mpidist.testing import Death, DeliveryMode, Faults, run_ranks


def global_mean(x, group):
    """Return the mean over the rows of all ranks, which may have different numbers of them."""
    sums = mpidist.all_reduce(np.array([x.sum(), x.size]), group)
    return sums[0] / sums[1]


@pytest.mark.parametrize("mode", DeliveryMode)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_uneven_shares(size, mode):
    def rank(group):
        return global_mean(np.full(group.rank + 1, float(group.rank)), group)

    everything = np.repeat(np.arange(size), np.arange(size) + 1)
    assert run_ranks(size, rank, mode=mode) == [everything.mean()] * size


def test_a_slow_network_changes_nothing():
    def rank(group):
        return global_mean(np.arange(3.0), group)

    assert run_ranks(3, rank, faults=Faults(delay=0.01)) == [1.0] * 3


def test_a_dead_rank_is_reported():
    faults = Faults(deaths=(Death(rank=1, call=1),))
    with pytest.raises(mpidist.PeerLostError, match="rank 1"):
        run_ranks(3, lambda group: global_mean(np.ones(3), group), faults=faults)
