"""DTensor of device arrays: over NCCL or its stub, and by way of the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from random import Random
from types import ModuleType

import numpy as np
import pytest

import mpidist
from mpidist import DeviceMesh, DTensor, Partial, Replicate, Shard
from mpidist.arrays.namespaces import BFLOAT16, is_device, to_host
from mpidist.backends.device.staging import HostStaging
from mpidist.errors import CollectiveMismatchError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests.mesh.cases import CHOSEN, Case, check_case, some_case


@pytest.fixture
def group(xp_with_nccl: ModuleType, rank_count: int) -> Iterator[ProcessGroup]:
    if rank_count > xp_with_nccl.cuda.runtime.getDeviceCount():
        pytest.skip(f"fewer GPUs than {rank_count}")
    with mpidist.init("hybrid") as world:
        yield world


def fewer(case: Case) -> Case:
    """Return a case of four ranks as one of two, on a mesh of as many dimensions."""
    sizes = tuple(2 if axis == len(case.sizes) - 1 else 1 for axis in range(len(case.sizes)))
    to = None if case.to is None else tuple([1] * (len(case.to) - 1) + [2])
    return Case(sizes, case.shape, case.source, case.target, case.dtype, to, case.turned, case.seed)


@pytest.mark.ranks(2)
def test_a_redistribution_is_numpys(group: ProcessGroup, xp_with_nccl: ModuleType) -> None:
    random = Random(1)
    for case in [*CHOSEN, *(some_case(random) for _ in range(20))]:
        if case.dtype != BFLOAT16:  # cupy has none
            check_case(group, fewer(case), xp_with_nccl, immediate=random.random() < 0.5)


@pytest.mark.ranks(2)
def test_arrays_of_a_device_stay_there(group: ProcessGroup, xp_with_nccl: ModuleType) -> None:
    mesh = DeviceMesh(group, all=2)
    values = np.arange(10.0).reshape(5, 2)
    given = xp_with_nccl.asarray(values) if group.rank == 1 else None
    x = DTensor.distribute(given, mesh, [Shard(0)], root=1)
    assert is_device(x.local)
    np.testing.assert_array_equal(to_host(x.local), np.array_split(values, 2)[group.rank])
    work = x.iredistribute([Replicate()])
    assert to_host(work.synchronize().local).tobytes() == values.tobytes()
    empty = DTensor.empty((3, 2), mesh, [Shard(1)], device="gpu")
    assert is_device(empty.local)
    assert empty.sharded().pieces[empty.box] is empty.local
    with pytest.raises(CollectiveMismatchError, match="different memory: rank 0: on the host"):
        DTensor(x.local if group.rank else to_host(x.local), mesh, [Shard(0)], shape=(5, 2))
    with pytest.raises(CollectiveMismatchError, match=r"rank 0 called redistribute .*Replicate"):
        x.redistribute([Shard(1)] if group.rank else [Replicate()])
    assert DTensor(x.local, mesh, [Shard(0)]).shape == (5, 2)


def test_without_nccl_they_go_by_way_of_the_host(stand_in_without_nccl: object) -> None:
    xp = sys.modules["cupy"]

    def staged(group: ProcessGroup) -> None:
        xp.cuda.Device(group.rank % 4).use()
        group.transport.device = HostStaging(group.transport)
        for case in CHOSEN:
            if case.dtype != BFLOAT16:
                check_case(group, case, xp, immediate=group.size == 2)
        x = DTensor(xp.ones(3), DeviceMesh(group, all=-1), [Partial()])
        np.testing.assert_array_equal(to_host(x.full()), [group.size] * 3)

    run_ranks(4, staged)
