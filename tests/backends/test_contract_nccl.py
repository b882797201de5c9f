"""The contract of transports, on NCCL: CuPy's binding over the stub, one process per rank."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from mpidist.group import ProcessGroup
from mpidist.testing import BackendContract
from mpidist.testing.contract import DeviceContract, Run
from tests.nccl_stub.fixtures import needs_stub
from tests.nccl_stub.place import StandInPlace

pytestmark = needs_stub


@pytest.mark.ranks(2, 3, 4)
class TestNccl(DeviceContract):
    @pytest.fixture
    def run(self, stand_in: ModuleType, world: ProcessGroup) -> Run:
        assert world.backend == "hybrid"
        self.place = StandInPlace(sys.modules["cupy"])
        return lambda case: case(world)


@pytest.mark.ranks(3)
class TestHostArrays(BackendContract):
    @pytest.fixture
    def run(self, stand_in: ModuleType, world: ProcessGroup) -> Run:
        assert world.backend == "hybrid"
        return lambda case: case(world)
