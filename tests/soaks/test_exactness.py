"""Random all_reduces compared with numpy: a hundred here, as many as one likes by the command."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import MAX, SUM
from mpidist.testing import run_ranks
from tests.soaks import exactness
from tests.soaks.exactness import Case, by_numpy, compare_with_numpy, contribution


@pytest.mark.ranks(3, full=(2, 4))
def test_all_reduces_equal_numpy(world):
    found = compare_with_numpy(world, count=100, seed=world.size)
    assert found.exact + found.rounded == 100
    assert found.worst <= 1


def test_all_reduces_equal_numpy_on_simulated_ranks():
    first, *others = run_ranks(3, lambda group: compare_with_numpy(group, count=60, seed=1))
    assert others == [first] * 2


def case(dtype, op):
    return Case(0, (50,), np.dtype(dtype), op, *[False] * 3, 0)


@pytest.mark.parametrize(
    ("dtype", "op", "wrong", "words"),
    [
        (np.int32, SUM, lambda x: x + 1, "expected"),
        (np.float32, MAX, lambda x: np.nextafter(x, np.float32(9)), "expected"),
        (np.float32, SUM, lambda x: x * np.float32(1 + 1e-5), "times what rounding may do"),
        (np.float32, SUM, lambda x: x.astype(np.float64), "float64"),
        (np.float16, SUM, lambda x: np.nextafter(x, np.float16(99)), "expected"),
    ],
)
def test_a_wrong_result_is_found(dtype, op, wrong, words):
    one = case(dtype, op)

    def check(group):
        parts = [contribution(one, 0, rank) for rank in range(group.size)]
        got = by_numpy(parts, op)
        found = exactness._judge(one, got, 0, group, exactness.Findings(), "here")
        assert found.exact + found.rounded == 1
        with pytest.raises(AssertionError, match=words):
            exactness._judge(one, wrong(got), 0, group, exactness.Findings(), "here")

    run_ranks(3, check)


def test_ranks_that_differ_are_found():
    def check(group):
        with pytest.raises(AssertionError, match=r"different results of the cases \[2\]"):
            exactness._compare_ranks([1, 2, group.rank], 0, group)

    run_ranks(2, check)


def test_cases_reach_every_kind():
    def check(group):
        drawn = [one for one, _ in zip(exactness.draw_cases(0, group), range(1000), strict=False)]
        assert {one.dtype for one in drawn} == {d for _, d in group.capabilities.reductions}
        assert {one.op for one in drawn} == {op for op, _ in group.capabilities.reductions}
        assert {(), (0,), (1,)} <= {one.shape for one in drawn}
        assert max(one.nbytes for one in drawn) > 2 << 20
        assert sum(one.is_exact(group) and one.dtype.kind == "f" for one in drawn) > 20

    run_ranks(1, check)
