"""Waits: what a lost rank, a late rank and a long wait lead to."""

from __future__ import annotations

import gc
import logging
import time
import weakref

import numpy as np
import pytest

import mpidist
from mpidist.testing import Death, Faults, run_ranks

pytestmark = pytest.mark.usefixtures("short_grace")


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr("mpidist.pending.GRACE", 0.3)


def dies(rank):
    return Faults(deaths=(Death(rank=rank, call=1),))


def test_a_collective_needs_every_rank():
    def body(group):
        with pytest.raises(mpidist.PeerLostError, match="rank 2 died"):
            mpidist.all_reduce(np.ones(3), group)
        with pytest.raises(mpidist.GroupBrokenError):
            mpidist.barrier(group)

    run_ranks(3, body, faults=dies(2))


def test_a_message_needs_its_sender_only():
    def body(group):
        if group.rank == 0:
            time.sleep(1)
            mpidist.send(np.arange(3), group, dst=1)
        elif group.rank == 1:
            return mpidist.recv(group, src=0).tolist()
        else:
            mpidist.barrier(group)
        return None

    assert run_ranks(3, body, faults=dies(2))[1] == [0, 1, 2]


def test_any_source_needs_one_other_rank():
    """A master goes on waiting for its workers when some of them have finished and left."""

    def body(group):
        if group.rank == 0:
            return [mpidist.recv(group, src=mpidist.ANY_SOURCE).tolist() for _ in range(2)]
        if group.rank == 1:
            time.sleep(1)
            mpidist.send(np.array(1), group, dst=0)
            time.sleep(1)
            mpidist.send(np.array(2), group, dst=0)
        else:
            mpidist.barrier(group)
        return None

    assert run_ranks(3, body, faults=dies(2))[0] == [1, 2]


def test_any_source_fails_when_nobody_is_left():
    def body(group):
        if group.rank:
            mpidist.barrier(group)
        with pytest.raises(mpidist.PeerLostError, match=r"rank 1 died.*rank 2 died"):
            mpidist.recv(group, src=mpidist.ANY_SOURCE)

    run_ranks(3, body, faults=Faults(deaths=(Death(rank=1, call=1), Death(rank=2, call=1))))


def test_a_long_wait_is_logged_again_at_each_doubling(caplog):
    def body(group):
        group.warn_after = 0.2
        if group.rank:
            time.sleep(1.2)
        mpidist.barrier(group)

    with caplog.at_level(logging.WARNING, logger="mpidist"):
        run_ranks(2, body)
    waits = [record.getMessage() for record in caplog.records]
    assert 2 <= len(waits) <= 3, waits
    assert all("\n  barrier #1 on group 'world', rank 0 of 2, called" in wait for wait in waits)
    assert "the deadline is at 30 s" in waits[0]


@pytest.mark.ranks(2)
def test_a_result_that_was_waited_for_goes_without_the_garbage_collector(world):
    gc.disable()
    try:
        work = mpidist.iall_reduce(np.ones(3), world)
        result = weakref.ref(work.wait())
        assert result() is not None
        del work
        assert result() is None
    finally:
        gc.enable()


@pytest.mark.ranks(3)
def test_the_missing_rank_is_named(world):
    group = world.duplicate("late")
    group.timeout = 0.5
    if world.rank == 1:
        time.sleep(2)
        return
    with pytest.raises(mpidist.CollectiveTimeoutError, match=r"Missing: rank 1 \("):
        mpidist.all_reduce(np.ones(3), group)
    shared = world.rank  # the group is broken for good, and at once
    with pytest.raises(mpidist.GroupBrokenError, match=f"rank {shared} of 3"):
        mpidist.barrier(group)
