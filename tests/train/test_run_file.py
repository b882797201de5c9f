"""A file that is there whole or not at all, and is believed only if it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mpidist.arrays import BFLOAT16
from mpidist.errors import CheckpointCorruptError
from mpidist.train.run_file import read_file, write_file

VALUES = {"step": 7, "names": ["a", "b"], "deep": {"x": None, "y": 1.5, "z": True}}
ARRAYS = {
    "model/0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "half": np.linspace(-1, 1, 5).astype(BFLOAT16),
    "none": np.empty((0, 3), np.float16),
    "number": np.array(2.5),
    "complex": np.array([1 + 2j]),
    "flags": np.array([True, False]),
}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "made" / "run.npz"
    write_file(path, {}, {})
    write_file(path, VALUES, ARRAYS)
    values, arrays = read_file(path)
    assert values == VALUES
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["run.npz"]
    with np.load(path) as plain:  # people and tools can read it, too
        np.testing.assert_array_equal(plain["array/turned"], ARRAYS["turned"])


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    write_file(path, VALUES, {"a": np.arange(5.0)})
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointCorruptError, match=r"run\.npz is not, or not all of,"):
            read_file(path)
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 200, replace=False).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        try:
            values, arrays = read_file(path)
        except CheckpointCorruptError:
            continue
        # A byte that means nothing, as a date in the archive; what is read must be right.
        assert values == VALUES
        np.testing.assert_array_equal(arrays["a"], np.arange(5.0))


def test_a_digest_that_is_wrong_in_a_sound_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    write_file(path, VALUES, {"a": np.arange(5.0)})
    with np.load(path) as file:
        members = dict(file)
    members["array/a"] = np.arange(5.0) + 1
    np.savez(path, **members)
    with pytest.raises(CheckpointCorruptError, match="damaged: expected SHA-256"):
        read_file(path)


def test_foreign_files_are_refused_and_nothing_in_them_is_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/run",)

    path = tmp_path / "x.npz"
    path.write_text("{}")
    with pytest.raises(CheckpointCorruptError):
        read_file(path)
    np.save(path.with_suffix(".npy"), np.ones(3))
    path.with_suffix(".npy").rename(path)
    with pytest.raises(CheckpointCorruptError):
        read_file(path)
    np.savez(path, weights=np.ones(3))
    with pytest.raises(CheckpointCorruptError, match="header"):
        read_file(path)
    np.savez(path, header=np.array([Bomb()], object), sha256=np.zeros(32, np.uint8))
    with pytest.raises(CheckpointCorruptError, match="pickle"):
        read_file(path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none.npz")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "run.npz"
    write_file(path, {"step": 1}, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, {"step": 2}, {"a": np.ones(100)})
    assert read_file(path)[0] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    lines = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from mpidist.train.run_file import write_file\n"
        "step = int(sys.argv[2])\n"
        "while True:\n"
        "    step += 1\n"
        "    write_file(Path(sys.argv[1]), {'step': step}, {'a': np.full(200_000, step)})\n"
    )
    seen = 0
    for delay in (0.0, 0.013, 0.031, 0.002):
        process = subprocess.Popen([sys.executable, "-c", lines, str(path), str(seen)])
        try:
            deadline = time.monotonic() + 30
            while not (path.exists() and read_file(path)[0]["step"] > seen):
                assert time.monotonic() < deadline
            time.sleep(delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        values, arrays = read_file(path)
        assert values["step"] > seen
        assert (arrays["a"] == values["step"]).all()
        seen = values["step"]
