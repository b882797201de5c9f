"""Training over two hosts that share nothing but a network."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist._types import SUM, Array
from mpidist.collectives import all_gather_object, barrier, broadcast_object
from mpidist.group import ProcessGroup
from mpidist.parallel import FSDP, Precision, ShardedOptimizer, ShardingStrategy
from tests.parallel import fsdp
from tests.parallel.joined_batch import check_joined
from tests.parallel.sharded import (
    RULES,
    Given,
    alone,
    assert_same,
    give,
    mixture,
    summed,
    values,
    whole_numbers,
)
from tests.parallel.training import CASES, assert_close, train_alone, train_rank

pytestmark = pytest.mark.hosts(2)

FULL, HYBRID = ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD


def test_ddp_equals_one_process_on_the_joined_batch(world: ProcessGroup) -> None:
    mine = train_rank(world, CASES["everything"], "adamw")
    assert all_gather_object(mine.digests, world) == [mine.digests] * world.size
    assert_close(mine.state, train_alone(CASES["everything"], "adamw"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_synchronised_norm_normalises_the_joined_batch(world: ProcessGroup, dtype: str) -> None:
    check_joined(world, "one has none", dtype)


@pytest.fixture
def directory(world: ProcessGroup) -> Iterator[str]:
    """One directory, which all ranks see: hosts have the machine's file systems."""
    made = broadcast_object(tempfile.mkdtemp() if world.rank == 0 else None, world)
    yield made
    barrier(world)
    if world.rank == 0:
        shutil.rmtree(made)


def check_trained(
    world: ProcessGroup, case: str, kind: Any, reference: str = "ddp", **options: Any
) -> None:
    """Compare parameters after some steps with those of a plainer strategy, and over the ranks."""
    expected = fsdp.train(world, fsdp.CASES[case], reference)
    got = fsdp.train(world, fsdp.CASES[case], kind, **options)
    assert_close(got, expected)
    for theirs in all_gather_object(got, world):
        assert_same(theirs, got)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case == "tied" else pytest.mark.full)
        for case in ("plain", "tied", "unused", "recomputed", "no_sync", "accumulated", "halves")
    ],
)
@pytest.mark.parametrize("strategy", [FULL, HYBRID], ids=str)
def test_fsdp_trains_as_ddp_does(
    world: ProcessGroup, strategy: ShardingStrategy, case: str
) -> None:
    check_trained(world, case, strategy)


@pytest.mark.full
def test_fsdp_is_the_slow_form(world: ProcessGroup) -> None:
    check_trained(world, "tied", FULL, "naive")


def test_parameters_of_fsdp_may_be_in_a_file_on_each_host(
    world: ProcessGroup, directory: str
) -> None:
    check_trained(world, "tied", HYBRID, offload=directory)


@pytest.mark.parametrize("strategy", [pytest.param(FULL, marks=pytest.mark.full), HYBRID], ids=str)
def test_layers_of_fsdp_may_compute_in_single_precision(
    world: ProcessGroup, strategy: ShardingStrategy
) -> None:
    """Both round the same parameters, but for sums in another order; see the other tests."""
    precision = Precision(np.float32, np.float64, np.float64)
    trained = partial(fsdp.train, world, fsdp.CASES["tied"], precision=precision)
    expected, got = trained("naive"), trained(strategy)
    assert {array.dtype for array in got.values()} == {np.dtype(np.float32)}
    assert_close(got, {name: a.astype(np.float32) for name, a in expected.items()}, rtol=1e-6)
    for theirs in all_gather_object(got, world):
        assert_same(theirs, got)


def test_the_sum_over_hosts_may_wait_for_the_last_micro_batch(world: ProcessGroup) -> None:
    """Of whole numbers, whose sums have one value in any order."""

    def total(model: Given, size: int, step: int) -> dict[str, Array]:
        each = [summed(model, size, 3 * step + i) for i in range(3)]
        return {name: sum(grads[name] for grads in each) for name in each[0]}

    expected, _ = alone(RULES["momentum"], world.size, 2, gradients=total)
    model = mixture(world.rank)
    with FSDP(model, world, units=400, op=SUM, strategy=HYBRID) as hybrid:
        optimizer = ShardedOptimizer(hybrid, optimizer=RULES["momentum"])
        for batch in range(6):
            last = batch % 3 == 2
            with nullcontext() if last else hybrid.no_sync(nodes=True):
                give(optimizer, whole_numbers(model, world.rank, batch))
            if last:
                optimizer.step()
        assert_same(values(model), values(expected))


def test_a_sharded_optimizer_goes_on_from_its_checkpoint(
    world: ProcessGroup, directory: str
) -> None:
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
