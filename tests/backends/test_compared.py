"""Debug mode: calls that differ are an error on all ranks before anything has moved."""

from __future__ import annotations

import numpy as np
import pytest

import mpidist
from mpidist.errors import CollectiveMismatchError
from mpidist.testing import run_ranks

X = np.arange(12.0)

CALLS = {
    "verb": (lambda x, g: mpidist.barrier(g), mpidist.all_reduce),
    "split": (lambda x, g: g.split(0), mpidist.all_reduce),
    "empty": (lambda x, g: g.empty(5), mpidist.all_reduce),
    "bytes": (lambda x, g: g.shared(5), lambda x, g: g.shared(6)),
    "op": (
        lambda x, g: mpidist.all_reduce(x, g, op=mpidist.MAX),
        mpidist.all_reduce,
    ),
    "dtype": (
        lambda x, g: mpidist.all_reduce(x.astype(np.int64), g),
        mpidist.all_reduce,
    ),
    "count": (lambda x, g: mpidist.all_reduce(x[:5], g), mpidist.all_reduce),
    "shape": (
        lambda x, g: mpidist.all_reduce(x.reshape(3, 4), g),
        lambda x, g: mpidist.all_reduce(x.reshape(4, 3), g),
    ),
    "root": (
        lambda x, g: mpidist.broadcast(x, g, root=0),
        lambda x, g: mpidist.broadcast(x, g, root=1),
    ),
    "counts": (
        lambda x, g: mpidist.reduce_scatter(x, g, counts=[4, 4, 4]),
        lambda x, g: mpidist.reduce_scatter(x, g, counts=[5, 3, 4]),
    ),
    "immediate": (
        lambda x, g: mpidist.iall_reduce(x, g).wait(),
        mpidist.all_reduce,
    ),
    "both immediate": (
        lambda x, g: mpidist.iall_gather(x, g).wait(),
        lambda x, g: mpidist.iall_reduce(x, g).wait(),
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_difference_is_told_on_all_ranks_and_the_group_stays_usable(what: str) -> None:
    odd, usual = CALLS[what]

    def one(group: mpidist.ProcessGroup) -> str:
        group.watch.debug = True
        x = X.copy()
        with pytest.raises(CollectiveMismatchError) as caught:
            (odd if group.rank == 1 else usual)(x, group)
        assert (x == X).all()
        assert (mpidist.all_reduce(X, group) == 3 * X).all()
        return str(caught.value)

    for rank, text in enumerate(run_ranks(3, one)):
        assert f"rank {rank} of 3" in text
        # Who is in the minority comes first, with the line.
        assert text.index("rank 1 called ") < text.index("rank 0, 2 called ")
        assert text.count(f"{__file__.rpartition('/')[2]}:") == 2
        assert text.count(" on rank ") == 0


def test_rows_that_a_rank_does_not_expect_are_told_before_they_are_sent() -> None:
    def one(group: mpidist.ProcessGroup) -> str:
        group.watch.debug = True
        rows = 3 if group.rank == 1 else 2
        with pytest.raises(CollectiveMismatchError) as caught:
            mpidist.iall_to_all(np.ones(rows * group.size), group).wait()
        assert caught.value.usable
        return str(caught.value)

    for text in run_ranks(3, one):
        assert "rank 1: sends [3, 3, 3] elements, expects [3, 3, 3], at " in text


def test_a_group_that_one_rank_wants_to_make_is_told_apart_from_a_collective() -> None:
    def one(group: mpidist.ProcessGroup) -> str:
        group.timeout = 20
        with pytest.raises(CollectiveMismatchError) as caught:
            group.split(0) if group.rank == 1 else mpidist.gather(X, group)
        return str(caught.value)

    for text in run_ranks(3, one):
        assert "rank 1 called split at " in text


def test_groups_and_memory_are_made_as_without() -> None:
    def one(group: mpidist.ProcessGroup) -> int:
        group.watch.debug = True
        half = group.split(group.rank % 2)
        assert half is not None
        x = half.empty(5)
        x[:] = 1
        pair = group.new_group([0, 2])
        assert (pair is None) == (group.rank == 1)
        return int(mpidist.all_reduce(x, half)[0])

    assert run_ranks(3, one) == [2, 1, 2]


def test_equal_calls_give_the_same_results_as_without() -> None:
    def one(group: mpidist.ProcessGroup) -> list[np.ndarray]:
        group.watch.debug = True
        x = X + group.rank
        works = [
            mpidist.iall_reduce(x, group),
            mpidist.iall_gather(x, group),
            mpidist.ibroadcast(x, group, root=2),
            mpidist.iall_to_all(x, group),
        ]
        return [work.wait() for work in works]

    ranks = [X + rank for rank in range(3)]
    for rank, (total, gathered, sent, exchanged) in enumerate(run_ranks(3, one)):
        assert (total == sum(ranks)).all()
        assert (gathered == np.concatenate(ranks)).all()
        assert (sent == ranks[2]).all()
        assert (exchanged == np.concatenate([x[4 * rank : 4 * rank + 4] for x in ranks])).all()


def test_an_immediate_call_returns_before_the_others_have_come() -> None:
    """Rank 0 begins, then sends the message for which the others wait before they begin."""

    def one(group: mpidist.ProcessGroup) -> float:
        group.watch.debug = True
        if group.rank == 0:
            work = mpidist.iall_reduce(X, group)
            for other in range(1, group.size):
                mpidist.send(X, group, dst=other)
        else:
            mpidist.recv(group, src=0)
            work = mpidist.iall_reduce(X, group)
        return float(work.wait()[1])

    assert run_ranks(3, one) == [3.0] * 3


@pytest.mark.ranks(2)
def test_sums_that_go_other_ways_on_other_ranks_are_compared_on_all(world, monkeypatch):
    group = world.duplicate("compared")
    group.timeout = 5
    monkeypatch.setattr(group.watch, "debug", True)
    x = np.ones(100)
    for _ in range(3):
        assert mpidist.all_reduce(x.copy(), group, out=x) is x
    x[:] = 1
    y = x if group.rank == 0 else np.ones(200)[::2]
    assert (mpidist.all_reduce(y, group, out=y) == 2).all()
    x[:] = 1
    for _ in range(3):
        out = x if group.rank == 0 else np.empty(100)
        assert (mpidist.all_reduce(x, group, out=out) == 2).all()
        x[:] = 1
