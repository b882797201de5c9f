"""The collectives made of messages: right for every number of ranks, at the cost they state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from mpidist._types import MAX, MEAN, SUM, Array, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.backends import algorithms
from mpidist.backends.algorithms import Lane
from mpidist.backends.base import Backend
from mpidist.backends.work import Message, Steps, StepsWork, Work
from mpidist.group import ProcessGroup
from mpidist.testing import Mode, run_ranks

SIZES = range(1, 10)
LANE = 1000  # far from those that the group itself has used


class Counting:
    """A transport that counts what it is asked to send."""

    def __init__(self, backend: Backend) -> None:
        self.rank, self.size = backend.rank, backend.size
        self._backend = backend
        self.sent: list[int] = []

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work[Any]:
        self.sent += [message.array.nbytes for message in sends]
        return self._backend.exchange(sends, receives)


class Run(NamedTuple):
    """What a rank got, and the bytes of each message that it sent."""

    result: Array
    sent: list[int]


def play(
    size: int, body: Callable[[Lane], tuple[Steps, Array]], mode: Mode = Mode.EAGER
) -> list[Run]:
    """Run an algorithm on all ranks; `body` makes its steps and the array of its result."""

    def on_rank(group: ProcessGroup) -> Run:
        counting = Counting(group.transport)
        steps, result = body(Lane(counting, LANE))
        StepsWork(steps).wait(20)
        return Run(result, counting.sent)

    return run_ranks(size, on_rank, mode=mode)


def values(rank: int, count: int, dtype: Any = np.float64) -> Array:
    return np.random.default_rng(rank).integers(-9, 9, count).astype(dtype)


def log2_up(size: int) -> int:
    return (size - 1).bit_length()


@pytest.mark.parametrize("size", SIZES)
def test_dissemination_barrier(size: int) -> None:
    runs = play(size, lambda lane: (algorithms.dissemination_barrier(lane), np.empty(0)))
    assert all(run.sent == [1] * log2_up(size) for run in runs)


@pytest.mark.parametrize("size", SIZES)
def test_tree_broadcast(size: int) -> None:
    for root in range(size):

        def body(lane: Lane, root: int = root) -> tuple[Steps, Array]:
            x = values(lane.rank, 7)
            return algorithms.tree_broadcast(lane, x, root), x

        runs = play(size, body)
        for run in runs:
            np.testing.assert_array_equal(run.result, values(root, 7))
            assert len(run.sent) <= log2_up(size)
            assert set(run.sent) <= {56}
        assert sum(len(run.sent) for run in runs) == size - 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", [SUM, MAX, MEAN], ids=lambda op: op.name)
def test_tree_reduce(size: int, op: ReduceOp) -> None:
    for root in {0, size // 2, size - 1}:

        def body(lane: Lane, root: int = root) -> tuple[Steps, Array]:
            out = np.empty(7) if lane.rank == root else None
            steps = algorithms.tree_reduce(lane, values(lane.rank, 7), out, op, root)
            return steps, np.empty(0) if out is None else out

        runs = play(size, body)
        np.testing.assert_allclose(runs[root].result, total(size, 7, op), rtol=1e-15)
        assert [run.sent for run in runs] == [[] if r == root else [56] for r in range(size)]


def total(size: int, count: int, op: ReduceOp, dtype: Any = np.float64) -> Array:
    parts = np.stack([values(rank, count, dtype) for rank in range(size)])
    whole: Array = {SUM: parts.sum(0), MAX: parts.max(0), MEAN: parts.sum(0) / size}[op]
    return whole


ALL_REDUCES = {
    "recursive doubling": algorithms.recursive_doubling_all_reduce,
    "ring": algorithms.ring_all_reduce,
    "rank order": algorithms.rank_order_all_reduce,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALL_REDUCES)
def test_all_reduces(size: int, name: str) -> None:
    for op, count in ((SUM, 23), (MAX, 2), (MEAN, 72), (SUM, 0)):
        for in_place in (False, True):

            def body(
                lane: Lane, op: ReduceOp = op, count: int = count, in_place: bool = in_place
            ) -> tuple[Steps, Array]:
                x = values(lane.rank, count)
                out = x if in_place else np.empty(count)
                return ALL_REDUCES[name](lane, x, out, op), out

            runs = play(size, body)
            for run in runs:
                np.testing.assert_allclose(run.result, total(size, count, op), rtol=1e-15)
                assert run.result.tobytes() == runs[0].result.tobytes()


LENGTHS = [[23], [16, 16, 16, 16, 16, 16, 5], []]
"""Of the pieces of an array: one, more than are on their way at a time, none."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=len)
@pytest.mark.parametrize("mode", Mode)
def test_pipelined_all_reduce(size: int, lengths: list[int], mode: Mode) -> None:
    for op, dtype in ((SUM, np.float64), (MAX, np.int32), (SUM, np.float32)):

        def body(lane: Lane, op: ReduceOp = op, dtype: Any = dtype) -> tuple[Steps, Array]:
            x = values(lane.rank, sum(lengths), dtype)
            pieces = np.split(x, np.cumsum(lengths)[:-1]) if lengths else []
            delivered: list[Array] = []

            def deliver(piece: Array) -> None:
                assert piece is pieces[len(delivered)]
                delivered.append(piece)

            def made() -> Iterator[Array]:
                for number, piece in enumerate(pieces):
                    assert number <= len(delivered) + algorithms.AHEAD + 1
                    yield piece

            return algorithms.pipelined_all_reduce(lane, made(), op, deliver), x

        runs = play(size, body, mode)
        nbytes = sum(lengths) * np.dtype(dtype).itemsize
        for run in runs:
            np.testing.assert_array_equal(run.result, total(size, sum(lengths), op, dtype))
            assert len(run.sent) == (1 if size == 2 else 2 * (size - 1)) * len(lengths)
        assert sum(sum(run.sent) for run in runs) == 2 * (size - 1) * nbytes


