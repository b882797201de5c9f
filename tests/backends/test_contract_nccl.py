"""The contract of transports, on NCCL: one rank per device, and ranks that share one.

Every test runs on the stub of libnccl, with CuPy's own binding over it, and with ``-m gpu`` on the
GPUs that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import mpidist
from mpidist.backends.device.nccl import NcclBackend
from mpidist.group import ProcessGroup
from mpidist.testing import BackendContract, run_ranks
from mpidist.testing.contract import DeviceContract, DevicePlace, Run
from tests.nccl_stub.fixtures import needs_cupy


@pytest.mark.ranks(3, full=(2, 4))
@needs_cupy
class TestNccl(DeviceContract):
    """Processes, each with a device."""

    @pytest.fixture
    def run(self, place: DevicePlace, world: ProcessGroup) -> Run:
        devices = place.cupy.cuda.runtime.getDeviceCount()
        if devices < world.local_size:
            pytest.skip(f"{world.local_size} processes, and {devices} GPU")
        assert world.backend == "hybrid"
        self.place = place
        return lambda case: case(world)


@pytest.mark.full
@pytest.mark.ranks(2)
@needs_cupy
class TestHostArrays(BackendContract):
    """Host arrays of a group that carries device arrays, too."""

    @pytest.fixture
    def run(self, xp_with_nccl: object, world: ProcessGroup) -> Run:
        assert world.backend == "hybrid"
        return lambda case: case(world)


@pytest.mark.ranks(2)
@needs_cupy
class TestSharedDevice(DeviceContract):
    """Processes on one device."""

    @pytest.fixture
    def run(self, shared_device: DevicePlace, world: ProcessGroup) -> Run:
        shared_device.cupy.cuda.Device(0).use()
        self.place = shared_device
        return lambda case: case(world)


class TestThreads(DeviceContract):
    """Threads on one device: who connects the ranks is not NCCL's business."""

    @pytest.fixture
    def run(self, shared_device: DevicePlace) -> Run:
        self.place = shared_device

        def on_rank(group: ProcessGroup, case: Callable[[ProcessGroup], None]) -> None:
            group.transport.device = NcclBackend(group.transport)
            # The default stream is that of all threads: one rank's wait would hold up the other.
            with shared_device.cupy.cuda.Stream(non_blocking=True):
                case(group)

        return lambda case: run_ranks(2, on_rank, case)


class TestOneRank(DeviceContract):
    """A process alone, without MPI."""

    @pytest.fixture
    def run(self, place: DevicePlace) -> Iterator[Run]:
        self.place = place
        with mpidist.init("hybrid") as world:
            yield lambda case: case(world)
