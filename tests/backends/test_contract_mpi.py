"""The contract of transports, on MPI: this process is one of the ranks."""

from __future__ import annotations

import pytest

from mpidist.group import ProcessGroup
from mpidist.testing import BackendContract
from mpidist.testing.contract import Run


@pytest.mark.ranks(2, 3, 4)
class TestMpi(BackendContract):
    @pytest.fixture
    def run(self, world: ProcessGroup) -> Run:
        return lambda case: case(world)
