"""The sharded optimizer on real ranks, whose parameters stand once per node."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mpidist._types import SUM
from mpidist.backends.mpi import backend as mpi
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    BucketSizes,
    ShardedOptimizer,
    clip_grad_norm,
    full_state_dict,
    memory_ledger,
    memory_use,
)
from tests._ranks.launcher import clean_environment
from tests.parallel.checks import some_optimizers
from tests.parallel.sharded import (
    WAYS,
    Given,
    digests_after_ddp,
    fill,
    give,
    large,
    train_sharded,
    whole_numbers,
)
from tests.parallel.training import CASES, assert_close, train_alone

on_ranks = pytest.mark.ranks(2, 3, 4)
ROOT = Path(__file__).parents[2]


@pytest.mark.ranks(3, full=(2, 4))
@pytest.mark.parametrize("way", WAYS)
@some_optimizers
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process_on_the_joined_batch(world, case, optimizer, way):
    mine = train_sharded(world, CASES[case], optimizer, way)
    assert_close(mine, train_alone(CASES[case], optimizer))


@on_ranks
def test_after_a_ddp_it_is_the_unsharded_optimizer_bit_by_bit(world):
    args = (world, CASES["tied weights"], "adamw")
    assert digests_after_ddp(*args, shard=True) == digests_after_ddp(*args, shard=False)


@on_ranks
@pytest.mark.parametrize("memory", ["shared", "refused"])
def test_large_buckets_equal_the_unsharded_optimizer_bit_by_bit(world, memory, monkeypatch):
    """Long enough for the direct path, and without any shared memory."""
    if memory == "refused":
        monkeypatch.setattr(mpi, "share", lambda *_: None)
    rule = partial(AdamW, lr=0.02, weight_decay=0.1)

    def start(rank):
        rng = np.random.default_rng(rank)
        return Given(a=rng.normal(size=(300, 301)), b=rng.normal(size=(7,)).astype(np.float32))

    model, expected = start(world.rank), start(0)
    alone = rule(expected.named_parameters())
    with ShardedOptimizer(
        model, world, optimizer=rule, op=SUM, sizes=BucketSizes(1 << 20, 1 << 20)
    ) as optimizer:
        assert optimizer.shared == (memory == "shared")
        for step in range(3):
            give(optimizer, whole_numbers(model, world.rank, step))
            optimizer.step()
            for name, p in expected.named_parameters():
                p.zero_grad()
                for rank in range(world.size):
                    p.add_grad(whole_numbers(expected, rank, step)[name])
            alone.step()
            for name, p in expected.named_parameters():
                np.testing.assert_array_equal(getattr(model, name).data, p.data)
        state = full_state_dict(optimizer)
        for key, value in alone.state_dict().items():
            np.testing.assert_array_equal(state[key], value)


@on_ranks
def test_nobody_writes_what_another_still_reads(world):
    """Breaks without the first barrier of a step."""
    model = Given(w=np.zeros(4096))
    with ShardedOptimizer(model, world, optimizer=partial(SGD, lr=1.0)) as optimizer:
        for step in range(3):
            give(optimizer, {"w": np.ones(4096)})
            optimizer.shards()  # so that only the barrier is left to wait for
            if world.rank == step % world.size:
                time.sleep(0.05)
                np.testing.assert_array_equal(model.w.data, -float(step))
            optimizer.step()


@on_ranks
def test_nobody_loads_what_another_still_reads(world):
    """Breaks without the first barrier of a load, and if slices were filled where they stand."""
    model = Given(w=np.zeros(4096))
    with ShardedOptimizer(model, world, optimizer=partial(SGD, lr=1.0)) as optimizer:
        for turn in range(3):
            if world.rank == turn % world.size:
                time.sleep(0.05)
                np.testing.assert_array_equal(model.w.data, float(turn))
            fill(optimizer.model_state, {"w": np.full(4096, turn + 1.0)})
            np.testing.assert_array_equal(model.w.data, turn + 1.0)


class SlowOnOneRank(SGD):
    """Comes late with its slice."""

    rank = 0

    def step(self):
        if self.rank == 1:
            time.sleep(0.05)
        super().step()


@on_ranks
def test_all_have_written_when_a_step_returns(world):
    """Breaks without the last barrier of a step."""
    model = Given(w=np.zeros(4096))
    with ShardedOptimizer(model, world, optimizer=partial(SlowOnOneRank, lr=1.0)) as optimizer:
        optimizer.optimizers[0].rank = world.rank
        for step in range(3):
            give(optimizer, {"w": np.ones(4096)})
            optimizer.step()
            np.testing.assert_array_equal(model.w.data, -1.0 - step)


@on_ranks
def test_the_norm_is_that_of_whole_gradients(world):
    model = Given(w=np.zeros((50, 3)), v=np.zeros(5))
    whole = {
        n: np.arange(p.size, dtype=float).reshape(p.shape) for n, p in model.named_parameters()
    }
    norm = np.sqrt(sum((grad**2).sum() for grad in whole.values()))
    with ShardedOptimizer(model, world, optimizer=partial(SGD, lr=1.0)) as optimizer:
        give(optimizer, whole)
        assert clip_grad_norm(optimizer.shards(), 1.0, group=world) == pytest.approx(norm)
        optimizer.step()
    np.testing.assert_allclose(model.w.data, -whole["w"] / norm, rtol=1e-12)


# -- memory ----------------------------------------------------------------------------------------


def settle_pages(model):
    """Touch every page of the parameters, and give back to the kernel what has been freed."""
    for parameter in model.parameters():
        parameter.data.sum()
    ctypes.CDLL(None).malloc_trim(0)  # the C library keeps freed memory for the next allocation


@pytest.mark.ranks(2, 4)
def test_parameters_stand_once_per_node(world):
    """By the ledger, and by the kernel: a page that n ranks see counts for an n-th in each."""
    model = Given(w=np.ones((8 << 20) + 5, np.float32))  # beside it all else is small
    whole = sum(p.data.nbytes for p in model.parameters())
    settle_pages(model)
    before = memory_ledger(memory_use(model, SGD(model.named_parameters(), lr=1.0)), world)
    assert before.rank.parameters == whole
    assert before.node.parameters == world.size * whole
    with ShardedOptimizer(model, world, optimizer=partial(SGD, lr=1.0)) as optimizer:
        settle_pages(model)
        after = memory_ledger(optimizer.memory_use(), world)
        assert whole <= after.node.parameters <= whole + 64 * len(list(model.parameters()))
        if before.node_pss is None:
            pytest.skip("the kernel does not tell the proportional set size")  # on all ranks
        fallen = before.node_pss - after.node_pss
        assert fallen == pytest.approx((world.size - 1) * whole, abs=0.25 * whole)


@pytest.mark.ranks(2, 4)
def test_each_rank_holds_its_part_of_the_state(world):
    model = large()
    whole = sum(p.data.nbytes for p in model.parameters())
    rule = partial(AdamW, lr=0.1)
    unsharded = memory_use(model, rule(model.named_parameters()))
    assert unsharded.optimizer_state == 2 * whole
    ddp = DDP(model, world)
    with ShardedOptimizer(ddp, world, optimizer=rule) as optimizer:
        ledger = memory_ledger(optimizer.memory_use(), world)
        assert ledger.node.optimizer_state == 2 * whole
        # A cache line per bucket and per parameter, in each of two arrays.
        assert abs(ledger.rank.optimizer_state - 2 * whole / world.size) <= 2 * 64 * 8
        assert ledger.rank.gradients == whole
    ddp.close()


@pytest.mark.ranks(2, 4)
def test_of_gradients_there_are_slices_and_two_buckets(world):
    model = large()
    largest = 4 * 1024 * 1027 + 4 * 1027
    whole = sum(p.data.nbytes for p in model.parameters())
    with ShardedOptimizer(
        model, world, optimizer=partial(SGD, lr=1.0), sizes=BucketSizes(1 << 20, 1 << 20)
    ) as optimizer:
        use = optimizer.memory_use()
        assert use.gradients == pytest.approx(whole / world.size, abs=64 * 8)
        assert use.buffers == use.peak_buffers == pytest.approx(2 * largest, abs=2 * 64 * 4)


# -- several nodes ---------------------------------------------------------------------------------

SEVERAL_NODES = """
import mpidist
from mpidist.parallel import memory_ledger, ShardedOptimizer
from tests.parallel.sharded import FACTORIES, large, train_sharded
from tests.parallel.training import CASES, assert_close, train_alone

