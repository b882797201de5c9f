"""`reshard`: what it writes is what other ranks would have saved, and it needs little memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.checkpoint import Checkpoint
from mpidist.checkpoint.format.manifest import StoredBox
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMissingShardError,
    CheckpointNotFoundError,
    InvalidWorldSizeError,
)
from tests.checkpoint.made import METADATA, VALUES, arrays, save

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    sharded = ("moments", "model/weight", "nothing")
    save(path, arrays() | VALUES, ranks=4, metadata=METADATA, sharded=sharded)
    return path


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and found[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def stored(found: Checkpoint) -> dict[str, list[StoredBox]]:
    return {name: sorted(a.boxes, key=str) for name, a in found.arrays.items()}


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_it_writes_what_so_many_ranks_would_save(source: Path, tmp_path: Path, ranks: int) -> None:
    told: list[int] = []
    found = checkpoint.reshard(source, tmp_path / "new", ranks, progress=told.append)
    expected = save(tmp_path / "saved", arrays() | VALUES, ranks=ranks, metadata=METADATA)
    assert (found.step, found.world_size) == (5, ranks)
    assert (found.metadata, found.values) == (METADATA, VALUES)
    assert stored(found) == stored(expected)
    assert found.manifest.files == expected.manifest.files
    assert names(found.directory) == names(expected.directory)
    assert sum(told) == found.nbytes
    full = checkpoint.load_full(tmp_path / "new")
    assert same({k: v for k, v in full.items() if k not in VALUES}, arrays())


def test_plain_hdf5_readers_see_the_arrays(source: Path, tmp_path: Path) -> None:
    found = checkpoint.reshard(source, tmp_path, 3)
    with h5py.File(found.directory / "view.h5") as view:
        for name, array in arrays().items():
            plain = array.view(np.uint16) if name == "model/bias" else array
            np.testing.assert_array_equal(view[name][()], plain)


def test_many_tiles_find_their_place(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 255, (130, 40_001), np.uint8)  # chunks of 64 rows and 4 KiB
    deep = rng.normal(size=(3, 300, 1025))
    turned = np.asfortranarray(rng.normal(size=(1025, 400)))
    state = {"wide": wide, "deep": deep, "turned": turned}
    save(tmp_path / "a", state, ranks=3, sharded=("wide", "turned"))
    for ranks, src, dst in ((2, "a", "b"), (5, "b", "c")):
        checkpoint.reshard(tmp_path / src, tmp_path / dst, ranks)
        assert same(checkpoint.load_full(tmp_path / dst), state)


def test_memory_does_not_grow_with_the_arrays(tmp_path: Path) -> None:
    array = np.arange(96 << 18, dtype=np.float32).reshape(24, -1)  # 96 MiB; a row has 4 MiB
    save(tmp_path / "a", {"array": array}, ranks=2)
    tracemalloc.start()
    try:
        checkpoint.reshard(tmp_path / "a", tmp_path / "b", 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert same(checkpoint.load_full(tmp_path / "b"), {"array": array})


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpidist.checkpoint.loading.reading._MOST_OPEN", 2)
    state = {"array": np.arange(4000.0).reshape(40, 100)}
    save(tmp_path / "a", state, ranks=6, sharded=("array",))
    opened = Path("/proc/self/fd")
    before, during = names(opened), []
    checkpoint.reshard(
        tmp_path / "a", tmp_path / "b", 1, progress=lambda _: during.append(names(opened))
    )
    assert max(map(len, during)) <= len(before) + 3  # two to read from, one to write to
    assert names(opened) == before
    assert same(checkpoint.load_full(tmp_path / "b"), state)


def test_a_step_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    checkpoint.reshard(source, tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"step-000005 is not written: .* never overwritten"):
        checkpoint.reshard(source, tmp_path, 3)
    with pytest.raises(CheckpointError, match="never overwritten"):
        checkpoint.reshard(source, source, 3)
    assert [found.world_size for found in checkpoint.list(tmp_path)] == [2]


@pytest.mark.parametrize(
    ("damage", "error", "told"),
    [
        ("flip", CheckpointCorruptError, r"rank-00000\.h5 is damaged: a part of 'array'"),
        ("cut", CheckpointCorruptError, "it was cut off"),
        ("remove", CheckpointMissingShardError, r"rank-00000\.h5 is missing"),
    ],
)
def test_damage_is_found_and_leaves_nothing(
    tmp_path: Path, damage: str, error: type[CheckpointError], told: str
) -> None:
    array = np.arange(400_000.0)
    found = save(tmp_path / "a", {"array": array, "small": np.arange(3)})
    path = found.directory / "rank-00000.h5"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[data.index(array[300_000:300_010].tobytes())] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with pytest.raises(error, match=told):
        checkpoint.reshard(tmp_path / "a", tmp_path / "b", 2)
    assert not list((tmp_path / "b").glob("*"))


def test_what_cannot_be_written_is_one_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step-000005 cannot be written: NotADirectoryError"):
        checkpoint.reshard(source, tmp_path / "file", 2)


def test_wrong_arguments_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidWorldSizeError, match="at least 1 rank, got 0"):
        checkpoint.reshard(source, tmp_path / "b", 0)
    with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint of step 6"):
        checkpoint.reshard(source, tmp_path / "b", 1, step=6)
    assert not (tmp_path / "b").exists()


KILLED = """
import os, signal, sys
from mpidist import checkpoint
from mpidist.checkpoint.tools import resharding as building
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
building.commit = kill
checkpoint.reshard(sys.argv[1], sys.argv[2], 2)
"""


def test_a_kill_just_before_the_end_leaves_no_checkpoint(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(source), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(words, env=environment, timeout=60, check=False)
    assert answer.returncode == -signal.SIGKILL
    assert (tmp_path / "step-000005" / "rank-00001.h5").exists()
    assert checkpoint.list(tmp_path) == []
    checkpoint.reshard(source, tmp_path, 2)  # what is left is no hindrance
    assert [found.step for found in checkpoint.list(tmp_path)] == [5]
