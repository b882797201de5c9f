"""Meshes and DTensor on real ranks, in one module because each costs a start of mpirun."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

import mpidist
from mpidist import DeviceMesh, DTensor, Partial, Replicate, Shard
from mpidist.collectives import all_gather_object
from mpidist.errors import CollectiveMismatchError
from tests.mesh.cases import CHOSEN, check_case, check_deadlines, some_case

pytestmark = pytest.mark.ranks(4)


def test_a_redistribution_is_numpys(world):
    for case in CHOSEN:
        check_case(world, case)
        check_case(world, case, immediate=True)


def test_random_redistributions_are_numpys(world, full):
    random = Random(4)
    for _ in range(400 if full else 40):
        case, immediate = some_case(random), random.random() < 0.5
        check_case(world, case, immediate=immediate)


def test_a_call_may_have_a_deadline_of_its_own(world):
    check_deadlines(world)


def test_sub_meshes_sum_and_are_closed_with_the_mesh(world):
    with DeviceMesh(world, dp=2, tp=-1) as mesh:
        rows, columns = mesh["tp"].group, mesh["dp"].group
        assert (rows.name, rows.ranks) == ("mesh/tp", mesh["tp"].ranks)
        assert mpidist.all_reduce(np.array(world.rank), columns) == sum(mesh["dp"].ranks)
        assert mesh.group is world
    with pytest.raises(mpidist.GroupBrokenError, match="closed"):
        mpidist.barrier(rows)


def test_sums_are_in_the_order_of_the_ranks_and_have_the_same_bits_everywhere(world):
    rng = np.random.default_rng(0)
    for size in (3, 5000, 300_000):  # below and above all crossovers of the sums of arrays
        parts = rng.normal(size=(4, size)).astype(np.float32)
        total = parts[0] + parts[1] + parts[2] + parts[3]
        mesh = DeviceMesh(world, all=4)
        registered = world.empty(size)
        registered[...] = parts[world.rank]
        # Where the summands lie is each rank's own business.
        x = DTensor(registered if world.rank % 2 else parts[world.rank], mesh, [Partial()])
        assert x.iredistribute([Replicate()]).wait().local.tobytes() == total.tobytes()
        assert x.full().tobytes() == total.tobytes()
        halves = x.iredistribute([Shard(0)]).wait()
        assert halves.full().tobytes() == total.tobytes()


def test_an_array_comes_from_the_root_and_goes_to_another_mesh(world):
    values = np.arange(35.0).reshape(7, 5)
    mesh, rows = DeviceMesh(world, dp=2, tp=2), DeviceMesh(world, all=4)
    x = DTensor.distribute(values if world.rank == 3 else None, mesh, [Shard(1), Shard(0)], root=3)
    y = x.redistribute([Shard(0)], mesh=rows)
    np.testing.assert_array_equal(y.local, np.array_split(values, 4)[world.rank])
    works = [y.iredistribute([Replicate()]), x.iredistribute([Replicate(), Shard(1)])]
    np.testing.assert_array_equal(works[1].wait().full(), values)
    np.testing.assert_array_equal(works[0].wait().local, values)


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("source", [Shard(0), Partial()])
def test_different_placements_are_named_on_every_rank_and_nothing_moves(world, source, immediate):
    mesh = DeviceMesh(world, all=4)
    x = DTensor.distribute(np.arange(16.0).reshape(4, 4), mesh, [source], root=None)
    target = [Replicate()] if world.rank == 1 else [Shard(1)]
    with pytest.raises(CollectiveMismatchError) as info:
        x.iredistribute(target).wait() if immediate else x.redistribute(target)
    messages = all_gather_object(str(info.value).partition(": ")[2], world)  # it can be used
    assert len(set(messages)) == 1
    assert "rank 1 called" in messages[0]
    asked = f"redistribute float64[4, 4] of [{source}] on (all=4) to [Replicate()]"
    assert asked in messages[0]


def test_what_is_wrong_on_one_rank_is_raised_on_all(world):
    mesh = DeviceMesh(world, all=4)
    with pytest.raises(mpidist.SizeMismatchError, match=r"rank 2 gave a part of shape \(4,\)"):
        DTensor(np.zeros(4 if world.rank == 2 else 3), mesh, [Shard(0)], shape=(12,))
    with pytest.raises(mpidist.UnsupportedOperationError, match="rank 2 of 4: local: expected"):
        DTensor([] if world.rank == 2 else np.zeros(3), mesh, [Shard(0)])
    assert DTensor(np.zeros(3), mesh, [Shard(0)]).shape == (12,)