@pytest.mark.parametrize("size", SIZES)
def test_cost_of_all_reduces(size: int) -> None:
    count = 8 * 9 * 5 * 7  # a multiple of every size
    nbytes = 8 * count

    def body_of(name: str) -> Callable[[Lane], tuple[Steps, Array]]:
        def body(lane: Lane) -> tuple[Steps, Array]:
            out = np.empty(count)
            return ALL_REDUCES[name](lane, values(lane.rank, count), out, SUM), out

        return body

    for name in ("ring", "rank order"):
        for run in play(size, body_of(name)):
            assert len(run.sent) == 2 * (size - 1)
            assert sum(run.sent) == 2 * (size - 1) * nbytes // size
    for run in play(size, body_of("recursive doubling")):
        rounds = size.bit_length() - 1
        power = size == 1 << rounds
        assert len(run.sent) == rounds if power else len(run.sent) <= rounds + 2
        assert set(run.sent) <= {nbytes}


@pytest.mark.parametrize(
    ("count", "dtype", "messages"),
    [
        (2, np.float64, 2),
        (256, np.float64, 2),
        (257, np.float64, 6),
        (2, np.float16, 6),
        (2, BFLOAT16, 6),
    ],
)
def test_which_all_reduce(count: int, dtype: Any, messages: int) -> None:
    """Few rounds for short arrays, few bytes for long ones, rank order for halves."""

    def body(lane: Lane) -> tuple[Steps, Array]:
        out = np.empty(count, dtype)
        return algorithms.all_reduce(lane, values(lane.rank, count, dtype), out, SUM), out

    for run in play(4, body):
        assert len(run.sent) == messages
        expected = total(4, count, SUM, np.float32)
        np.testing.assert_array_equal(run.result.astype(np.float32), expected)


@pytest.mark.parametrize("size", SIZES)
def test_reduce_of_a_long_array(size: int) -> None:
    count, root = 5040, size - 1

    def body(lane: Lane) -> tuple[Steps, Array]:
        out = np.empty(count) if lane.rank == root else None
        steps = algorithms.reduce(lane, values(lane.rank, count), out, MEAN, root)
        return steps, np.empty(0) if out is None else out

    runs = play(size, body)
    np.testing.assert_allclose(runs[root].result, total(size, count, MEAN), rtol=1e-15)
    for rank, run in enumerate(runs):
        assert len(run.sent) == size - (rank == root)
        assert sum(run.sent) == 8 * count - (rank == root) * 8 * count // size


def shares(size: int) -> list[int]:
    return [(3, 0, 5, 1)[rank % 4] for rank in range(size)]


