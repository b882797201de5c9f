"""Calls that differ between ranks, in every verb and form: nobody gets a result."""

from __future__ import annotations

import time

import numpy as np
import pytest

import mpidist
from mpidist.backends.node.comparison import SumComparison
from mpidist.backends.node.sequencer import supported
from mpidist.backends.node.signatures import CallSignature, balance_of
from mpidist.backends.work import Work
from mpidist.errors import CollectiveMismatchError

X = np.arange(24.0).reshape(4, 6)
T = X.reshape(6, 4)


def rows(group, *shape):
    return np.ones((group.size * 2, *shape))


# The usual call and an odd one, by what differs.
BLOCKING = {
    "shape of all_reduce": (
        lambda g: mpidist.all_reduce(X, g),
        lambda g: mpidist.all_reduce(T, g),
    ),
    "shape of all_reduce in place": (
        lambda g: mpidist.all_reduce(X.copy(), g, out=X.copy()),
        lambda g: mpidist.all_reduce(X.reshape(-1), g),
    ),
    "shape of a 0-d array": (
        lambda g: mpidist.all_reduce(np.ones(()), g),
        lambda g: mpidist.all_reduce(np.ones(1), g),
    ),
    "shape of reduce": (lambda g: mpidist.reduce(X, g), lambda g: mpidist.reduce(T, g)),
    "shape of broadcast": (lambda g: mpidist.broadcast(X, g), lambda g: mpidist.broadcast(T, g)),
    "shape of all_gather": (lambda g: mpidist.all_gather(X, g), lambda g: mpidist.all_gather(T, g)),
    "shape of gather": (lambda g: mpidist.gather(X, g), lambda g: mpidist.gather(T, g)),
    "shape of scatter": (
        lambda g: mpidist.scatter(rows(g, 2, 3), g),
        lambda g: mpidist.scatter(rows(g, 3, 2), g),
    ),
    "shape of reduce_scatter": (
        lambda g: mpidist.reduce_scatter(rows(g, 2, 3), g),
        lambda g: mpidist.reduce_scatter(rows(g, 3, 2), g),
    ),
    "shape of all_to_all": (
        lambda g: mpidist.all_to_all(rows(g, 2, 3), g),
        lambda g: mpidist.all_to_all(rows(g, 3, 2), g),
    ),
    "rows of all_to_all": (
        lambda g: mpidist.all_to_all(rows(g), g),
        lambda g: mpidist.all_to_all(np.ones(g.size * 4), g),
    ),
    "rows that a rank expects": (
        lambda g: mpidist.all_to_all(rows(g), g, counts=[2] * g.size, recv_counts=[2] * g.size),
        lambda g: mpidist.all_to_all(
            rows(g), g, counts=[2] * g.size, recv_counts=[*[3] * (g.size - 1), 2]
        ),
    ),
    "counts of gather": (
        lambda g: mpidist.gather(np.ones(2), g, counts=[2] * g.size),
        lambda g: mpidist.gather(np.ones(2), g, counts=[3, *[2] * (g.size - 1)]),
    ),
    "dtype": (
        lambda g: mpidist.broadcast(X, g),
        lambda g: mpidist.broadcast(X.astype(np.int64), g),
    ),
    "op": (
        lambda g: mpidist.reduce(X, g),
        lambda g: mpidist.reduce(X, g, op=mpidist.MAX),
    ),
    "root": (lambda g: mpidist.scatter(rows(g), g), lambda g: mpidist.scatter(rows(g), g, root=1)),
    "verb": (mpidist.barrier, lambda g: mpidist.all_reduce(np.ones(3), g)),
    "group": (lambda g: g.split(0), lambda g: mpidist.gather(X, g)),
    "objects": (
        lambda g: mpidist.all_gather_object("x", g),
        lambda g: mpidist.broadcast_object("x", g),
    ),
}

LISTS = {
    "length": ([2], [2, 2]),
    "order": ([4, 6], [6, 4]),
    "empty": ([2], []),
    "shape": ([(2, 3)], [(3, 2)]),
}


@pytest.fixture(params=["node", "nodes"])
def group(world, monkeypatch, request):
    """A group on one node, or with each rank on a node of its own."""
    if request.param == "nodes":
        monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", "1")
    group = world.duplicate(f"compared on {request.param}")
    group.timeout = 20
    yield group
    group.close()


@pytest.mark.ranks(2, 3)
def test_blocking_calls_that_differ_raise_on_all_ranks_and_leave_the_group_usable(group):
    last = group.size - 1
    for what, (usual, odd) in BLOCKING.items():
        with pytest.raises(CollectiveMismatchError) as caught:
            (odd if group.rank == last else usual)(group)
        assert caught.value.usable, what
        text = str(caught.value)
        assert text.count("test_comparison.py:") >= 2, text
        assert f"rank {last}" in text
        assert len(text) < 900, text
    assert (mpidist.all_reduce(X, group) == X * group.size).all()