with mpidist.init() as world:
    for case, optimizer, way in [
        ("everything", "adamw", "scattered"),
        ("tied weights", "sgd", "after ddp"),
    ]:
        assert_close(
            train_sharded(world, CASES[case], optimizer, way), train_alone(CASES[case], optimizer)
        )
    model = large()
    whole = sum(p.data.nbytes for p in model.parameters())
    with ShardedOptimizer(model, world, optimizer=FACTORIES["sgd"]) as optimizer:
        assert optimizer.shared
        ledger = memory_ledger(optimizer.memory_use(), world)
        assert whole <= ledger.node.parameters <= whole + 256, ledger
    world.print("equal, on node", world.node_rank, "of", world.num_nodes)
"""


@pytest.mark.mpirun
@pytest.mark.parametrize(("ranks", "nodes"), [(4, 2), (3, 2)])
def test_on_several_nodes_parameters_stand_once_on_each(mpirun, ranks, nodes):
    ended = subprocess.run(
        [*mpirun, "-n", str(ranks), sys.executable, "-c", SEVERAL_NODES],
        env=clean_environment() | {"PYTHONPATH": str(ROOT), "MPIDIST_RANKS_PER_NODE": "2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("equal, on node") == ranks
    assert f"of {nodes}" in ended.stdout
