"""What dead jobs have left is removed, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpidist.info import command
from mpidist.info.leftovers import Candidate, clean, describe
from tests.info.test_looking import HOLD

OPEN = """
import sys
with open(sys.argv[1], "rb") as file:
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory in memory, as /dev/shm is, with 10 files of jobs that are over and two others."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        for number in range(10):
            made(directory / f"mpich_shm_{number}")
        made(directory / "sm_segment.n0.0.1.0")
        made(directory / "of_somebody")
        yield directory


def made(path: Path, *, age: float = 100.0) -> Path:
    path.write_bytes(bytes(4096))
    os.utime(path, (0, time.time() - age))
    return path


def kept(files: list[Candidate]) -> dict[str, str]:
    return {file.name: file.kept for file in files if file.kept}


def test_all_that_dead_jobs_have_left_is_removed(shared: Path) -> None:
    files = clean(shared)
    assert kept(files) == {}
    assert [path.name for path in shared.iterdir()] == ["of_somebody"]
    assert describe(files, "here") == (
        "removed 10 files of MPICH in here, 40 KiB\nremoved 1 file of Open MPI in here, 4 KiB"
    )
    assert describe(clean(shared), "here") == "nothing of MPI libraries is in here"


@pytest.mark.parametrize("program", [HOLD, OPEN], ids=["mapped", "open"])
def test_what_a_living_process_has_is_kept(shared: Path, program: str) -> None:
    words = [sys.executable, "-c", program, str(shared / "mpich_shm_3")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert kept(clean(shared)) == {"mpich_shm_3": "in use"}
        assert (shared / "mpich_shm_3").exists()
        process.communicate(timeout=30)
    clean(shared)
    assert not (shared / "mpich_shm_3").exists()


def test_it_is_kept_also_where_that_process_cannot_be_seen(shared: Path) -> None:
    """As in a container that shares the memory, and has process numbers of its own."""
    name, code = (
        str(shared / "mpich_shm_3"),
        "import sys; from mpidist.info.leftovers import clean; ",
    )
    code += "from pathlib import Path; print([f.name for f in clean(Path(sys.argv[1])) if f.kept])"
    hidden = ["unshare", "-rpf", "--mount-proc", sys.executable, "-c", code, str(shared)]
    with open(name, "rb"):  # noqa: PTH123
        answer = subprocess.run(
            hidden, capture_output=True, text=True, timeout=60, check=False, env=os.environ
        )
    if answer.returncode and "unshare" in answer.stderr:
        pytest.skip(f"no processes can be hidden here: {answer.stderr.strip()}")
    assert answer.stdout == "['mpich_shm_3']\n", answer.stderr


def test_what_may_be_that_of_a_job_which_starts_is_kept(shared: Path) -> None:
    made(shared / "mpich_shm_new", age=5.0)
    assert kept(clean(shared)) == {"mpich_shm_new": "less than 60 s old"}


def test_files_of_other_users_and_links_are_kept(shared: Path, monkeypatch) -> None:
    target = made(shared / "precious")
    (shared / "mpich_shm_link").symlink_to(target)
    clean(shared)
    assert target.exists()
    assert (shared / "mpich_shm_link").is_symlink()
    made(shared / "mpich_shm_0")
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert kept(clean(shared)) == {"mpich_shm_0": "another user's"}


def test_the_option_does_nothing_else(shared: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "DIRECTORY", shared)
    monkeypatch.setattr(command, "ask", None)
    parser = command.argparse.ArgumentParser()
    command.configure(parser)
    assert command.run(parser.parse_args(["--clean"])) == 0
    assert f"removed 10 files of MPICH in {shared} of " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["--clean", "--json"])
