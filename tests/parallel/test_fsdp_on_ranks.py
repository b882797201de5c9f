"""FSDP on real ranks: the bits of DDP, checkpoints of others, and what the kernel counts."""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.collectives import all_gather_object, broadcast_object
from mpidist.nn import Linear, Mode, Sequential
from mpidist.optim import AdamW
from mpidist.parallel import (
    FSDP,
    MemoryUse,
    ShardedOptimizer,
    ShardingStrategy,
    memory_ledger,
)
from tests.parallel.fsdp import CASES, STRATEGIES, run_with_checkpoint, train
from tests.parallel.sharded import assert_same
from tests.parallel.training import assert_close

on_ranks = pytest.mark.ranks(2, full=(1, 3, 4))


OFTEN = ("plain", "tied", "unused", "uneven, one rank empty", "no_sync", "halves")


@on_ranks
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.full) for c in CASES]
)
def test_it_trains_as_ddp_does(world, case, full):
    for dtype in (np.float64, np.float32) if full else (np.float64,):
        expected = train(world, CASES[case], "ddp", dtype)
        for strategy in STRATEGIES if full else (ShardingStrategy.FULL_SHARD,):
            got = train(world, CASES[case], strategy, dtype)
            if world.size <= CASES[case].exact:
                assert_same(got, expected)
            else:
                assert_close(got, expected, rtol={np.float64: 1e-12, np.float32: 1e-6}[dtype])


@pytest.mark.ranks(2, full=(4,))
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "tied" else pytest.mark.full) for c in CASES]
)
def test_on_pretended_nodes_it_trains_as_ddp_does(world, monkeypatch, case):
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", str(world.size // 2))
    with mpidist.init("mpi", timeout=20) as nodes:
        assert nodes.num_nodes == 2
        expected = train(nodes, CASES[case], "ddp")
        got = train(nodes, CASES[case], ShardingStrategy.HYBRID_SHARD)
        assert_close(got, expected)
        for theirs in all_gather_object(got, nodes):
            assert_same(theirs, got)


@pytest.mark.ranks(2, full=(3, 4))
@pytest.mark.parametrize("loads", [None, *STRATEGIES], ids=str)
def test_a_run_goes_on_from_the_checkpoint_of_another(world, loads, tmp_path):
    own = broadcast_object(str(tmp_path), world)  # rank 0's, on all
    expected = run_with_checkpoint(world, None, range(4), Path(own) / "whole")
    for saves in (None, ShardingStrategy.FULL_SHARD):
        directory = Path(own) / str(saves)
        run_with_checkpoint(world, saves, range(2), directory)
        assert_close(run_with_checkpoint(world, loads, range(2, 4), directory), expected)


# -- memory ----------------------------------------------------------------------------------------


def trim() -> None:
    """Give back what is free: the C library keeps it for the next allocation, after other tests."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


WIDE, COUNT = 1448, 25
UNIT = 4 * WIDE * WIDE
WHOLE = COUNT * UNIT


def held_after_a_step(world):
    """Return what the ledger says of the node, and the rise of what the kernel counts there."""
    assert WHOLE >= 199 << 20
    x = np.ones((1, WIDE), np.float32)
    trim()
    before = memory_ledger(MemoryUse(0, 0, 0), world)
    if before.node_pss is None:
        pytest.skip("the kernel does not tell the proportional set size")  # on all ranks
    rng = np.random.default_rng(0)
    model = Sequential(*(Linear(WIDE, WIDE, rng=rng, bias=False) for _ in range(COUNT)))
    fsdp = FSDP(model, world, units=UNIT)
    optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=1e-3))
    y, ctx = fsdp.forward(x, Mode(training=True))
    optimizer.backward(ctx, np.ones_like(y))
    optimizer.step()
    del y, ctx
    trim()
    after = memory_ledger(optimizer.memory_use(), world)
    return after.node, after.node_pss - before.node_pss


@pytest.mark.full
@pytest.mark.ranks(2, 4)
def test_the_kernel_counts_what_the_ledger_says(world):
    """The node's memory after a step, over what it is without a model, which has 200 MiB."""
    use, rise = held_after_a_step(world)
    assert use.parameters == use.gradients == WHOLE
    assert use.optimizer_state == 2 * WHOLE
    assert use.peak_buffers == world.size * 2 * UNIT
    assert rise == pytest.approx(use.total, rel=0.05)


@pytest.mark.full
@pytest.mark.ranks(2, 4)
def test_the_kernel_counts_what_the_ledger_says_where_units_are_gathered(world, monkeypatch):
    """On two pretended nodes, each of which holds half, and two units in slots."""
    per_node = world.size // 2
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", str(per_node))
    with mpidist.init("mpi", timeout=60) as nodes:
        assert nodes.num_nodes == 2
        use, rise = held_after_a_step(nodes)
    assert use.parameters == use.gradients == pytest.approx(WHOLE / 2, rel=1e-3)
    assert use.optimizer_state == 2 * use.gradients
    assert use.peak_buffers == per_node * 2 * UNIT + 2 * UNIT
    assert rise == pytest.approx(use.total, rel=0.05)
