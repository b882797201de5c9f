"""The contract of transports, on threads: few and many ranks in every mode."""

from __future__ import annotations

import pytest

from mpidist.testing import BackendContract, Mode, run_ranks
from mpidist.testing.contract import Run


@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    "size", [1, 3, *(pytest.param(size, marks=pytest.mark.one_python) for size in (2, 5, 8))]
)
class TestSimulated(BackendContract):
    @pytest.fixture
    def run(self, size: int, mode: Mode) -> Run:
        return lambda case: run_ranks(size, case, mode=mode)
