"""The devices of threads and groups, and what is refused before it begins; on the stub."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from mpidist.backends.device.nccl import NcclCommunicator
from mpidist.collectives import all_reduce, iall_reduce
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.point_to_point import sendrecv
from tests.nccl_stub.fixtures import needs_cupy

pytestmark = [needs_cupy, pytest.mark.ranks(2)]

OTHER = 3


@pytest.fixture
def x(stand_in: ModuleType, world: ProcessGroup) -> Any:
    """An array on this rank's device, where the world has been connected."""
    cupy = sys.modules["cupy"]
    assert cupy.cuda.Device().id == world.rank
    made = cupy.full(4, float(world.rank))
    iall_reduce(made, world).synchronize()
    return made


@pytest.mark.parametrize("in_place", [True, False])
def test_another_current_device_is_refused(in_place: bool, x: Any, world: ProcessGroup) -> None:
    cupy: Any = sys.modules["cupy"]
    with (
        cupy.cuda.Device(OTHER),
        pytest.raises(UnsupportedOperationError, match=f"current device of this thread is {OTHER}"),
    ):
        all_reduce(x, world, out=x if in_place else None)
    assert all_reduce(x, world).get().tolist() == [1.0] * 4


def test_a_part_of_a_group_has_its_device(x: Any, world: ProcessGroup) -> None:
    cupy: Any = sys.modules["cupy"]
    with cupy.cuda.Device(OTHER):
        part = world.split(0)
    assert part is not None
    assert all_reduce(x, part).get().tolist() == [1.0] * 4
    part.close()


def test_a_communicator_is_released_on_its_device(
    x: Any, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any other one CUDA would take memory for that."""
    cupy: Any = sys.modules["cupy"]
    group = world.duplicate("brief")
    iall_reduce(x, group).synchronize()
    seen: list[int] = []
    destroy = NcclCommunicator.destroy

    def look(communicator: NcclCommunicator) -> None:
        seen.append(cupy.cuda.Device().id)
        destroy(communicator)

    monkeypatch.setattr(NcclCommunicator, "destroy", look)
    group.close()
    assert seen == [world.rank]


def test_a_message_before_the_ranks_are_connected_breaks_nothing(
    x: Any, world: ProcessGroup
) -> None:
    group = world.new_group((0, 1), name="early")
    assert group is not None
    peer = 1 - world.rank
    with pytest.raises(UnsupportedOperationError, match="need the ranks to be connected"):
        sendrecv(x, group, dst=peer, src=peer)
    all_reduce(x, group)
    assert sendrecv(x, group, dst=peer, src=peer).get().tolist() == [float(peer)] * 4
    group.close()
