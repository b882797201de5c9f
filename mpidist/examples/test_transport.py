"""What a new transport is asked: python -m pytest test_transport.py"""

import pytest

from mpidist.testing import BackendContract, run_ranks


class TestThreads(BackendContract):
    @pytest.fixture
    def run(self):
        # Call the case with the group of all ranks, on every rank. Here: three threads. For a
        # transport of your own, start its ranks and make their group with ProcessGroup.over.
        return lambda case: run_ranks(3, case)
