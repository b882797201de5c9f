"""The same checks on real ranks, in one module because each module costs a start of mpirun."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.collectives import broadcast_object
from mpidist.errors import CollectiveMismatchError
from mpidist.parallel import BucketSizes, GradScaler
from tests.parallel.checks import (
    DIFFERENCES,
    TINY,
    check_difference,
    check_means,
    check_reduction,
    check_running,
    example,
    scaled_step,
    some_optimizers,
    train_norm,
)
from tests.parallel.joined_batch import SHARES, check_joined
from tests.parallel.tensor import CASES as MODELS
from tests.parallel.tensor import check_case, check_pipeline, check_resumed, save_half_way
from tests.parallel.training import CASES, assert_close, train_alone, train_rank

on_ranks = pytest.mark.ranks(2, 3, 4)


@pytest.mark.ranks(3, full=(2, 4))
@pytest.mark.parametrize("case", CASES)
@some_optimizers
def test_ddp_equals_one_process_on_the_joined_batch(world, case, optimizer):
    mine = train_rank(world, CASES[case], optimizer)
    everyone = world.mpi_comm.allgather(mine.digests)
    assert everyone == [mine.digests] * world.size
    assert_close(mine.state, train_alone(CASES[case], optimizer))


@on_ranks
@pytest.mark.parametrize("op", [MEAN, SUM])
@pytest.mark.parametrize("sizes", [TINY, BucketSizes()], ids=["tiny", "default"])
def test_ranks_may_finish_their_gradients_in_any_order(world, op, sizes):
    check_reduction(world, op, sizes)


@on_ranks
def test_running_statistics_are_rank_0s_after_each_step(world):
    check_running(world.mpi_comm.allgather(train_norm(world)))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SHARES)
def test_a_synchronised_norm_normalises_the_joined_batch(world, name, dtype):
    check_joined(world, name, dtype)


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_named_on_every_rank(world, name):
    def run(_, make):
        with pytest.raises(CollectiveMismatchError) as info:
            make(world)
        return world.mpi_comm.allgather(str(info.value))

    check_difference(world.size, run, name)


@on_ranks
def test_means_are_weighted_over_samples_and_ranks(world):
    check_means(world)


@on_ranks
def test_ranks_decide_together_whether_a_step_counts(world):
    scaler = GradScaler(world, initial=8)
    assert not scaled_step(scaler, np.inf if world.rank == 1 else 1.0)[0]
    assert scaled_step(scaler, 1.0)[0]
    assert scaler.factor == 4.0


@pytest.mark.ranks(2, full=(3, 4))
@pytest.mark.parametrize("name", MODELS)
def test_a_model_cut_over_ranks_trains_as_one_process_does(world, name):
    check_case(world, name)


@pytest.mark.full
@pytest.mark.ranks(4, 8)
def test_stages_of_a_pipeline_may_be_cut_over_ranks(world):
    check_pipeline(world)


@pytest.mark.full
@pytest.mark.ranks(3)
def test_a_model_cut_over_ranks_goes_on_whole(world, tmp_path):
    directory = Path(broadcast_object(str(tmp_path), world))  # rank 0's, on all
    save_half_way(world, directory)
    check_resumed(world, directory, cut=True)
    check_resumed(world, directory, cut=False)


@pytest.mark.full  # test_examples on simulated ranks and tests/docs on four real ones ask the same
@pytest.mark.ranks(3)
@pytest.mark.parametrize("name", ["01_gradient_reducer.py", "02_ddp.py"])
def test_an_example_ends_with_the_same_loss_everywhere(world, name):
    loss, _ = example(name)(world)
    assert world.mpi_comm.allgather(loss) == [loss] * world.size
