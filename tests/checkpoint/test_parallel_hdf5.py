"""Several ranks write one HDF5 file, where h5py was built with MPI; .ci/run builds such a one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup

REQUIRED = os.environ.get("MPIDIST_TEST_REQUIRE_PARALLEL_HDF5") == "1"  # set by .ci/run

pytestmark = pytest.mark.skipif(
    not (h5py.get_config().mpi or REQUIRED),
    reason="this h5py is serial; `.ci/run parallel_hdf5` builds and tests the other kind",
)


@pytest.fixture
def directory(world: ProcessGroup) -> Iterator[Path]:
    """A directory that all ranks of the test share."""
    made = tempfile.TemporaryDirectory() if world.rank == 0 else None
    yield Path(broadcast_object(made.name if made else "", world))
    if made:
        made.cleanup()


@pytest.mark.ranks(3)
def test_the_driver_takes_the_communicator_of_a_group(world: ProcessGroup, directory: Path) -> None:
    path = directory / "all.h5"
    values = np.arange(30.0).reshape(10, 3)
    rows = np.array_split(np.arange(10), world.size)[world.rank]
    with h5py.File(path, "w", driver="mpio", comm=world.mpi_comm) as file:
        dataset = file.create_dataset("x", values.shape, values.dtype)
        with dataset.collective:
            dataset[rows[0] : rows[-1] + 1] = values[rows]
    with h5py.File(path, "r") as file:
        np.testing.assert_array_equal(file["x"][:], values)