def part(x: Array, counts: Sequence[int], rank: int) -> Array:
    return x[sum(counts[:rank]) : sum(counts[: rank + 1])]


@pytest.mark.parametrize("size", SIZES)
def test_gathers(size: int) -> None:
    counts = shares(size)
    whole = np.concatenate([values(rank, counts[rank]) for rank in range(size)])
    root = size // 2

    def gather(lane: Lane) -> tuple[Steps, Array]:
        out = np.empty(sum(counts)) if lane.rank == root else None
        x = values(lane.rank, counts[lane.rank])
        return algorithms.linear_gather(lane, x, out, counts, root), whole if out is None else out

    def all_gather(lane: Lane) -> tuple[Steps, Array]:
        out = np.empty(sum(counts))
        x = values(lane.rank, counts[lane.rank])
        return algorithms.ring_all_gather(lane, x, out, counts), out

    def in_place(lane: Lane) -> tuple[Steps, Array]:
        out = np.where(np.arange(sum(counts)) < 0, 0.0, np.nan)
        part(out, counts, lane.rank)[...] = values(lane.rank, counts[lane.rank])
        return algorithms.ring_all_gather(lane, None, out, counts), out

    for rank, run in enumerate(play(size, gather)):
        np.testing.assert_array_equal(run.result, whole)
        assert run.sent == ([] if rank == root else [8 * counts[rank]])
    for body in (all_gather, in_place):
        for rank, run in enumerate(play(size, body)):
            np.testing.assert_array_equal(run.result, whole)
            assert len(run.sent) == size - 1
            # Everything passes through here but the next rank's own part.
            assert sum(run.sent) == (8 * (sum(counts) - counts[(rank + 1) % size])) * (size > 1)


@pytest.mark.parametrize("size", SIZES)
def test_scatters(size: int) -> None:
    counts = shares(size)
    root = size - 1
    whole = values(99, sum(counts))

    def scatter(lane: Lane) -> tuple[Steps, Array]:
        out = np.empty(counts[lane.rank])
        x = whole if lane.rank == root else None
        return algorithms.linear_scatter(lane, x, out, counts, root), out

    def reduce_scatter(lane: Lane) -> tuple[Steps, Array]:
        out = np.empty(counts[lane.rank])
        x = values(lane.rank, sum(counts))
        return algorithms.pairwise_reduce_scatter(lane, x, out, counts, MEAN), out

    for rank, run in enumerate(play(size, scatter)):
        np.testing.assert_array_equal(run.result, part(whole, counts, rank))
        assert len(run.sent) == (size - 1 if rank == root else 0)
    mean = total(size, sum(counts), MEAN)
    for rank, run in enumerate(play(size, reduce_scatter)):
        np.testing.assert_allclose(run.result, part(mean, counts, rank), rtol=1e-15)
        assert len(run.sent) == size - 1
        assert sum(run.sent) == 8 * (sum(counts) - counts[rank])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
def test_all_to_all(size: int, mode: Mode) -> None:
    counts = [[(source + 2 * dest) % 4 for dest in range(size)] for source in range(size)]

    def body(lane: Lane) -> tuple[Steps, Array]:
        sent = counts[lane.rank]
        received = [counts[source][lane.rank] for source in range(size)]
        out = np.empty(sum(received))
        x = values(lane.rank, sum(sent))
        return algorithms.pairwise_all_to_all(lane, x, out, sent, received), out

    for rank, run in enumerate(play(size, body, mode)):
        expected = [
            part(values(source, sum(counts[source])), counts[source], rank)
            for source in range(size)
        ]
        np.testing.assert_array_equal(run.result, np.concatenate(expected))
        assert sorted(run.sent) == sorted(8 * counts[rank][d] for d in range(size) if d != rank)


def test_a_barrier_holds_everybody() -> None:
    """Nobody is through before the last has begun."""
    entered: list[int] = []

    def on_rank(group: ProcessGroup) -> int:
        if group.rank == 2:
            time.sleep(0.05)
        entered.append(group.rank)
        StepsWork(algorithms.dissemination_barrier(Lane(group.transport, LANE))).wait(20)
        return len(entered)

    assert run_ranks(5, on_rank) == [5] * 5
