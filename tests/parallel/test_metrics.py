from __future__ import annotations

import math

import numpy as np
import pytest

from mpidist.parallel import Metrics, metrics
from mpidist.testing import run_ranks
from tests.parallel.checks import check_means


@pytest.mark.parametrize("size", [1, 2, 4])
def test_means_are_weighted_over_samples_and_ranks(size):
    run_ranks(size, check_means)


def test_a_rank_without_samples_takes_part():
    def body(group):
        found = Metrics(group)
        if group.rank == 1:
            found.add("loss", 3.0, weight=2)
        elif group.rank == 2:
            found.add("loss", math.nan, weight=0)  # the mean over no samples
        return found.reduce()

    assert run_ranks(3, body) == [{"loss": 3.0}] * 3


def test_names_of_which_nobody_had_a_sample_are_nan():
    def body(group):
        found = Metrics(group)
        found.add("loss", 1.0)
        found.reduce()
        return found.reduce()["loss"]

    assert all(math.isnan(value) for value in run_ranks(2, body))


def test_later_reductions_cost_one_all_reduce(monkeypatch):
    calls = []

    def counted(x, group, *, op):
        calls.append((group.rank, x.dtype, x.nbytes))
        return all_reduce(x, group, op=op)

    def refused(*_):
        raise AssertionError("the names are known")

    all_reduce = metrics.all_reduce
    monkeypatch.setattr(metrics, "all_reduce", counted)

    def body(group):
        found = Metrics(group)
        found.add("a", 1)
        found.add("b", 2)
        found.reduce()
        begin = len(calls)
        found.add("b", 4)
        result = found.reduce()
        assert result["b"] == 4.0
        return begin

    run_ranks(1, body)
    assert calls == [(0, np.float64, 32)] * 2
    monkeypatch.setattr(metrics, "all_gather_object", refused)
    with pytest.raises(AssertionError, match="the names are known"):
        run_ranks(1, body)


@pytest.mark.parametrize("weight", [-1, np.inf, np.nan])
def test_weights_must_be_finite_and_not_negative(weight):
    def body(group):
        with pytest.raises(ValueError, match="weight of 'loss'"):
            Metrics(group).add("loss", 1.0, weight=weight)

    run_ranks(1, body)


def test_a_name_that_comes_late_is_refused():
    def body(group):
        found = Metrics(group)
        found.add("loss", 1.0)
        found.reduce()
        with pytest.raises(ValueError, match=r"'accuracy' is new; .*: loss"):
            found.add("accuracy", 1.0)

    run_ranks(2, body)
