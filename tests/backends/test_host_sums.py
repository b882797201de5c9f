"""Sums over several nodes: the values, the same bits on all ranks, and calls that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import HALVES, REDUCTIONS, ufunc_of
from mpidist.backends.node.host_sums import HostSums
from mpidist.backends.node.leaders import MOST_NODES, PAYLOAD_NBYTES
from mpidist.backends.node.sequencer import RING, supported
from mpidist.errors import CollectiveMismatchError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks

pytestmark = pytest.mark.skipif(not supported(), reason="this processor has no direct path")

PAIRS = sorted(REDUCTIONS, key=lambda pair: (pair[0].name, pair[1].name))

NODES = {"2 of 1": (2, 1), "4 of 1": (4, 1), "2 of 2": (4, 2), "2 and 1": (3, 2), "3, 3, 1": (7, 3)}
"""Ranks, and how many share a node."""

MOST = PAYLOAD_NBYTES // 8
"""Elements in float64 of the longest array that travels with the arrival to one other node."""


def on_nodes(nodes: str, body: Any, *args: Any) -> list[Any]:
    size, each = NODES[nodes]
    return run_ranks(size, body, *args, ranks_per_node=each, node_memory=True)


def given(rank: int, count: int, dtype: Any) -> Array:
    """Return small whole numbers, whose sums and products are exact in every dtype."""
    return np.random.default_rng([count, rank]).integers(0, 3, count).astype(dtype)


def combined(parts: list[Array], op: ReduceOp) -> Array:
    """Return the reduction in plain numpy: halves are rounded once."""
    wide = np.float32 if parts[0].dtype in HALVES else parts[0].dtype
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = ufunc_of(op)(total, part.astype(wide)).astype(wide)
    if op is ReduceOp.MEAN:
        total = (total / np.asarray(len(parts), wide)).astype(wide)
    return total.astype(parts[0].dtype)


def check_value(group: ProcessGroup, op: ReduceOp, dtype: Any, count: int) -> None:
    parts = [given(rank, count, dtype) for rank in range(group.size)]
    expected = combined(parts, op)
    mine = parts[group.rank].copy()
    np.testing.assert_array_equal(mpidist.all_reduce(mine, group, op=op), expected)
    np.testing.assert_array_equal(mine, parts[group.rank])
    mpidist.all_reduce(mine, group, op=op, out=mine)
    np.testing.assert_array_equal(mine, expected)


def check_pairs(group: ProcessGroup) -> None:
    assert type(group.transport.sums) is HostSums
    for op, dtype in PAIRS:
        check_value(group, op, dtype, 37)


def check_lengths(group: ProcessGroup) -> None:
    edges = [MOST // others + more for others in (1, 2, 3) for more in (0, 1)]
    for count in (0, 1, *edges, 300_001):
        check_value(group, ReduceOp.SUM, np.float64, count)
    check_value(group, ReduceOp.MEAN, np.float16, 4 * MOST)


@pytest.mark.parametrize("nodes", NODES)
def test_every_reduction_equals_numpy(nodes: str) -> None:
    on_nodes(nodes, check_pairs)


@pytest.mark.parametrize("nodes", NODES)
def test_arrays_of_every_length_equal_numpy(nodes: str) -> None:
    on_nodes(nodes, check_lengths)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("count", [1000, 100_000])
def test_all_ranks_have_the_same_bits_in_every_call(nodes: str, count: int) -> None:
    def body(group: ProcessGroup) -> set[bytes]:
        x = np.random.default_rng(group.rank).normal(size=count)
        return {mpidist.all_reduce(x, group).tobytes() for _ in range(3)}

    bits = on_nodes(nodes, body)
    assert len(set.union(*bits)) == 1


def test_more_nodes_than_leaders_send_to_sum_as_before() -> None:
    size = MOST_NODES + 1

    def body(group: ProcessGroup) -> None:
        assert group.transport.sums is None
        check_value(group, ReduceOp.SUM, np.float64, 100)

    run_ranks(size, body, ranks_per_node=1, node_memory=True)


@pytest.mark.parametrize("nodes", NODES)
def test_more_operations_are_under_way_than_there_are_slots(nodes: str) -> None:
    def body(group: ProcessGroup) -> None:
        works = [mpidist.iall_reduce(np.arange(3) + n, group) for n in range(2 * RING)]
        mpidist.barrier(group)
        for n, work in enumerate(works):
            np.testing.assert_array_equal(work.wait(), group.size * (np.arange(3) + n))

    on_nodes(nodes, body)


def other_shape(group: ProcessGroup, x: Array) -> None:
    mpidist.all_reduce(x[: x.size - (group.rank == 1)], group, out=x[: x.size - (group.rank == 1)])


def other_op(group: ProcessGroup, x: Array) -> None:
    op = ReduceOp.MAX if group.rank == 1 else ReduceOp.SUM
    mpidist.all_reduce(x, group, op=op, out=x)


def other_verb(group: ProcessGroup, x: Array) -> None:
    if group.rank == 1:
        mpidist.barrier(group)
    else:
        mpidist.all_reduce(x, group, out=x)


def much_longer(group: ProcessGroup, x: Array) -> None:
    if group.rank == 1:
        mpidist.all_reduce(np.zeros(4 * MOST), group)
    else:
        mpidist.all_reduce(x, group, out=x)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("count", [100, 4 * MOST + 1])
@pytest.mark.parametrize("call", [other_shape, other_op, other_verb, much_longer])
def test_calls_that_differ_leave_every_array_as_it_was(call: Any, count: int, nodes: str) -> None:
    def body(group: ProcessGroup) -> str:
        x = given(group.rank, count, np.float64)
        mpidist.all_reduce(x, group)  # so that like calls are prepared
        with pytest.raises(CollectiveMismatchError, match="rank 1 called") as info:
            call(group, x)
        np.testing.assert_array_equal(x, given(group.rank, count, np.float64))
        check_value(group, ReduceOp.SUM, np.float64, count)  # the group is as good as before
        return str(info.value).partition(": the ranks")[2]

    assert len(set(on_nodes(nodes, body))) == 1


@pytest.mark.ranks(4)
@pytest.mark.parametrize("each", [1, 2, 3])
def test_processes_on_pretended_nodes(
    world: ProcessGroup, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", str(each))
    with world.duplicate(f"nodes of {each}") as group:
        check_pairs(group)
        check_lengths(group)


@pytest.mark.hosts(2)
def test_processes_on_hosts(world: ProcessGroup) -> None:
    check_pairs(world)
    check_lengths(world)
