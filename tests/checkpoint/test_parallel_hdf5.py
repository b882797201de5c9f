"""All ranks write one HDF5 file, where h5py was built with MPI; .ci/run builds such a one."""

from __future__ import annotations

import os
import resource
import runpy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest

from mpidist import Box, ShardedArray, checkpoint
from mpidist.checkpoint.format import files
from mpidist.checkpoint.saving import single_file
from mpidist.collectives import barrier, broadcast_object
from mpidist.errors import BackendUnavailableError, CheckpointError, CollectiveMismatchError
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests.checkpoint.cases import check_files, held_by, load_case, some_case
from tests.docs.pages import EXAMPLES_DIRECTORY

REQUIRED = os.environ.get("MPIDIST_TEST_REQUIRE_PARALLEL_HDF5") == "1"  # set by .ci/run

with_mpi = pytest.mark.skipif(
    not (h5py.get_config().mpi or REQUIRED),
    reason="this h5py is serial; `.ci/run parallel_hdf5` builds and tests the other kind",
)


@pytest.fixture
def directory(world: ProcessGroup) -> Iterator[Path]:
    """A directory that all ranks of the test share."""
    made = tempfile.TemporaryDirectory() if world.rank == 0 else None
    yield Path(broadcast_object(made.name if made else "", world))
    barrier(world)
    if made:
        made.cleanup()


@with_mpi
@pytest.mark.ranks(2)
def test_random_states_come_back(world: ProcessGroup, directory: Path) -> None:
    """Ranks without a box, boxes cut into many blocks, any dtype, empty arrays and scalars."""
    for seed in range(12):
        case = some_case(Random(seed), world.size, world.size)
        path, state = directory / str(seed), held_by(case, case.saved, world.rank, zeros=False)
        with mock.patch.object(single_file, "_BLOCK", Random(seed).choice([512, 1 << 23])):
            checkpoint.save(path, state, world, step=1, single_file=True)
        load_case(world, case, path)
        if world.rank == 0:
            assert sorted(p.name for p in (path / "step-000001").iterdir()) == [
                "arrays.h5",
                "manifest.json",
                "view.h5",
            ]
            check_files(case, path)
            if seed == 1:  # it has an empty array; each verification starts a process
                assert checkpoint.verify(path) == []


@with_mpi
@pytest.mark.ranks(2)
def test_it_holds_whole_arrays(world: ProcessGroup, directory: Path) -> None:
    """Any program that reads HDF5 finds them; large ones are aligned."""
    whole = np.arange(3 << 17, dtype="f8").reshape(-1, 3)  # 3 MiB
    third = len(whole) // 3 + 1
    boxes = [
        Box((start, 0), (min(third, len(whole) - start), 3)) for start in (0, third, 2 * third)
    ]
    mine = {box: whole[box.slices] for box in boxes[world.rank :: 2]}  # two, and one
    state = {
        "model": {"w": ShardedArray(whole.shape, whole.dtype, mine), "b": np.float32([1, 2])},
        "rate": np.array(0.5),
        "epoch": 3,
    }
    checkpoint.save(directory, state, world, step=7, single_file=True)
    with h5py.File(directory / "step-000007" / "arrays.h5", "r") as file:
        np.testing.assert_array_equal(file["model/w"], whole)
        np.testing.assert_array_equal(file["model/b"], np.float32([1, 2]))
        assert file["rate"][()] == 0.5
        assert file["model/w"].id.get_offset() % (1 << 20) == 0
    reader = runpy.run_path(str(EXAMPLES_DIRECTORY / "read_checkpoint.py"))
    _, arrays = reader["read_checkpoint"](directory / "step-000007")
    np.testing.assert_array_equal(arrays["model/w"], whole)
    np.testing.assert_array_equal(arrays["rate"], 0.5)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let the system refuse to make a file of this process larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@with_mpi
@pytest.mark.ranks(2)
def test_a_rank_that_cannot_write_fails_the_save_on_all(
    world: ProcessGroup, directory: Path
) -> None:
    state = {"x": np.arange(5 << 17), "y": np.arange(5.0)}  # x is cut: 5 MiB
    checkpoint.save(directory, state, world, step=1, single_file=True)
    with (
        largest_file(100) if world.rank == 1 else nullcontext(),
        pytest.raises(CheckpointError, match=r"(?s)rank 1 failed: OSError: .*File too large"),
    ):
        checkpoint.save(directory, state, world, step=2, single_file=True)
    assert [found.step for found in checkpoint.list(directory)] == [1]
    assert not (directory / "step-000002").exists()
    barrier(world)  # rank 0 makes the directory anew
    checkpoint.save(directory, state, world, step=2, single_file=True)
    np.testing.assert_array_equal(checkpoint.load_full(directory)["x"], state["x"])


@with_mpi
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("failing", "module", "name"), [(0, files, "create_file"), (1, single_file, "view_of_box")]
)
def test_a_rank_without_memory_fails_the_save_on_all(
    world: ProcessGroup, directory: Path, failing: int, module: Any, name: str
) -> None:
    """Rank 0 also while it makes the file, before the others open it."""

    def no_memory(*_: object) -> Any:
        raise MemoryError("no room")

    call = no_memory if world.rank == failing else getattr(module, name)
    with (
        mock.patch.object(module, name, call),
        pytest.raises(CheckpointError, match=f"rank {failing} failed: MemoryError: no room"),
    ):
        checkpoint.save(directory, {"x": np.ones(1 << 19)}, world, step=2, single_file=True)


@with_mpi
@pytest.mark.ranks(2)
def test_ranks_that_differ_are_told(world: ProcessGroup, directory: Path) -> None:
    with pytest.raises(CollectiveMismatchError, match=r"rank 0 to .*single_file on all ranks"):
        checkpoint.save(directory, {"x": 1}, world, step=1, single_file=world.rank == 0)


def refused(path: Path, words: str) -> None:
    """Check that a save on simulated ranks ends on all with these words, and writes nothing."""

    def body(group: ProcessGroup) -> None:
        with pytest.raises(BackendUnavailableError, match=words):
            checkpoint.save(path, {"x": np.arange(3)}, group, step=0, single_file=True)

    run_ranks(2, body)
    assert list(path.iterdir()) == []


def test_a_group_without_mpi_is_told(tmp_path: Path) -> None:
    refused(tmp_path, r"rank 0: mpi_comm: .*not on MPI; start it with")


def test_all_ranks_are_told_that_the_h5py_of_one_has_no_mpi(tmp_path: Path) -> None:
    with (
        mock.patch.object(ProcessGroup, "mpi_comm", None),
        mock.patch.object(files, "has_mpi", side_effect=[True, False]),
    ):
        refused(tmp_path, r"built without MPI \(h5py .*HDF5_MPI=ON pip install")