@pytest.mark.ranks(2, 3)
def test_lists_that_differ_raise_on_all_ranks(world, monkeypatch):
    for per_node in (None, "1"):
        if per_node:
            monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", per_node)
        for what, shapes in LISTS.items():
            group = world.duplicate(f"lists of another {what}")
            group.timeout = 20
            arrays = [np.ones(shape) for shape in shapes[group.rank == group.size - 1]]
            with pytest.raises(CollectiveMismatchError, match=r"of a list of \d arrays?"):
                mpidist.all_reduce_coalesced(arrays, group)


@pytest.mark.ranks(2, 3)
def test_no_result_of_an_immediate_call_is_handed_out_if_the_calls_differ(world, monkeypatch):
    calls = (
        lambda g, odd: mpidist.iall_reduce(T if odd else X, g),
        lambda g, odd: mpidist.iall_gather(X[: 4 - odd], g),
        lambda g, odd: mpidist.ibroadcast(X.astype(np.int64) if odd else X, g),
        lambda g, odd: mpidist.iall_to_all(np.ones((2 + odd) * g.size), g),
        lambda g, odd: mpidist.iall_reduce(
            X.astype(np.float16), g, op=(mpidist.SUM, mpidist.MAX)[odd]
        ),
    )
    for per_node in (None, "1"):
        if per_node:
            monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", per_node)
        for call in calls:
            group = world.duplicate("immediate")
            group.timeout = 20
            work = call(group, group.rank == 1)
            with pytest.raises(
                CollectiveMismatchError, match=r"rank 1 called i|rank 1: sends"
            ) as caught:
                work.wait()
            with pytest.raises(CollectiveMismatchError):
                work.wait()
            assert caught.value.usable
            assert mpidist.iall_reduce(np.ones(3), group).wait()[0] == group.size


@pytest.mark.ranks(3)
def test_a_difference_has_one_outcome_however_often_and_whenever_it_is_caught(group):
    count = 70_000
    registered = group.empty(count)
    for number in range(150):
        with pytest.raises(CollectiveMismatchError) as caught:
            mpidist.all_reduce(np.ones(3 + (group.rank == number % 3)), group)
        assert caught.value.usable
    registered[...] = 1
    healthy = mpidist.iall_reduce(registered, group, out=registered)
    if group.rank == 1:
        time.sleep(0.3)  # the others look into the records meanwhile
    with pytest.raises(CollectiveMismatchError) as caught:
        (mpidist.barrier if group.rank == 1 else lambda g: mpidist.all_reduce(X, g))(group)
    assert caught.value.usable
    assert (healthy.wait() == 3).all()
    assert (mpidist.all_reduce(X, group) == 3 * X).all()


@pytest.mark.ranks(2)
def test_a_root_waits_for_all_since_their_calls_may_differ(group):
    if group.rank == 0:
        work = mpidist.ibroadcast(np.ones(3), group)
        assert not work.done()
        mpidist.send(np.ones(1), group, dst=1)
    else:
        mpidist.recv(group, src=0)
        work = mpidist.ibroadcast(np.zeros(3), group)
    assert work.wait()[0] == 1


def test_what_is_sent_and_expected_adds_up_to_nothing() -> None:
    rng = np.random.default_rng(5)
    for size in (1, 2, 3, 7):
        sends = rng.integers(0, 4, (size, size))
        balances = [
            balance_of(rank, tuple(sends[rank].tolist()), tuple(sends[:, rank].tolist()))
            for rank in range(size)
        ]
        assert sum(balances) % 2**64 == 0
        if size > 1:
            wrong = sends[:, 0].copy()
            wrong[[0, 1]] += [1, -1]  # as many in all, from other ranks
            balances[0] = balance_of(0, tuple(sends[0].tolist()), tuple(wrong.tolist()))
            assert sum(balances) % 2**64 != 0


class Done(Work[None]):
    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> None:
        """Return at once."""


@pytest.mark.parametrize("odd", [None, 0, 1, 2, 3])
def test_a_sum_of_hashes_tells_whether_all_records_are_the_same(odd: int | None) -> None:
    given: list[np.ndarray] = []
    ranks = [SumComparison(lambda words: given.append(words) or Done(), 4) for _ in range(4)]
    signatures = [CallSignature.of((77 + (rank == odd), 1, 0, 0, rank == odd)) for rank in range(4)]
    for comparison, signature in zip(ranks, signatures, strict=True):
        comparison.arrive(5, signature)
    total = np.sum(given, axis=0, dtype=np.uint64)
    for words in given:
        words[...] = total
    for comparison, signature in zip(ranks, signatures, strict=True):
        assert comparison.equal(5, signature) == (odd is None)
        if odd is not None:
            assert comparison.breaks(5)


@pytest.mark.skipif(not supported(), reason="elsewhere calls are compared by sums")
def test_a_record_keeps_its_numbers_and_its_balance_apart() -> None:
    plain, balanced = CallSignature.of((1, 2, 3, 4, 0)), CallSignature.of((1, 2, 3, 4, 0), 99)
    assert plain.digest == balanced.digest
    assert (plain.balance, balanced.balance) == (None, 99)
    assert CallSignature.of((1, 2, 3, 5, 0)).digest != plain.digest
