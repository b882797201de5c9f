"""Ten steps on any number of ranks are ten steps of one process on the joined batch."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.errors import CollectiveTimeoutError
from mpidist.nn import Mode as NnMode
from mpidist.testing import Death, Faults, Mode, run_ranks
from tests.parallel.training import (
    CASES,
    OPTIMIZERS,
    STEPS,
    assert_close,
    batches,
    train_alone,
    train_naively,
    train_rank,
)

case_names = pytest.mark.parametrize("case", CASES)
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@case_names
@optimizers
@pytest.mark.parametrize(
    "size", [2, 3, *(pytest.param(size, marks=pytest.mark.full) for size in (1, 4))]
)
def test_ddp_equals_one_process_on_the_joined_batch(size, case, optimizer):
    expected = train_alone(CASES[case], optimizer)
    ranks = run_ranks(size, train_rank, CASES[case], optimizer)
    for rank in ranks:
        assert len(rank.digests) == 2 * STEPS
        assert rank.digests == ranks[0].digests
        assert_close(rank.state, expected)


@case_names
def test_ddp_equals_the_oracle(case):
    for ddp, naive in zip(
        run_ranks(3, train_rank, CASES[case], "adamw"),
        run_ranks(3, train_naively, CASES[case], "adamw"),
        strict=True,
    ):
        assert_close(ddp.state, naive.state)


@pytest.mark.parametrize("mode", Mode)
def test_delayed_messages_change_no_bit(mode):
    case = CASES["everything"]
    prompt = run_ranks(3, train_rank, case, "adamw", mode=mode)
    for seed in (1, 2):
        late = run_ranks(
            3, train_rank, case, "adamw", mode=mode, faults=Faults(delay=2e-3), seed=seed
        )
        assert [rank.digests for rank in late] == [rank.digests for rank in prompt]


def test_a_rank_that_dies_in_the_middle_is_an_error_on_the_others():
    death = Faults(deaths=(Death(rank=1, call=60, announce=False),))
    with pytest.raises(CollectiveTimeoutError, match="gradients'"):
        run_ranks(3, train_rank, CASES["plain"], "sgd", faults=death, timeout=1.0)


def test_the_cases_are_what_they_are_called():
    """The branch is used by some ranks only, by none at times, and at times by all."""
    model = CASES["unused branch"].build(np.random.default_rng(0))
    used = set()
    for step, x, _ in batches():
        uses = [
            len(model.forward(x[i : i + 4], NnMode(True, step=step))[1].uses) for i in (0, 4, 8)
        ]
        used.add(sum(count > 2 for count in uses))
    assert {0, 1} <= used
