"""Two ways to train that give the same bits: two steps here, more by the command."""

from __future__ import annotations

from mpidist.testing import run_ranks
from tests.soaks.training_bits import SIZES, task_of, train


def test_of_two_ranks_the_size_of_buckets_changes_no_bit():
    def body(group):
        return {train(group, task_of("digits"), "ddp", sizes, steps=2) for sizes in SIZES.values()}

    first, second = run_ranks(2, body)
    assert len(first) == 1
    assert first == second
