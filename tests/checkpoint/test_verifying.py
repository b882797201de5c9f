"""`verify`: it finds what is wrong, all of it, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpidist import checkpoint, cli
from mpidist._threads import run_in_thread
from mpidist.checkpoint.tools.exporting import import_from
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    CheckpointMissingShardError,
    CheckpointNotFoundError,
)
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from tests.checkpoint.made import VALUES, arrays, save

RANKS = 3
STEP = "step-000005"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save(path, arrays() | VALUES, ranks=RANKS, sharded=("moments", "model/weight"))
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, data: bytes) -> None:
    """Change one bit of the only place in a file that has these bytes."""
    content = bytearray(path.read_bytes())
    assert content.count(data) == 1
    content[content.index(data)] ^= 16
    path.write_bytes(content)


def test_nothing_is_wrong_with_what_was_saved(saved: Path) -> None:
    told: list[int] = []
    assert checkpoint.verify(saved, step=5, progress=told.append) == []
    assert sum(told) == sum(array.nbytes for array in arrays().values())


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_state_without_arrays_is_whole(tmp_path: Path, ranks: int) -> None:
    save(tmp_path, {"epoch": 3}, ranks=ranks)
    assert checkpoint.verify(tmp_path) == []


def test_everything_wrong_is_told_once(copy: Path) -> None:
    state = arrays()
    directory = copy / STEP
    start, stop = 234, 467  # the rows of the second of three ranks
    for row in (start, start + 100, stop - 1):
        flip(directory / "rank-00001.h5", state["model/weight"][row].tobytes())
    flip(directory / "rank-00001.h5", state["moments"][3, 7].tobytes())
    os.truncate(directory / "rank-00000.h5", 1000)
    (directory / "rank-00002.h5").unlink()
    (directory / "view.h5").unlink()
    errors = checkpoint.verify(copy)
    assert sorted(type(error).__name__ for error in errors) == [
        *["CheckpointCorruptError"] * 4,
        "CheckpointMissingShardError",
    ]
    told = "\n".join(map(str, errors))
    assert "rank-00000.h5 has 1000 bytes, and was written with" in told
    assert "rank-00001.h5 is damaged: a part of 'model/weight' in dataset" in told
    assert "rank-00001.h5 is damaged: a part of 'moments' in dataset" in told
    assert "rank-00002.h5 is missing" in told
    assert "view.h5 cannot be read as HDF5" in told


def test_an_edited_manifest_is_one_error(copy: Path) -> None:
    path = copy / STEP / "manifest.json"
    path.write_text(path.read_text().replace('"step":5', '"step":6'))
    (error,) = checkpoint.verify(copy)
    assert isinstance(error, CheckpointCorruptError)
    assert "is damaged, or was edited" in str(error)


def test_a_later_format_is_one_error(copy: Path) -> None:
    path = copy / STEP / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    (error,) = checkpoint.verify(copy)
    assert isinstance(error, CheckpointIncompatibleError)


def within_seconds(call: Callable[[], Any]) -> Any:
    """Call a function in a thread, so that one which waits for ever ends the test, not the run."""
    return run_in_thread(call, name="mpidist-test").result(40)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.h5", "view.h5"])
def test_nobody_waits_at_a_fifo(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / STEP / name).unlink()
    os.mkfifo(copy / STEP / name)
    words = f"{name} is a FIFO, and a regular file is expected"
    begin = time.monotonic()
    errors = within_seconds(lambda: checkpoint.verify(copy))
    assert [type(error) for error in errors] == [CheckpointCorruptError]
    assert words in str(errors[0])

    def load(group: ProcessGroup) -> str:
        state = {"epoch": 0, "model/weight": np.zeros((700, 513), np.float32)}
        with pytest.raises(CheckpointCorruptError, match=words) as caught:
            checkpoint.load(copy, state, group)
        return str(caught.value)

    if name != "view.h5":  # which nothing reads
        with pytest.raises(CheckpointCorruptError, match=words):
            within_seconds(lambda: checkpoint.load_full(copy))
        assert len(set(within_seconds(lambda: run_ranks(2, load, timeout=15.0)))) == 1
    if name == "manifest.json":
        for action, code in (("list", 0), ("show", 1)):
            assert within_seconds(lambda: cli.main(["checkpoint", action, str(copy)])) == code  # noqa: B023
            assert words in "".join(capsys.readouterr())
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_nothing_is_imported_from_a_fifo(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"file{suffix}"
    os.mkfifo(file)
    with pytest.raises(CheckpointCorruptError, match="is a FIFO"):
        within_seconds(lambda: import_from(file, tmp_path / "run", step=1))


def test_a_directory_of_another_name_is_told(copy: Path) -> None:
    (copy / STEP).rename(copy / "step-000009")
    (error,) = checkpoint.verify(copy)
    assert "step-000009 holds the checkpoint of step 5; give the directory its name back" in str(
        error
    )


DYING = """
import os, signal, sys
sys.path[:] = {}
from mpidist.checkpoint.tools import verifying as inspecting
contents = inspecting.contents
def die_at_some(path):
    return os.kill(os.getpid(), signal.SIGSEGV) if path.name in %r else contents(path)
