"""The direct path over several nodes: one machine pretends to be some, even and uneven ones."""

from __future__ import annotations

import numpy as np
import pytest

import mpidist
from mpidist._types import ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, HALVES, REDUCTIONS, ufunc_of
from mpidist.backends.node.sequencer import supported
from mpidist.backends.node.topology import NodeTopology
from mpidist.errors import CollectiveMismatchError

PAIRS = sorted(REDUCTIONS, key=lambda pair: (pair[0].name, pair[1].name))

COUNT = 40_003

pytestmark = pytest.mark.skipif(not supported(), reason="this processor has no direct path")


@pytest.fixture(params=[2, 3])
def group(world, monkeypatch, request):
    """A group whose nodes have so many ranks, the last one perhaps fewer."""
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", str(request.param))
    group = world.duplicate(f"nodes of {request.param}")
    yield group
    group.close()


def registered(group, x):
    buffer = group.empty(x.shape, x.dtype)
    assert group.transport.node_memory.registered.find(buffer.reshape(-1)) is not None
    buffer[...] = x
    return buffer


def values(group, dtype, *, rank=None, count=COUNT):
    """Small whole numbers, whose sums and products are exact in every dtype."""
    rank = group.rank if rank is None else rank
    return np.random.default_rng([count, rank]).integers(0, 3, count).astype(dtype)


def combined(parts, op):
    wide = np.float32 if parts[0].dtype in HALVES else parts[0].dtype
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = ufunc_of(op)(total, part.astype(wide)).astype(wide)
    if op is ReduceOp.MEAN:
        total = (total / np.asarray(len(parts), wide)).astype(wide)
    return total.astype(parts[0].dtype)


@pytest.mark.ranks(4, full=(3,))
def test_every_reduction_equals_numpy(group):
    for op, dtype in PAIRS:
        parts = [values(group, dtype, rank=rank) for rank in range(group.size)]
        buffer = registered(group, parts[group.rank])
        expected = combined(parts, op)
        shares = [COUNT // group.size] * group.size
        shares[0] += COUNT % group.size
        out = mpidist.reduce_scatter(buffer, group, op=op, counts=shares)
        mine = slice(sum(shares[: group.rank]), sum(shares[: group.rank + 1]))
        np.testing.assert_array_equal(out, expected[mine], err_msg=f"{op} {dtype}")
        np.testing.assert_array_equal(buffer, parts[group.rank])
        mpidist.iall_reduce(buffer, group, op=op, out=buffer).wait()
        np.testing.assert_array_equal(buffer, expected, err_msg=f"{op} {dtype}")


@pytest.mark.ranks(3, 4)
def test_broadcast_and_all_gather_from_everywhere(group):
    for root in range(group.size):
        buffer = registered(group, values(group, np.float64))
        mpidist.broadcast(buffer, group, root=root, out=buffer)
        np.testing.assert_array_equal(buffer, values(group, np.float64, rank=root))
    counts = [COUNT // 2, 0, COUNT // 3, 7][: group.size]
    total = sum(counts)
    mine = slice(sum(counts[: group.rank]), sum(counts[: group.rank + 1]))
    buffer = registered(group, np.full(total, -1.0))
    buffer[mine] = group.rank
    mpidist.all_gather(buffer[mine], group, out=buffer, counts=counts)
    np.testing.assert_array_equal(buffer, np.repeat(np.arange(group.size), counts))


@pytest.mark.ranks(3, 4)
def test_halves_are_rounded_once_and_all_ranks_have_the_same_bits(group):
    for dtype in (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)):
        parts = [
            np.random.default_rng(rank).standard_normal(COUNT).astype(dtype)
            for rank in range(group.size)
        ]
        buffer = registered(group, parts[group.rank])
        mpidist.all_reduce(buffer, group, out=buffer)
        exact = sum(part.astype(np.float64) for part in parts)
        if dtype in HALVES:
            # float32 sums of these are exact to far below half a unit of the last place.
            once = exact.astype(np.float32).astype(dtype)
            assert np.mean(buffer != once) < 1e-3
        eps = np.finfo(np.float32).eps if dtype not in HALVES else 2.0**-7
        scale = sum(np.abs(part.astype(np.float64)) for part in parts)
        assert (np.abs(buffer.astype(np.float64) - exact) <= group.size * eps * scale).all()
        everywhere = mpidist.all_gather(buffer.view(np.uint8)[None], group)
        assert (everywhere == everywhere[0]).all()
        again = registered(group, parts[group.rank])
        mpidist.all_reduce(again, group, out=again)
        assert again.tobytes() == buffer.tobytes()


@pytest.mark.ranks(3)
def test_infinities_are_results_whatever_numpy_is_told_to_do_about_them(group):
    with np.errstate(all="raise"):
        for dtype in (np.float16, np.float32):
            for value in (np.finfo(dtype).max, np.finfo(dtype).tiny):
                for op in (ReduceOp.SUM, ReduceOp.MEAN):
                    with np.errstate(all="ignore"):
                        expected = combined([np.full(1, value)] * group.size, op)[0]
                    buffer = registered(group, np.full(COUNT, value))
                    counts = (COUNT, *(0 for _ in range(group.size - 1)))
                    out = mpidist.reduce_scatter(buffer, group, op=op, counts=counts)
                    assert (out == expected).all()
                    mpidist.all_reduce(buffer, group, op=op, out=buffer)
                    assert (buffer == expected).all()


@pytest.mark.ranks(3, 4)
def test_many_outstanding_among_ordinary_ones(group):
    total = group.size * (group.size - 1) / 2
    buffers = [registered(group, np.full(COUNT, float(group.rank))) for _ in range(6)]
    works = []
    for buffer in buffers:
        works.append(mpidist.iall_reduce(buffer, group, out=buffer))
        works.append(mpidist.iall_reduce(np.full(COUNT, float(group.rank)), group))
        works.append(mpidist.iall_reduce(np.full(3, float(group.rank)), group))
    assert (mpidist.all_reduce(np.full(COUNT, float(group.rank)), group) == total).all()
    for place in np.random.default_rng(group.rank).permutation(len(works)):
        assert (works[place].wait() == total).all()


@pytest.mark.ranks(3, 4)
def test_a_mismatch_on_one_rank_of_one_node_raises_on_all(group):
    buffer = registered(group, np.full(COUNT, float(group.rank)))
    for odd in range(group.size):
        op = mpidist.MAX if group.rank == odd else mpidist.SUM
        with pytest.raises(CollectiveMismatchError, match="all_reduce"):
            mpidist.all_reduce(buffer, group, op=op, out=buffer)
        with pytest.raises(CollectiveMismatchError, match="all_reduce"):
            mpidist.iall_reduce(buffer, group, op=op, out=buffer).wait()
        x = buffer if group.rank != odd else buffer.copy()
        with pytest.raises(CollectiveMismatchError, match="all_reduce"):
            mpidist.all_reduce(x, group, out=x)
        assert (buffer == group.rank).all()
    mpidist.all_reduce(buffer, group, out=buffer)
    assert (buffer == group.size * (group.size - 1) / 2).all()


def test_who_is_whose_neighbour():
    topology = NodeTopology.of([7, 3, 7, 7, 3], 3)
    assert topology.nodes == ((0, 2, 3), (1, 4))
    assert (topology.local, topology.rank, topology.workers) == ((0, 2, 3), 2, 2)
    assert topology.cross_node_peers == ()
    assert NodeTopology.of([7, 3, 7, 7, 3], 4).cross_node_peers == (2, 4)
    assert [topology.node_of(rank) for rank in range(5)] == [0, 1, 0, 0, 1]
