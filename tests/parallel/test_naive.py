"""The oracle itself, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.nn import BatchNorm2d, Linear, Sequential
from mpidist.parallel import NaiveDataParallel
from mpidist.testing import run_ranks
from tests.parallel.checks import TRAINING
from tests.parallel.training import Routed


@pytest.mark.parametrize("op", [MEAN, SUM])
def test_every_gradient_is_reduced_and_the_input_gradient_is_local(op):
    def body(group):
        layer = Linear(3, 2, rng=group.rank, dtype=np.float64)
        naive = NaiveDataParallel(layer, group, op=op)
        _, ctx = naive.forward(np.full((1, 3), float(group.rank)), TRAINING)
        dx = naive.backward(ctx, np.ones((1, 2)))
        return layer.weight.data, layer.weight.grad, layer.bias.grad, dx

    rank_0s = Linear(3, 2, rng=0, dtype=np.float64).weight.data
    for data, weight, bias, dx in run_ranks(3, body):
        np.testing.assert_array_equal(data, rank_0s)
        np.testing.assert_array_equal(weight, np.full((2, 3), 3.0 if op is SUM else 1.0))
        np.testing.assert_array_equal(bias, np.full(2, 3.0 if op is SUM else 1.0))
        np.testing.assert_array_equal(dx, np.ones((1, 2)) @ rank_0s)


def test_unused_branches_and_buffers():
    def body(group):
        some = Routed(Linear(2, 2, rng=0, dtype=np.float64), 0.0 if group.rank else np.inf)
        none = Routed(Linear(2, 2, rng=0, dtype=np.float64), np.inf)
        norm = BatchNorm2d(2, dtype=np.float64)
        model = Sequential(some, none)
        model.norm = norm
        naive = NaiveDataParallel(model, group)
        norm.running_mean[...] = group.rank + 5
        _, ctx = naive.forward(np.ones((1, 2)), TRAINING)
        naive.backward(ctx, np.ones((1, 2)))
        return some.branch.weight.grad, none.branch.weight.grad

    for some, none in run_ranks(2, body):
        np.testing.assert_array_equal(some, np.full((2, 2), 0.5))
        assert none is None
