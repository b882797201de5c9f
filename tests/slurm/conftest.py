"""One Slurm for all tests here, and what of it this machine and this MPI library allow."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests._ranks.launcher import find_mpirun, vendor_arguments
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm of two nodes; skipped where there is none, failed where there has to be one."""
    if lacking := missing():
        if os.environ.get("MPIDIST_TEST_REQUIRE_SLURM") == "1":  # set by .ci/run
            pytest.fail(lacking, pytrace=False)
        pytest.skip(lacking)
    with Cluster() as started:
        yield started


@pytest.fixture(scope="session")
def pmi2(cluster: Cluster) -> Cluster:
    """The same, for ranks that srun --mpi=pmi2 can start: MPICH's."""
    mpirun = find_mpirun()
    if mpirun is None or vendor_arguments(mpirun):
        pytest.skip("Open MPI 5 knows only PMIx, which Debian's Slurm lacks: run with MPICH")
    return cluster
