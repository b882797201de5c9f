"""Waits: what a lost rank, a late rank and a long wait lead to."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import numpy as np
import pytest

import mpidist
from mpidist.group.state import abandon_groups
from mpidist.testing import Death, Faults, run_ranks

pytestmark = pytest.mark.usefixtures("short_grace")


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr("mpidist.group.pending.GRACE", 0.3)


LONGER_THAN_GRACE = 0.7  # seconds


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
            time.sleep(LONGER_THAN_GRACE)
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
            time.sleep(LONGER_THAN_GRACE)
            mpidist.send(np.array(1), group, dst=0)
            time.sleep(LONGER_THAN_GRACE)
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
        group.warn_after = 0.1
        deadline = time.monotonic() + 20
        while group.rank and len(caplog.records) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        mpidist.barrier(group)

    began = time.time()
    with caplog.at_level(logging.WARNING, logger="mpidist"):
        run_ranks(2, body)
    assert all(r.created - began >= 0.1 * 2**n for n, r in enumerate(caplog.records))
    waits = [record.getMessage() for record in caplog.records]
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


def drop_sums(group, number):
    """Start sums that nobody waits for, with barriers, and return references to their results."""
    refs = []
    for begun in range(1, number + 1):
        out = np.empty(1000)
        refs.append(weakref.ref(out))
        mpidist.iall_reduce(np.ones(1000), group, out=out)
        if begun % 20 == 0:
            mpidist.barrier(group)
    return refs


def alive(refs):
    return sum(ref() is not None for ref in refs)


def dropped_sums_are_released(group):
    last = [mpidist.irecv(group, src=1 - group.rank) for _ in range(40)]
    refs = drop_sums(group, 400)
    assert alive(refs) < 100, "held behind receives that last"
    assert len(group.operations.outstanding) < 140
    for _ in last:
        mpidist.isend(np.ones(3), group, dst=1 - group.rank)
    for work in last:
        work.wait()


def test_finished_operations_that_nobody_waits_for_are_released():
    run_ranks(2, dropped_sums_are_released)


@pytest.mark.ranks(2)
def test_finished_operations_that_nobody_waits_for_are_released_over_mpi(world):
    dropped_sums_are_released(world.duplicate("dropped"))


@pytest.mark.ranks(2)
def test_a_wait_releases_operations_that_nobody_waits_for(world):
    group = world.duplicate("few")
    refs = drop_sums(group, 10)
    mpidist.barrier(group)
    if group.rank == 1:
        # The operations need both ranks, and this one does not wait.
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            group.transport.progress()
        mpidist.send(np.ones(3), group, dst=0)
    else:
        mpidist.recv(group, src=1)
        assert alive(refs) == 0


def test_close_raises_the_error_of_an_operation_that_progress_has_finished():
    def body(group):
        copy = group.duplicate("copy")
        if group.rank == 1:
            for _ in range(2):
                mpidist.send(np.zeros(10), copy, dst=0)
            copy.close()
            return
        waited = mpidist.irecv(copy, src=1, out=np.empty(5))
        with pytest.raises(mpidist.SizeMismatchError):
            waited.wait()
        mpidist.irecv(copy, src=1, out=np.empty(5))
        deadline = time.monotonic() + 10
        while copy.operations.outstanding and time.monotonic() < deadline:
            copy.progress()
        with pytest.raises(mpidist.SizeMismatchError):
            copy.close()
        copy.close()

    run_ranks(2, body)


def test_close_is_silent_about_an_error_that_was_raised_before():
    def body(group):
        copy = group.duplicate("copy")
        if group.rank == 1:
            mpidist.send(np.zeros(10), copy, dst=0)
        else:
            work = mpidist.irecv(copy, src=1, out=np.empty(5))
            while copy.operations.outstanding:
                copy.progress()
            with pytest.raises(mpidist.SizeMismatchError):
                work.wait()
        copy.close()

    run_ranks(2, body)


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


@pytest.mark.parametrize("size", [1, 2])
def test_immediate_calls_of_simulated_ranks_keep_nothing_when_they_are_over(size):
    def body(group):
        refs = []
        for _ in range(5):
            x = np.ones(3)
            refs.append(weakref.ref(x))
            mpidist.iall_reduce(x, group).wait()
            mpidist.all_reduce_coalesced([x], group)
        del x
        gc.collect()
        return [ref() is None for ref in refs], len(group.transport.engine.running)

    assert run_ranks(size, body) == [([True] * 5, 0)] * size


def test_a_work_that_is_over_does_not_keep_the_arrays_of_its_call():
    def body(group):
        x = np.ones(3)
        ref = weakref.ref(x)
        work = mpidist.iall_reduce(x, group)
        work.wait()
        del x
        gc.collect()
        return ref() is None

    assert run_ranks(2, body) == [True, True]


def test_a_wait_ends_with_the_reason_if_the_group_breaks_meanwhile():
    """One rank waits for an immediate call that differs, the others in the next one."""

    def body(group):
        group.timeout = 20
        x = np.ones(3 + (group.rank == 0))
        work = mpidist.iall_reduce(x, group)
        began = time.monotonic()
        with pytest.raises((mpidist.CollectiveMismatchError, mpidist.GroupBrokenError)) as caught:
            work.wait() if group.rank == 0 else mpidist.barrier(group)
        assert time.monotonic() - began < 10
        return str(caught.value)

    for text in run_ranks(3, body):
        assert "the ranks called different things" in text


def test_a_work_of_a_group_that_was_dropped_is_given_up_with_its_transport():
    """As in a child that was forked, and after MPI.Finalize: its use would end the process."""
    both = threading.Barrier(2)

    def body(group):
        work = mpidist.irecv(group.duplicate("dropped"), src=1 - group.rank)
        gc.collect()
        if both.wait(10) == 0:
            abandon_groups("simulated", "there is no transport any more")
        both.wait(10)
        for ask in (work.wait, work.done):
            with pytest.raises(mpidist.GroupBrokenError, match="no transport any more"):
                ask()

    run_ranks(2, body, timeout=10)