inspecting.contents = die_at_some
inspecting.answer()
"""


def test_a_file_that_ends_the_library_of_hdf5_is_one_error(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ["rank-00000.h5", "rank-00001.h5", "view.h5"]
    monkeypatch.setattr("mpidist.checkpoint.tools.verifying._CHILD", DYING % bad)
    errors = checkpoint.verify(saved)
    for error, name in zip(errors, bad, strict=True):
        told = f"{name} cannot be read as HDF5: the library of HDF5 does not survive it (SIGSEGV)"
        assert told in str(error)


def test_files_of_another_save_are_told(copy: Path, tmp_path: Path) -> None:
    other = save(
        tmp_path / "other", arrays() | VALUES, ranks=RANKS, sharded=("moments", "model/weight")
    )
    for name in ("rank-00001.h5", "view.h5"):  # the same in every byte but the id
        shutil.copy(other.directory / name, copy / STEP / name)
    errors = checkpoint.verify(copy)
    assert ["rank-00001.h5 is not of the save" in str(errors[0]), len(errors)] == [True, 2]
    assert "view.h5 is of another save" in str(errors[1])


def test_what_only_readers_of_hdf5_see_is_told(tmp_path: Path) -> None:
    """The bytes are where the manifest says, but HDF5 would give others, or none."""
    found = save(tmp_path, arrays())
    path, view = found.directory / "rank-00000.h5", found.directory / "view.h5"
    content = path.read_bytes()
    for old, new in ((b"\4bool", b"\4bowl"), (b"mpidist dtype\0", b"mpidist dtypo\0")):
        assert content.count(old) == 1
        content = content.replace(old, new)
    path.write_bytes(content)
    with h5py.File(view, "w") as file:
        file.attrs["id"] = np.bytes_(found.manifest.id.encode())
        file["count"] = 3
    errors = checkpoint.verify(tmp_path)
    told = "\n".join(map(str, errors))
    assert all(isinstance(error, CheckpointCorruptError) for error in errors)
    assert "HDF5 has dataset 'packed/bool' as nothing" in told
    assert "HDF5 has dataset 'packed/bfloat16' as <u2[7]" in told
    assert "view.h5: 'count' is not what was saved" in told
    assert f"view.h5 lacks {len(arrays()) - 1} arrays" in told
    assert len(errors) == 4


def test_a_partial_or_absent_one_is_not_found(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint of step 6"):
        checkpoint.verify(copy, step=6)
    (copy / STEP / "manifest.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="complete are: none"):
        checkpoint.verify(copy)
    with pytest.raises(CheckpointNotFoundError, match="no such directory"):
        checkpoint.verify(tmp_path / "nowhere")


def test_a_shard_that_is_missing_is_its_own_error(copy: Path) -> None:
    (copy / STEP / "rank-00001.h5").unlink()
    (error,) = checkpoint.verify(copy)
    assert isinstance(error, CheckpointMissingShardError)


def test_memory_does_not_grow_with_the_arrays(tmp_path: Path) -> None:
    save(tmp_path, {"array": np.arange(4 << 20, dtype=np.float64)})  # 32 MiB
    tracemalloc.start()
    try:
        assert checkpoint.verify(tmp_path) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_file_may_say_nothing_of_its_save(copy: Path) -> None:
    """Other programs that write checkpoints need not say it."""
    with h5py.File(copy / STEP / "rank-00000.h5", "r+") as file:
        del file.attrs["id"]
    assert checkpoint.verify(copy) == []
