"""Random states on real ranks: saved by some of them, and loaded by others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.collectives import barrier, broadcast_object
from mpidist.errors import CheckpointError, CollectiveMismatchError
from tests.checkpoint.cases import (
    check_files,
    load_case,
    save_case,
    small_sizes,
    some_case,
)


@pytest.fixture
def path(world):
    """A directory that all ranks see."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(broadcast_object(own, world))
        barrier(world)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("seed", range(2))
def test_any_number_saves_and_any_number_loads(world, path, seed):
    """The groups are the first ranks of the job, in every pair of numbers."""
    groups = [world.new_group(range(size)) for size in range(1, world.size + 1)]
    for savers, saving in enumerate(groups, 1):
        for loaders, loading in enumerate(groups, 1):
            random = Random(f"{seed} {savers} {loaders}")
            case = some_case(random, savers, loaders)
            where = path / f"{savers}-{loaders}"
            sizes = [(1 << 18, 1 << 12, 1 << 20), (64, 8, 32), (16, 4, 32)][random.randrange(3)]
            with small_sizes(*sizes):
                if saving is not None:
                    save_case(saving, case, where)
                barrier(world)
                if loading is not None:
                    load_case(loading, case, where)
                if world.rank == 0:
                    check_files(case, where)
    for group in groups:
        if group is not None:
            group.close()


@pytest.mark.ranks(4)
@pytest.mark.hosts(2)
def test_saves_beside_the_program(world, path):
    x = np.zeros((300, 400))
    futures = []
    for step in range(4):
        x += 1
        futures.append(checkpoint.save_async(path, {"x": x}, world, step=step, in_flight=2))
    x[...] = 0
    assert checkpoint.load(path, {"x": x}, world).step == 3
    assert (x == 4).all()
    assert all(future.done() for future in futures)
    for step in range(4):
        assert (checkpoint.load_full(path, step=step)["x"] == step + 1).all()


@pytest.mark.ranks(4)
def test_errors_have_the_same_words_on_all_ranks(world, path):
    words = []
    checkpoint.save(path, {"x": np.zeros(3)}, world, step=1)
    with pytest.raises(CollectiveMismatchError) as caught:
        checkpoint.save(path, {"x": np.zeros(3 + world.rank)}, world, step=2)
    words.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(path, {"x": np.zeros(3)}, world, step=1)
    words.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, {"x": np.zeros(3 + world.rank // 2)}, world)
    words.append(str(caught.value))
    assert broadcast_object(words, world) == words
    assert [found.step for found in checkpoint.list(path)] == [1]
