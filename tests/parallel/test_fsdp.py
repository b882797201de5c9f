"""FSDP trains as DDP does, with whatever model, batches and passes."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.parallel import ShardingStrategy
from mpidist.testing import run_ranks
from tests.parallel.fsdp import CASES, STRATEGIES, train
from tests.parallel.training import assert_close

FULL = ShardingStrategy.FULL_SHARD


def assert_trained_alike(got, expected, *, exact, dtype=np.float64):
    if exact:
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)
    else:
        assert_close(got, expected, rtol={np.float64: 1e-12, np.float32: 1e-6}[dtype])


def on_ranks(size, case, kind, dtype=np.float64, **options):
    def body(group):
        return train(group, CASES[case], kind, dtype, **options)

    ranks = run_ranks(size, body, node_memory=True)
    for other in ranks[1:]:
        assert_trained_alike(other, ranks[0], exact=True)
    return ranks[0]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_ddp_does(case, full):
    for size in (1, 2, 3, 4) if full else (3,):
        expected = on_ranks(size, case, "ddp")
        for strategy in STRATEGIES if full else (FULL, ShardingStrategy.NO_SHARD):
            got = on_ranks(size, case, strategy)
            assert_trained_alike(got, expected, exact=size <= CASES[case].exact)
