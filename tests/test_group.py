"""Groups on real ranks: what goes wrong inside one, and what groups have in common."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import mpidist
from mpidist.backends.verbs import Barrier
from mpidist.job import end
from mpidist.testing import run_ranks


@pytest.mark.ranks(2)
def test_waiting_on_one_world_drives_another(world):
    """The second phase of a long receive begins while this rank waits elsewhere."""
    one, two = mpidist.init(timeout=20), mpidist.init(timeout=20)
    long = np.arange(1 << 20)
    if world.rank == 0:
        work = mpidist.irecv(one, src=1)
        mpidist.barrier(two)
        np.testing.assert_array_equal(work.wait(), long)
    else:
        mpidist.send(long, one, dst=0)
        mpidist.barrier(two)
    one.close()
    two.close()


@pytest.mark.ranks(2)
def test_the_communicator_may_be_used_beside_the_group(world):
    comm, peer = world.mpi_comm, 1 - world.rank
    theirs = np.full(3, -1)
    requests = [comm.Irecv(theirs, peer, tag=1), comm.Isend(np.full(3, world.rank), peer, tag=1)]
    for _ in range(3):
        total = mpidist.all_reduce(np.ones(5, np.float16), world, op=mpidist.MAX)
        np.testing.assert_array_equal(total, np.ones(5))
    for request in requests:
        request.Wait()
    np.testing.assert_array_equal(theirs, np.full(3, peer))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("arguments", [(-1, 0), (2**40, 0), (0.5, 0), (0, 2**40)])
def test_split_refuses_what_some_library_does(world, arguments):
    with pytest.raises(mpidist.UnsupportedOperationError, match="split on group 'world'"):
        world.split(*arguments)
    mpidist.barrier(world)


def failing_plan():
    def finish():
        raise ValueError("no room, says the test")

    return Barrier(), finish


def test_an_error_at_the_end_of_an_operation_is_kept_and_breaks_the_group():
    def body(group):
        work = group.operations.start(*failing_plan())
        for _ in range(2):
            with pytest.raises(ValueError, match="no room"):
                work.wait()
        with pytest.raises(mpidist.GroupBrokenError, match="no room"):
            mpidist.barrier(group)

    run_ranks(2, body)


def test_close_raises_what_nobody_waited_for_and_closes_all_the_same():
    def body(group):
        sub = group.duplicate("sub")
        if group.rank == 0:
            mpidist.send(np.ones(3), sub, dst=1)
        else:
            mpidist.irecv(sub, src=0, out=np.empty(4))
            with pytest.raises(mpidist.SizeMismatchError):
                sub.close()
        sub.close()
        with pytest.raises(mpidist.GroupBrokenError, match="closed"):
            mpidist.barrier(sub)

    run_ranks(2, body)


def test_an_interrupt_inside_a_collective_breaks_its_group(monkeypatch):
    def body(group):
        sub = group.duplicate("sub")

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(sub.transport, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mpidist.barrier(sub)
        with pytest.raises(mpidist.GroupBrokenError, match="KeyboardInterrupt"):
            mpidist.barrier(sub)
        mpidist.barrier(group)

    run_ranks(2, body)


def test_a_second_wait_raises_the_first_error():
    def body(group):
        if group.rank == 0:
            work = mpidist.irecv(group, src=1)
            for _ in range(2):
                with pytest.raises(mpidist.CollectiveTimeoutError, match="recv"):
                    work.wait(timeout=0.2)

    run_ranks(2, body)


@pytest.mark.ranks(2)
def test_communicators_of_dropped_groups_are_released_when_none_is_left(world, monkeypatch):
    from mpi4py import MPI

    from mpidist.backends.mpi.backend import MpiBackend

    dropped, asked = world.duplicate("dropped"), world.duplicate("asked")
    comm, kept = dropped.transport._comm, asked.mpi_comm
    del dropped, asked
    real = MpiBackend._child

    def child(self, made):
        if comm != MPI.COMM_NULL:
            made.Free()
            raise MPI.Exception(MPI.ERR_OTHER)
        return real(self, made)

    monkeypatch.setattr(MpiBackend, "_child", child)
    world.duplicate("next").close()
    assert comm == MPI.COMM_NULL
    assert kept.allreduce(1) == 2  # whoever has asked for it has it
    kept.Free()


@pytest.mark.ranks(2, 3)
def test_a_group_that_one_rank_cannot_make_is_made_by_none(world, monkeypatch):
    """And the group of which it was to be made is still there."""
    from mpi4py import MPI

    from mpidist.backends.mpi.backend import MpiBackend

    real, made = MpiBackend._child, []

    def child(self, comm):
        made.append(real(self, comm))
        if world.rank == 0:
            made.pop().close()
            raise MPI.Exception(MPI.ERR_OTHER)
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(MpiBackend, "_child", child)
        with pytest.raises(mpidist.BackendUnavailableError, match=r"close those.*can still be"):
            world.split(0)
    assert all(each._comm == MPI.COMM_NULL for each in made)
    assert mpidist.all_reduce(np.ones(1), world)[0] == world.size
    world.split(0).close()


def test_worlds_of_the_same_ranks_share_their_exit_notices():
    made = []

    def mailbox():
        made.append(SimpleNamespace(rank=0, size=2))
        return made[-1]

    worlds = [SimpleNamespace(ranks=ranks, mailbox=mailbox) for ranks in [(0, 1), (1, 0), (0, 1)]]
    installed = SimpleNamespace(_job=SimpleNamespace(nap=None), _notices={})
    one, other, again = (end._Hooks.join(installed, each, 5 + n) for n, each in enumerate(worlds))
    assert one is again is not other
    assert len(made) == 2
    assert list(installed._notices.values()) == [(one, 7), (other, 6)]
