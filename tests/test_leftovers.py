"""Nothing made by mpidist is left in /dev/shm or the temporary directory, however a job ended.

Each job is an item of its own, and its number is the seed of all that is drawn for it; every second
one is killed at a random moment. Six of them belong to the suite. Fifty are run by

    python -m pytest tests/test_leftovers.py -o leftover_runs=50
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpidist.backends.node import shared_memory
from tests._ranks.launcher import MARK, clean_environment, end_job, marked_processes

pytestmark = [pytest.mark.mpirun, pytest.mark.timeout(100)]

ROOT = Path(__file__).parents[1]
SHARED = shared_memory.DIRECTORY
LIMIT = 60.0  # seconds for a job of less than one
OTHERS = 3.0  # seconds in which what a job of somebody else has there for a moment is gone
VICTIMS = ("the whole job", "one rank", "mpirun")

SCRIPT = """
import random, sys, time
from pathlib import Path

import numpy as np

import mpidist
from mpidist.backends.node import shared_memory

seed, seconds, directory, kind = sys.argv[1:]

class Lingering(shared_memory.NamedFile):
    __slots__ = ()

    def unlink(self):
        if Path(self.path).exists():
            time.sleep(0.2)
        super().unlink()

if kind == "lingering":
    shared_memory.SharedFile = Lingering

world = mpidist.init(timeout=20)
Path(directory, f"rank-{world.rank}").write_text(str(shared_memory.os.getpid()))
draw = random.Random(int(seed))  # the same on all ranks
end = time.monotonic() + float(seconds)
while mpidist.broadcast(np.array(time.monotonic() < end), world):
    x = world.empty(draw.randrange(1, 4 << 20), np.uint8)
    mpidist.all_reduce(x, world, out=x, op=mpidist.MAX)
    if draw.random() < 0.1:
        with world.duplicate("another") as another:
            another.empty(1 << 16)
"""


@dataclass
class Job:
    """A job that makes shared memory all the time, and what it may leave behind."""

    process: subprocess.Popen[bytes]
    size: int
    directory: Path
    temporary: Path

    def pids(self) -> list[int]:
        """Return the ranks that have come as far as to make memory."""
        return [int(file.read_text() or 0) for file in self.directory.glob("rank-*")]

    def left(self, *, but: set[Path]) -> list[str]:
        """Return what it has left: in /dev/shm by the names, elsewhere what no library made."""
        elsewhere = {path for path in self.temporary.iterdir() if not by_libraries(path.name)}
        return sorted(map(str, (ours() - but) | elsewhere))


def ours() -> set[Path]:
    """Return the files in /dev/shm with the names that mpidist gives."""
    return set(SHARED.glob(shared_memory.PREFIX + "*"))


def by_libraries(name: str) -> bool:
    """Whether an MPI library makes files of this name, which it leaves when it is killed."""
    return name.startswith(("mpich", "ompi", "prte", "pmix"))


@pytest.fixture
def start(tmp_path: Path, mpirun: list[str]) -> Iterator:
    """Start a job; end what is left of it after the test."""
    jobs: list[Job] = []

    def start_job(seed: int, *, size: int, seconds: float, kind: str = "as ever") -> Job:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # Not below tmp_path: Open MPI makes sockets there, whose names must be short.
        temporary = Path(tempfile.mkdtemp())
        arguments = [str(script), str(seed), str(seconds), str(tmp_path), kind]
        own = {"PYTHONPATH": path, "TMPDIR": str(temporary), MARK: str(tmp_path)}
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                [*mpirun, "-n", str(size), sys.executable, *arguments],
                env=clean_environment() | own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        jobs.append(Job(process, size, tmp_path, temporary))
        return jobs[-1]

    yield start_job
    for job in jobs:
        end_job(job.process, tmp_path)
        shutil.rmtree(job.temporary)


def kill(job: Job, victim: str, draw: random.Random) -> None:
    """Kill without warning, and wait until nobody of the job is there."""
    if victim == "one rank" and job.pids():
        chosen = [draw.choice(sorted(job.pids()))]
    elif victim == "mpirun":
        chosen = [job.process.pid]
    else:
        chosen = marked_processes(str(job.directory))
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        job.process.wait(timeout=10)
    end_job(job.process, job.directory)


def wait_until_ready(job: Job) -> None:
    """Wait until all ranks make memory."""
    end = time.monotonic() + LIMIT
    while len(job.pids()) < job.size and job.process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert len(job.pids()) == job.size, (job.directory / "output").read_text()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item per job."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(int(metafunc.config.getini("leftover_runs"))))


def test_a_job_leaves_nothing(seed, start):
    draw = random.Random(seed)
    before = ours()
    job = start(seed, size=draw.randint(2, 4), seconds=60 if seed % 2 else 0.5)
    what = "ended by itself"
    if seed % 2:
        victim, early = draw.choice(VICTIMS), draw.random() < 0.25
        if not early:
            wait_until_ready(job)
        moment = draw.uniform(0, 0.5)
        what = f"{victim} killed {moment:.3f} s after {'mpirun' if early else 'init'}"
        time.sleep(moment)
        kill(job, victim, draw)
    else:
        assert job.process.wait(LIMIT) == 0, (job.directory / "output").read_text()
    end = time.monotonic() + OTHERS
    while (left := job.left(but=before)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == [], f"job {seed} of {job.size} ranks, {what}"


def test_what_is_left_is_found(start):
    """The same with files that have a name for a while."""
    before = ours()
    job = start(0, size=2, seconds=60, kind="lingering")
    wait_until_ready(job)
    end = time.monotonic() + LIMIT
    while ours() <= before and time.monotonic() < end:
        time.sleep(0.01)
    kill(job, "the whole job", random.Random(0))
    left = job.left(but=before)
    for name in left:
        Path(name).unlink()
    assert len(left) == 1
