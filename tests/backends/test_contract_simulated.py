"""The contract of transports, on threads, in every mode; one and many ranks in a full run."""

from __future__ import annotations

import pytest

from mpidist.testing import BackendContract, Mode, run_ranks
from mpidist.testing.contract import Run

FEW = {(1, Mode.EAGER), *((size, mode) for size in (2, 3, 4) for mode in Mode)}
"""Alone, modes of messages do not differ."""

JOBS = [
    pytest.param(
        size,
        mode,
        marks=[] if (size, mode) in FEW else pytest.mark.full,
        id=f"{size}-{mode.value}",
    )
    for size in (1, 2, 3, 4, 5, 8)
    for mode in Mode
]


@pytest.mark.parametrize(("size", "mode"), JOBS)
class TestSimulated(BackendContract):
    @pytest.fixture
    def run(self, size: int, mode: Mode) -> Run:
        return lambda case: run_ranks(size, case, mode=mode)


@pytest.mark.parametrize("size", [2, 3])
class TestNodeMemory(BackendContract):
    """The node layer over the simulated transport: counters, sums and arrays in shared memory."""

    @pytest.fixture
    def run(self, size: int) -> Run:
        return lambda case: run_ranks(size, case, node_memory=True)
