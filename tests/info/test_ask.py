"""An MPI library that is missing, dies or hangs, and what is told then.

The library is played by a module of the name of mpi4py, which the process finds first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpidist.backends.node.shared_memory import DIRECTORY
from mpidist.info.ask import Answer, ask

pytestmark = pytest.mark.timeout(100)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let processes that are started from now on find this instead of ``mpi4py.MPI``."""
    for variable in list(os.environ):
        if variable.startswith(("PMI", "PMIX", "OMPI", "SLURM", "MPI4PY")):
            monkeypatch.delenv(variable)

    def write(text: str) -> None:
        package = tmp_path / "mpi4py"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "MPI.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    return write


def failure_of(answer: Answer) -> tuple[str, str]:
    """Return kind and reason, and see that all else is told."""
    assert answer.job is not None
    assert answer.failure is not None
    assert answer.job.failure == answer.failure
    assert answer.job.first.library is None
    assert answer.job.first.versions["numpy"]
    assert answer.job.nodes[0].cores >= 1
    return answer.failure.kind, answer.failure.reason


def test_missing(play) -> None:
    play("raise ImportError('cannot load MPI library /nowhere')")
    assert failure_of(ask(30)) == ("missing", "cannot load MPI library /nowhere")


def test_dying_by_a_signal(play) -> None:
    play("import os, signal; print('no room', flush=True); os.kill(os.getpid(), signal.SIGBUS)")
    answer = ask(30)
    assert failure_of(answer) == ("died", "ended by SIGBUS")
    assert answer.failure.output == ["no room"]


def test_dying_with_a_code(play) -> None:
    play("import os; os.write(2, b'\\n'.join(b'%d' % n for n in range(20))); os._exit(16)")
    answer = ask(30)
    assert failure_of(answer) == ("died", "ended with exit code 16")
    assert answer.failure.output == [str(n) for n in range(12, 20)]


HANG = """
import ctypes, mmap, os, time
descriptor = os.open("{file}", os.O_CREAT | os.O_RDWR, 0o600)
os.ftruncate(descriptor, 4096)
memory = mmap.mmap(descriptor, 4096)
with open("{pid}", "w") as file:
    file.write(str(os.getpid()))
ctypes.PyDLL(None).sleep(100)  # with Python's lock held, as in MPI_Init
"""


def test_hanging_ends_at_the_deadline_and_leaves_nothing(play, tmp_path: Path) -> None:
    file, pid = DIRECTORY / f"mpich_shm_test_{os.getpid()}", tmp_path / "pid"
    play(HANG.format(file=file, pid=pid))
    began = time.monotonic()
    answer = ask(6)
    assert failure_of(answer) == ("late", "no answer within 6 s")
    assert time.monotonic() - began < 30
    assert not Path("/proc", pid.read_text()).exists()
    assert not file.exists()


def test_a_daemon_of_the_library_holds_nothing_up(play) -> None:
    """It keeps the outputs open when its parent has died."""
    play(
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
        "os._exit(7)"
    )
    began = time.monotonic()
    assert failure_of(ask(60)) == ("died", "ended with exit code 7")
    assert time.monotonic() - began < 15


def test_a_hanging_library_does_not_outlive_whoever_asks(play, tmp_path: Path) -> None:
    """The process ends itself if it is not killed at the deadline."""
    pid = tmp_path / "pid"
    play(HANG.format(file=tmp_path / "file", pid=pid))
    words = [sys.executable, "-m", "mpidist.info.rank", "with-mpi", "-4"]  # 5 s later: in 1 s
    ended = subprocess.run(words, timeout=30, check=False, capture_output=True)
    assert ended.returncode == 1
    assert ended.stdout == b""
