"""What is found out about this very machine, beside what other programs say of it."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpidist.info import probes
from mpidist.info.leftovers import find_leftovers, mapped_by

ROOT = Path(__file__).parents[2]

BLAS_THREADS = """
import json
from mpidist.info.probes import blas
found = blas()
print(json.dumps([found.name, found.path, found.threads]))
"""


@pytest.mark.skipif(
    not probes.blas().name.startswith("OpenBLAS"), reason="numpy stands on another BLAS"
)
@pytest.mark.parametrize("threads", [1, 2])
def test_blas_tells_its_threads(threads: int) -> None:
    variables = {"OPENBLAS_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", BLAS_THREADS],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    name, path, told = json.loads(answer.stdout)
    assert told == threads
    assert Path(path).is_file()
    assert re.fullmatch(r"OpenBLAS \d[\d.]*", name)


@pytest.mark.parametrize(
    ("file", "symbols", "expected"),
    [
        ("/lib/libmkl_rt.so.2", {"MKL_Get_Max_Threads": 8}, ("MKL", 8)),
        ("/lib/libblis.so.4", {"bli_thread_get_num_threads": -1}, ("BLIS", 1)),
        ("/lib/libopenblas.so.0", {}, ("OpenBLAS", None)),
        ("/lib/libblas.so.3", {}, ("", None)),
    ],
)
def test_other_libraries_are_asked_by_their_own_names(
    file: str,
    symbols: dict[str, int],
    expected: tuple[str, int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = type(
        "Library", (), {name: staticmethod(lambda v=v: v) for name, v in symbols.items()}
    )
    monkeypatch.setattr(probes, "loaded_libraries", lambda: ["/lib/libc.so.6", file])
    monkeypatch.setattr(probes.ctypes, "CDLL", lambda path: library)
    found = probes.blas()
    assert (found.name, found.threads) == expected


def test_shared_memory_is_measured(tmp_path: Path) -> None:
    found = probes.shared_memory(tmp_path)
    disk = os.statvfs(tmp_path)
    assert found is not None
    assert found.total == disk.f_blocks * disk.f_frsize
    assert 0 <= found.free <= found.total
    assert probes.shared_memory(tmp_path / "none") is None


def test_this_node_is_looked_at() -> None:
    found = probes.look_at_node([0, 1])
    assert found.ranks == [0, 1]
    assert found.host == os.uname().nodename
    assert found.cores == os.cpu_count()


HOLD = """
import mmap, os, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 4096)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with two files of MPICH, one of Open MPI, and what is none of its business."""
    for name in ("mpich_shm_1_0", "mpich_shm_2_0", "sm_segment.n0.0.1.0", "of_somebody"):
        (tmp_path / name).write_bytes(bytes(4096))
    (tmp_path / "mpich_shm_directory").mkdir()
    return tmp_path


@pytest.fixture
def holder(files: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which has one of them mapped, and no descriptor of it open."""
    words = [sys.executable, "-c", HOLD, str(files / "mpich_shm_1_0")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate(timeout=30)


def test_files_are_known_by_their_names(files: Path) -> None:
    os.utime(files / "mpich_shm_2_0", (0, time.time() - 100))
    found = {file.name: file for file in find_leftovers(files)}
    assert {name: file.maker for name, file in found.items()} == {
        "mpich_shm_1_0": "MPICH",
        "mpich_shm_2_0": "MPICH",
        "sm_segment.n0.0.1.0": "Open MPI",
    }
    assert found["mpich_shm_2_0"].age == pytest.approx(100, abs=30)
    assert found["mpich_shm_1_0"].nbytes == (files / "mpich_shm_1_0").stat().st_blocks * 512
    assert not any(file.used for file in found.values())


def test_a_file_that_a_process_has_is_in_use(files: Path, holder: subprocess.Popen[str]) -> None:
    assert {file.name: file.used for file in find_leftovers(files)} == {
        "mpich_shm_1_0": True,
        "mpich_shm_2_0": False,
        "sm_segment.n0.0.1.0": False,
    }
    assert mapped_by(str(holder.pid), files) == [files / "mpich_shm_1_0"]


def test_files_of_this_process_are_left_out(files: Path) -> None:
    with (files / "mpich_shm_2_0").open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert "mpich_shm_2_0" not in {each.name for each in find_leftovers(files)}
        assert mapped_by("self", files) == [files / "mpich_shm_2_0"]


def test_files_of_another_user_may_be_in_use(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That user's processes cannot be looked at."""
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert {file.used for file in find_leftovers(files)} == {None}
