"""`run_ranks`: results, errors, and that it never hangs."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from mpidist import collectives
from mpidist.errors import CollectiveTimeoutError, SizeMismatchError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks


def test_results_by_rank_and_arguments() -> None:
    shared = object()

    def body(group: ProcessGroup, number: int, thing: object) -> tuple[int, int, bool, str]:
        return group.rank, group.size + number, thing is shared, group.backend

    assert run_ranks(3, body, 10, shared) == [(rank, 13, True, "simulated") for rank in range(3)]


def test_one_rank() -> None:
    assert run_ranks(1, lambda group: collectives.all_reduce(np.ones(2), group).sum()) == [2.0]


def test_the_group_is_closed_afterwards() -> None:
    groups = run_ranks(2, lambda group: group)
    for group in groups:
        with pytest.raises(RuntimeError, match="closed"):
            group.progress()


def test_the_error_of_one_rank_ends_the_others() -> None:
    def body(group: ProcessGroup) -> None:
        if group.rank == 1:
            raise KeyError("one")
        collectives.barrier(group)

    began = time.monotonic()
    with pytest.raises(KeyError, match="one") as caught:
        run_ranks(3, body)
    assert time.monotonic() - began < 10
    notes = "\n".join(caught.value.__notes__)
    assert "rank 0 raised" in notes
    assert "rank 2 raised" in notes


def test_the_first_of_several_errors_by_rank() -> None:
    def body(group: ProcessGroup) -> None:
        time.sleep(0.01 * (3 - group.rank))
        raise ValueError(f"rank {group.rank} fails")

    with pytest.raises(ValueError, match="rank 0 fails") as caught:
        run_ranks(3, body)
    assert len(caught.value.__notes__) == 2
    assert "rank 1 fails" in caught.value.__notes__[0]


def test_a_cause_comes_before_its_consequences() -> None:
    """Rank 0 only missed a deadline because rank 2 was elsewhere, failing."""

    def body(group: ProcessGroup) -> None:
        if group.rank == 2:
            time.sleep(0.3)
            raise SizeMismatchError("the cause")
        collectives.barrier(group)

    with pytest.raises(SizeMismatchError, match="the cause") as caught:
        run_ranks(3, body, timeout=0.1)
    assert any("CollectiveTimeoutError" in note for note in caught.value.__notes__)


def test_the_same_error_on_all_ranks() -> None:
    with pytest.raises(SizeMismatchError, match="rank 0 of 2"):
        run_ranks(2, lambda group: collectives.all_reduce(np.ones(2), group, out=np.ones(3)))


def test_skips_and_failures_of_pytest_pass_through() -> None:
    with pytest.raises(pytest.skip.Exception, match="no reason"):
        run_ranks(2, lambda group: pytest.skip("no reason"))
    with pytest.raises(pytest.fail.Exception, match="because"):
        run_ranks(2, lambda group: pytest.fail("because"))


def test_a_rank_that_does_not_come_is_named_by_the_others() -> None:
    def body(group: ProcessGroup) -> None:
        if group.rank != 1:
            collectives.barrier(group)

    with pytest.raises(CollectiveTimeoutError, match="barrier"):
        run_ranks(3, body, timeout=0.2)


def test_a_rank_that_hangs_elsewhere_is_shown() -> None:
    leave = threading.Event()

    def a_very_long_wait(group: ProcessGroup) -> None:
        if group.rank == 1:
            leave.wait(20)

    began = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 1 did not end within") as caught:
        run_ranks(2, a_very_long_wait, timeout=0.1)
    leave.set()
    assert time.monotonic() - began < 8
    assert "a_very_long_wait" in str(caught.value)


def test_a_rank_that_polls_for_ever_is_ended() -> None:
    ended: list[bool] = []

    def poll(group: ProcessGroup) -> None:
        work = collectives.ibarrier(group) if group.rank == 0 else None
        try:
            while work is not None and not work.done():
                pass
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError, match="rank 0 did not end"):
        run_ranks(2, poll, timeout=0.1)
    assert len(ended) == 2


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    run_ranks(4, collectives.barrier)
    assert threading.active_count() == before
