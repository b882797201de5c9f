"""Whatever differs between ranks, every rank raises the same error, and it names the culprit."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import MAX, MEAN, SUM
from mpidist.errors import CollectiveMismatchError
from mpidist.nn import BatchNorm2d, Linear, Sequential
from mpidist.parallel import DDP, BucketSizes, Compression, GradientReducer
from mpidist.parallel.data import verify
from mpidist.testing import run_ranks
from tests.parallel.checks import DIFFERENCES, check_difference


def raised_by(size, make):
    """Return the message of every rank."""

    def body(group):
        with pytest.raises(CollectiveMismatchError) as info:
            make(group)
        # The group is as good as before.
        assert group.split(0) is not None
        return str(info.value)

    return run_ranks(size, body)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_named_on_every_rank(name):
    check_difference(4, raised_by, name)


def test_the_odd_one_out_is_named_also_if_it_is_rank_0():
    def make(group):
        GradientReducer({"w": np.empty(3 if group.rank == 0 else 2)}, group)

    (message,) = set(raised_by(3, make))
    assert "parameter 'w' is (3,) float64 on rank 0 and (2,) float64 on rank 1" in message


@pytest.mark.parametrize(
    ("option", "values", "text"),
    [
        ("op", (MEAN, SUM), "argument 'op' is SUM on rank 1 and MEAN on rank 0"),
        ("op", (MEAN, MAX), "argument 'op' is MAX on rank 1 and MEAN on rank 0"),
        ("op", (MEAN, "sum"), "argument 'op' is 'sum' on rank 1 and MEAN on rank 0"),
        ("sizes", (BucketSizes(), BucketSizes(8, 8)), "argument 'sizes' is (8, 8) bytes on rank 1"),
        ("compression", (None, Compression.BF16), "argument 'compression' is BF16 on rank 1"),
        ("compression", (None, lambda *_: None), "argument 'compression' is a hook on rank 1"),
    ],
)
def test_arguments_are_compared_too(option, values, text):
    def make(group):
        GradientReducer({"w": np.empty(3)}, group, **{option: values[group.rank]})

    (message,) = set(raised_by(2, make))
    assert text in message


def test_ddp_compares_buffers_and_changes_nothing():
    def make(group):
        norm = BatchNorm2d(2)
        if group.rank == 1:
            norm.running_var = np.ones(3, np.float32)
        norm.weight.data[...] = group.rank
        try:
            DDP(Sequential(Linear(2, 2, rng=0), norm), group)
        finally:
            assert (norm.weight.data == group.rank).all()

    (message,) = set(raised_by(2, make))
    assert "buffer '1.running_var' is (3,) float32 on rank 1 and (2,) float32 on rank 0" in message


def test_equal_ranks_pay_one_exchange(monkeypatch):
    calls = []

    def counted(x, group):
        calls.append((group.rank, x.nbytes))
        return all_gather(x, group)

    all_gather = verify.all_gather
    monkeypatch.setattr(verify, "all_gather", counted)
    run_ranks(2, lambda group: GradientReducer({"w": np.empty(3)}, group).close())
    assert sorted(calls) == [(0, 32), (1, 32)]


def test_a_long_list_is_cut():
    def make(group):
        count = 20 if group.rank == 1 else 2
        GradientReducer({f"w{i}": np.empty(1) for i in range(count)}, group)

    (message,) = set(raised_by(3, make))
    assert "'w5' and 14 more" in message
