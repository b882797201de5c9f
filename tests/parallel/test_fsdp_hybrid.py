"""HYBRID_SHARD: split over the ranks of a node, whole on every node."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist._types import SUM
from mpidist.collectives import barrier, iall_reduce, ireduce_scatter
from mpidist.errors import (
    CollectiveMismatchError,
    InvalidWorldSizeError,
    UnsupportedOperationError,
)
from mpidist.mesh import DeviceMesh
from mpidist.nn import Linear, Mode, Sequential
from mpidist.optim import AdamW
from mpidist.parallel import FSDP, MemoryUse, ShardedOptimizer, ShardingStrategy, full_state_dict
from mpidist.parallel.sharded import gradients, stores
from mpidist.testing import DeliveryMode, Faults, run_ranks
from tests.parallel.fsdp import CASES, run_with_checkpoint, train
from tests.parallel.sharded import (
    RULES,
    alone,
    assert_same,
    give,
    joined,
    kept,
    mixture,
    summed,
    values,
    whole_numbers,
)
from tests.parallel.training import assert_close

HYBRID, NO_SHARD = ShardingStrategy.HYBRID_SHARD, ShardingStrategy.NO_SHARD
OFTEN = ("tied", "unused", "accumulated")


def on_nodes(size, per_node, body, *args):
    return run_ranks(size, body, *args, ranks_per_node=per_node, node_memory=True)


# -- it is DDP -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.full) for c in CASES]
)
def test_over_nodes_it_trains_as_ddp_does(case, full):
    for size, per_node in [(4, 2), (3, 1), *([(6, 3), (6, 2)] if full else [])]:
        expected = on_nodes(size, per_node, train, CASES[case], "ddp")[0]
        ranks = on_nodes(size, per_node, train, CASES[case], HYBRID)
        for got in ranks:
            assert_close(got, expected)
            assert_same(got, ranks[0])


@pytest.mark.parametrize("mode", DeliveryMode)
def test_messages_may_come_late(mode):
    options = {"mode": mode, "faults": Faults(delay=0.01), "ranks_per_node": 2}
    expected = on_nodes(4, 2, train, CASES["plain"], "ddp")[0]
    for node_memory in (True, False):
        for got in run_ranks(4, train, CASES["plain"], HYBRID, node_memory=node_memory, **options):
            assert_close(got, expected)


MESHES = {
    "by node": (2, DeviceMesh.by_node),
    "on one node": (None, lambda g: DeviceMesh(g, replicate=2, shard=2)),
    "along any dimensions": (None, lambda g: DeviceMesh(g, b=2, a=2)["a", "b"]),
    "one replica": (None, lambda g: DeviceMesh(g, replicate=1, shard=-1)),
    "one shard": (1, lambda g: DeviceMesh(g, replicate=-1, shard=1)),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_over_a_mesh_it_is_the_unsharded_optimizer_bit_by_bit(mesh):
    """With whole numbers, whose sums have one value in any order."""
    per_node, make = MESHES[mesh]
    expected, unsharded = alone(RULES["momentum"], 4, 4)
    total = summed(mixture(), 4, 0)
    norm = math.sqrt(sum(float((grad.astype(float) ** 2).sum()) for grad in total.values()))

    def body(group):
        model = mixture(group.rank)
        fsdp = FSDP(model, make(group), units=400, op=SUM)
        assert fsdp.strategy is HYBRID
        optimizer = ShardedOptimizer(fsdp, group, optimizer=RULES["momentum"])
        for step in range(4):
            give(optimizer, whole_numbers(model, group.rank, step))
            if step == 0:  # each element counts once
                assert fsdp.clip_grad_norm(1e9) == pytest.approx(norm)
            optimizer.step()
        found = values(model), full_state_dict(optimizer), kept(fsdp.state_dict())
        fsdp.close()
        return found

    ranks = on_nodes(4, per_node, body)
    for found, state, _ in ranks:
        assert_same(found, values(expected))
        assert_same(state, unsharded.state_dict())
    copies = {"one replica": 1, "one shard": 4}.get(mesh, 2)
    whole = joined([state for _, _, state in ranks], copies)
    del whole["buckets/order"]
    assert_same(whole, values(expected))


def test_over_a_mesh_of_three_dimensions_its_sub_meshes_train_apart():
    def body(group):
        mesh = DeviceMesh(group, apart=2, replicate=2, shard=2)["replicate", "shard"]
        model = mixture(group.rank)
        fsdp = FSDP(model, mesh, units=400, op=SUM)
        optimizer = ShardedOptimizer(fsdp, optimizer=RULES["momentum"])
        for step in range(2):
            give(optimizer, whole_numbers(model, mesh.group.rank, step))
            optimizer.step()
        return mesh.ranks[0], values(model)

    for first, found in on_nodes(8, None, body):
        expected, _ = alone(RULES["momentum"], 4, 2, model=mixture(first))
        assert_same(found, values(expected))


# -- without the sum over nodes --------------------------------------------------------------------


@pytest.mark.parametrize(("size", "per_node"), [(4, 2), (2, 1), (3, None)])
def test_the_sum_over_nodes_may_wait_for_the_last_micro_batch(size, per_node):
    """Of whole numbers, whose sums have one value in any order; one is unused but in the first."""

    def grads(model, rank, batch):
        given = whole_numbers(model, rank, batch)
        return {name: g for name, g in given.items() if name != "a" or batch == 0}

    def body(group):
        model = mixture()
        fsdp = FSDP(model, group, units=400, op=SUM, strategy=HYBRID)
        optimizer = ShardedOptimizer(fsdp, optimizer=RULES["momentum"])
        for _ in range(2):
            give(optimizer, grads(model, group.rank, 2))  # reduced over all, then others join it
            with fsdp.no_sync(nodes=True):
                for batch in (0, 1):
                    give(optimizer, grads(model, group.rank, batch))
                fsdp.wait()
            if fsdp._sharded.replicas is not None:
                with pytest.raises(RuntimeError, match="are summed within each node alone; run"):
                    optimizer.step()
                held = fsdp.memory_use().buffers
            give(optimizer, grads(model, group.rank, 3))
            optimizer.step()
            if fsdp._sharded.replicas is not None:
                assert fsdp.memory_use().buffers < held
        return values(model)

    expected = mixture()
    update = RULES["momentum"](expected.named_parameters())
    for _ in range(2):
        update.zero_grad()
        for name, p in expected.named_parameters():
            given = [grads(expected, r, b).get(name) for r in range(size) for b in range(4)]
            p.add_grad(sum(g for g in given if g is not None))
        update.step()
    for found in on_nodes(size, per_node, body):
        assert_same(found, values(expected))


def test_on_one_node_there_is_no_sum_over_nodes_to_leave_out():
    def body(group):
        model = mixture()
        fsdp = FSDP(model, group, units=400, op=SUM, strategy=HYBRID)
        optimizer = ShardedOptimizer(fsdp, optimizer=RULES["momentum"])
        with fsdp.no_sync(nodes=True):
            give(optimizer, whole_numbers(model, group.rank, 0))
            optimizer.step()
        return values(model)

    expected = mixture()
    update = RULES["momentum"](expected.named_parameters())
    for name, p in expected.named_parameters():
        given = [whole_numbers(expected, rank, 0).get(name) for rank in range(2)]
        if any(g is not None for g in given):
            p.add_grad(sum(g for g in given if g is not None))
    update.step()
    for found in on_nodes(2, None, body):
        assert_same(found, values(expected))


def test_inside_no_message_goes_to_another_node(monkeypatch):
    over = []

    def recorded(x, group, **options):
        over.append(group.num_nodes)
        return iall_reduce(x, group, **options)

    def body(group):
        model = mixture()
        fsdp = FSDP(model, group, units=400, op=SUM, strategy=HYBRID)
        optimizer = ShardedOptimizer(fsdp, optimizer=RULES["momentum"])
        give(optimizer, whole_numbers(model, group.rank, 0))
        fsdp.wait()
        optimizer.zero_grad()
        barrier(group)
        if group.rank == 0:
            over.clear()
        barrier(group)
        with fsdp.no_sync(nodes=True):
            give(optimizer, whole_numbers(model, group.rank, 1))
            fsdp.wait()
        barrier(group)
        inside = [*over]
        barrier(group)
        give(optimizer, whole_numbers(model, group.rank, 2))
        fsdp.wait()
        return inside

    monkeypatch.setattr(gradients, "iall_reduce", recorded)
    for inside in on_nodes(4, 2, body):
        assert inside == [1] * 4  # the byte per parameter, on each rank
    assert 2 in over


def test_other_strategies_have_no_sum_over_nodes_to_leave_out():
    def body(group):
        fsdp = FSDP(model(), group, strategy=NO_SHARD)
        with (
            pytest.raises(UnsupportedOperationError, match="NO_SHARD has no such stage; use no_sy"),
            fsdp.no_sync(nodes=True),
        ):
            pass

    on_nodes(2, 1, body)


# -- what it keeps, and what moves -----------------------------------------------------------------


def test_parameters_never_travel(monkeypatch):
    def travels(*_, **__):
        raise AssertionError("slices of parameters are gathered")

    monkeypatch.setattr(stores, "all_gather", travels)
    on_nodes(4, 2, train, CASES["plain"], HYBRID)
    with pytest.raises(AssertionError, match="gathered"):
        on_nodes(4, 2, train, CASES["plain"], ShardingStrategy.SHARD_GRAD_OP)


def test_a_buffer_is_free_before_the_sum_over_nodes_has_come(monkeypatch):
    events = []

    def watched(start, word):
        def started(x, group, **options):
            work = start(x, group, **options)
            if group.ranks[group.rank] == 0 and x.dtype == np.float32:  # not the bytes of use
                number = sum(event == (word, event[1]) for event in events)
                events.append((word, number))
                finish = work.wait
                work.done = lambda: False
                work.wait = lambda timeout=None: (
                    events.append((f"{word} ends", number)),
                    finish(timeout),
                )
            return work

        return started

    monkeypatch.setattr(gradients, "ireduce_scatter", watched(ireduce_scatter, "scatter"))
    monkeypatch.setattr(gradients, "iall_reduce", watched(iall_reduce, "sum"))

    def body(group):
        fsdp = FSDP(layers(4), DeviceMesh.by_node(group), units=4 * 64 * 64)
        y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(training=True))
        fsdp.backward(ctx, np.ones_like(y))

    on_nodes(4, 2, body)
    assert events == [
        *(("scatter", 0), ("scatter", 1)),
        *(("scatter ends", 0), ("sum", 0), ("scatter", 2)),
        *(("scatter ends", 1), ("sum", 1), ("scatter", 3)),
        *(("scatter ends", 2), ("sum", 2), ("scatter ends", 3), ("sum", 3)),
        *(("sum ends", number) for number in range(4)),
    ]


def layers(count):
    rng = np.random.default_rng(0)
    return Sequential(*(Linear(64, 64, rng=rng, bias=False) for _ in range(count)))


def test_the_ledger_says_a_share_of_the_node_and_two_units():
    unit = 4 * 64 * 64

    def body(group):
        fsdp = FSDP(layers(8), DeviceMesh.by_node(group), units=unit)
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.1))
        y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(training=True))
        optimizer.backward(ctx, np.ones_like(y))
        optimizer.step()
        return optimizer.memory_use()

    share = 8 * unit // 2
    expected = MemoryUse(share, share, 2 * share, 2 * unit, 2 * unit)
    assert on_nodes(4, 2, body) == [expected] * 4


@pytest.mark.parametrize(("saves", "loads"), [(HYBRID, None), (None, HYBRID), (HYBRID, HYBRID)])
def test_a_run_goes_on_from_the_checkpoint_of_another(saves, loads, tmp_path):
    expected = on_nodes(4, 2, run_with_checkpoint, None, range(4), tmp_path / "whole")[0]
    on_nodes(4, 2, run_with_checkpoint, saves, range(2), tmp_path / "half")
    for got in on_nodes(4, 2, run_with_checkpoint, loads, range(2, 4), tmp_path / "half"):
        assert_close(got, expected)


def test_a_checkpoint_holds_each_element_once(tmp_path):
    def saved(strategy):
        directory = tmp_path / str(strategy)
        on_nodes(4, 2, run_with_checkpoint, strategy, range(2), directory)
        assert checkpoint.verify(directory) is not None
        return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())

    # Not twice, as it is held: the same but for what the files say of themselves.
    assert saved(HYBRID) == pytest.approx(saved(None), rel=0.1)


# -- refused ---------------------------------------------------------------------------------------


def model():
    return Sequential(Linear(4, 5, rng=0), Linear(5, 3, rng=1))


@pytest.mark.parametrize(
    ("error", "match", "size", "per_node", "make"),
    [
        (
            InvalidWorldSizeError,
            r"equally many ranks; node 0 has 3 of the group and node 1 has 2 \(rank 3, 4\)",
            *(5, 3, lambda g: FSDP(model(), g, strategy=HYBRID)),
        ),
        (
            UnsupportedOperationError,
            r"two dimensions for HYBRID_SHARD.*got HYBRID_SHARD and DeviceMesh\(a=2, b=1, c=2\)",
            *(4, None, lambda g: FSDP(model(), DeviceMesh(g, a=2, b=1, c=2), strategy=HYBRID)),
        ),
        (
            UnsupportedOperationError,
            r"one for the other strategies; got NO_SHARD and DeviceMesh\(a=2, b=2\)",
            *(4, None, lambda g: FSDP(model(), DeviceMesh(g, a=2, b=2), strategy=NO_SHARD)),
        ),
        (
            UnsupportedOperationError,
            r"along 'shard', the second dimension, are on several.*shard=4 across nodes",
            *(4, 2, lambda g: FSDP(model(), DeviceMesh(g, replicate=1, shard=4))),
        ),
        (
            CollectiveMismatchError,
            r"argument 'mesh' is \(a=1, b=4\) on rank 1 and \(a=2, b=2\) on rank 0",
            *(4, None, lambda g: FSDP(model(), DeviceMesh(g, a=2 - (g.rank == 1), b=-1))),
        ),
        (
            CollectiveMismatchError,
            "argument 'strategy' is ShardingStrategy.HYBRID_SHARD on rank 1",
            *(4, 2, lambda g: FSDP(model(), g, strategy=HYBRID if g.rank == 1 else NO_SHARD)),
        ),
    ],
    ids=["uneven nodes", "three dimensions", "no hybrid", "across nodes", "sizes", "strategies"],
)
def test_what_is_refused_on_all_ranks(error, match, size, per_node, make):
    def body(group):
        with pytest.raises(error, match=match):
            make(group)

    on_nodes(size, per_node, body)


def test_a_mesh_of_one_dimension_is_its_group():
    def body(group):
        fsdp = FSDP(model(), DeviceMesh(group, dp=2, tp=2)["dp"])
        assert fsdp.strategy is ShardingStrategy.FULL_SHARD
        return fsdp.group.size

    assert on_nodes(4, None, body) == [2] * 4
