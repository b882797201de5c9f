"""Training over two hosts that share nothing but a network: one test for each strategy."""

from __future__ import annotations

import shutil
import tempfile

import pytest

from mpidist import checkpoint
from mpidist._types import SUM
from mpidist.collectives import all_gather_object, barrier, broadcast_object
from mpidist.group import ProcessGroup
from mpidist.parallel import ShardedOptimizer, ShardingStrategy
from tests.parallel import fsdp
from tests.parallel.joined_batch import check_joined
from tests.parallel.sharded import RULES, alone, assert_same, give, mixture, values, whole_numbers
from tests.parallel.training import CASES, assert_close, train_alone, train_rank

pytestmark = pytest.mark.hosts(2)


def test_ddp_equals_one_process_on_the_joined_batch(world: ProcessGroup) -> None:
    mine = train_rank(world, CASES["everything"], "adamw")
    assert all_gather_object(mine.digests, world) == [mine.digests] * world.size
    assert_close(mine.state, train_alone(CASES["everything"], "adamw"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_synchronised_norm_normalises_the_joined_batch(world: ProcessGroup, dtype: str) -> None:
    check_joined(world, "one has none", dtype)


def test_fsdp_shards_in_each_host_and_replicates_over_them(world: ProcessGroup) -> None:
    case = fsdp.CASES["tied"]
    expected = fsdp.train(world, case, "ddp")
    got = fsdp.train(world, case, ShardingStrategy.HYBRID_SHARD)
    assert_close(got, expected)
    for theirs in all_gather_object(got, world):
        assert_same(theirs, got)


def test_fsdp_shards_over_all_hosts_and_gathers_units(world: ProcessGroup) -> None:
    case = fsdp.CASES["tied"]
    expected = fsdp.train(world, case, "ddp")
    got = fsdp.train(world, case, ShardingStrategy.FULL_SHARD)
    assert_close(got, expected)
    for theirs in all_gather_object(got, world):
        assert_same(theirs, got)


def test_a_sharded_optimizer_goes_on_from_its_checkpoint(world: ProcessGroup) -> None:
    directory = broadcast_object(tempfile.mkdtemp() if world.rank == 0 else None, world)
    expected, _ = alone(RULES["adamw"], world.size, 4)
    for first in (0, 2):
        model = mixture(seed=first)  # the second one's values come from the file
        with ShardedOptimizer(model, world, optimizer=RULES["adamw"], op=SUM) as optimizer:
            state = {"model": optimizer.model_state, "optimizer": optimizer}
            if first:
                assert checkpoint.load(directory, state, world).step == first
            for step in (first, first + 1):
                give(optimizer, whole_numbers(model, world.rank, step))
                optimizer.step()
            checkpoint.save(directory, state, world, step=first + 2)
            got = values(model)
    assert_same(got, values(expected))
    barrier(world)
    if world.rank == 0:
        shutil.rmtree(directory)
