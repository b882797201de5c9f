"""Nobody hangs: however a rank ends, the job ends with it, says so, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests._ranks.launcher import MARK, clean_environment, end_job, marked_processes

pytestmark = pytest.mark.mpirun

ROOT = Path(__file__).parents[1]
SIZE = 3
LIMIT = 10.0  # seconds from the event to the end of the job
START = 40.0  # seconds from mpirun to the event

HEAD = """
import os, signal, sys, threading, time
import numpy as np
import mpidist

world = mpidist.init()
x = np.ones(1000)
for _ in range(3):
    mpidist.all_reduce(x, world)

def work_for_ever():
    while True:
        mpidist.all_reduce(x, world, out=x, op=mpidist.ReduceOp.MAX)

os.write(1, f"ready {world.rank} {os.getpid()}\\n".encode())
"""


@dataclass
class Running:
    """An mpirun whose output is read as it comes."""

    process: subprocess.Popen[bytes]
    pids: dict[int, int] = field(default_factory=dict)
    text: str = ""
    ready: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        """Collect the output until it ends; note when all ranks are at the event."""
        assert self.process.stdout is not None
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            self.text += chunk.decode(errors="replace")
            found = re.findall(r"ready (\d+) (\d+)", self.text)
            self.pids = {int(rank): int(pid) for rank, pid in found}
            if len(self.pids) == SIZE:
                self.ready.set()
        self.ready.set()


@dataclass(frozen=True)
class Ended:
    """How a job ended, and how long after its event."""

    code: int
    text: str
    seconds: float


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, mpirun: list[str]) -> Iterator[Run]:
    """Run a script on ranks; call `event` with the job once all are ready."""
    jobs: list[Running] = []

    def run_job(body: str, event: Callable[[Running], None] = lambda _: None) -> Ended:
        script = tmp_path / "script.py"
        script.write_text(HEAD + body)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        job = Running(
            subprocess.Popen(
                [*mpirun, "-n", str(SIZE), sys.executable, str(script)],
                env=clean_environment()
                | {"PYTHONPATH": path, MARK: str(tmp_path), "MPIDIST_DUMP": str(tmp_path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        jobs.append(job)
        reader = threading.Thread(target=job.read, daemon=True)
        reader.start()
        assert job.ready.wait(START), f"the ranks did not start:\n{job.text}"
        began = time.monotonic()
        event(job)
        try:
            code = job.process.wait(timeout=LIMIT + 5)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job did not end:\n{job.text}")
        seconds = time.monotonic() - began
        reader.join(timeout=5)
        assert sorted(job.pids) == list(range(SIZE)), job.text
        return Ended(code, job.text, seconds)

    yield run_job
    for job in jobs:
        end_job(job.process, tmp_path)
        if job.process.stdout is not None:
            job.process.stdout.close()


def assert_ended_well(ended: Ended, directory: Path, *, said: str) -> None:
    """Check what holds for every end but the good one."""
    assert ended.code != 0, ended.text
    assert re.search(said, ended.text), ended.text
    assert ended.seconds < LIMIT, ended.text
    assert_nothing_left(directory)


def assert_nothing_left(directory: Path) -> None:
    """Check that no process of the job is alive, or is so only for a moment longer."""
    deadline = time.monotonic() + 2.0
    while (left := marked_processes(str(directory))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize(
    ("act", "said"),
    [
        pytest.param(
            'raise ValueError("no such luck")', "ValueError: no such luck", id="exception"
        ),
        pytest.param("sys.exit(0)", "rank 1 left", id="exit-0"),
        pytest.param("sys.exit(1)", "rank 1", id="exit-1"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", "", id="kill-9"),
        pytest.param("os.abort()", "", id="abort"),
    ],
)
def test_one_rank_ends_while_others_are_in_a_collective(
    run: Run, tmp_path: Path, act: str, said: str
) -> None:
    body = f"""
if world.rank == 1:
    {act}
else:
    work_for_ever()
"""
    assert_ended_well(run(body), tmp_path, said=said)


def test_collectives_in_exit_handlers(run: Run, tmp_path: Path) -> None:
    """No Python calls them, so that nobody is there who could be named as the caller."""
    body = """
import atexit
tell = lambda work: os.write(1, f"sum {work.wait()[0]}\\n".encode())
atexit.register(tell, mpidist.iall_reduce(x, world))
atexit.register(mpidist.barrier, world)
atexit.register(world.split, 0)
atexit.register(mpidist.iall_reduce(x, world).wait)
"""
    ended = run(body)
    assert ended.code == 0, ended.text
    assert "Traceback" not in ended.text
    assert ended.text.count(f"sum {float(SIZE)}") == SIZE
    assert_nothing_left(tmp_path)


def test_a_forked_child_that_raises_is_no_rank(run: Run, tmp_path: Path) -> None:
    """Such as a process that loads data: whoever started it sees how it ended."""
    body = """
if world.rank == 1:
    child = os.fork()
    if not child:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        os._exit(3)
    assert os.waitpid(child, 0)[1] == 3 << 8
mpidist.barrier(world)
"""
    ended = run(body)
    assert ended.code == 0, ended.text
    assert "ZeroDivisionError" in ended.text
    assert_nothing_left(tmp_path)


def test_exception_while_others_compute(run: Run, tmp_path: Path) -> None:
    body = """
if world.rank == 1:
    raise ValueError("no such luck")
time.sleep(60)
"""
    assert_ended_well(run(body), tmp_path, said="ValueError: no such luck")


def test_exit_while_others_compute_ends_the_job_at_their_next_collective(
    run: Run, tmp_path: Path
) -> None:
    """A rank that leaves early is no fault by itself: others may still write their results."""
    body = """
if world.rank == 1:
    sys.exit(0)
time.sleep(2)
work_for_ever()
"""
    assert_ended_well(run(body), tmp_path, said="rank 1 left")


def test_exception_in_a_thread(run: Run, tmp_path: Path) -> None:
    body = """
def fail():
    raise ValueError("no such luck")

if world.rank == 1:
    threading.Thread(target=fail).start()
work_for_ever()
"""
    assert_ended_well(run(body), tmp_path, said="ValueError: no such luck")


def test_a_rank_killed_from_outside(run: Run, tmp_path: Path) -> None:
    ended = run("work_for_ever()", lambda job: os.kill(job.pids[1], signal.SIGKILL))
    assert_ended_well(ended, tmp_path, said="")


def test_interrupt_to_mpirun(run: Run, tmp_path: Path) -> None:
    ended = run("work_for_ever()", lambda job: job.process.send_signal(signal.SIGINT))
    assert_ended_well(ended, tmp_path, said="")


def test_interrupt_from_the_terminal(run: Run, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all of its foreground group, not to mpirun alone."""
    ended = run("work_for_ever()", lambda job: os.killpg(job.process.pid, signal.SIGINT))
    assert_ended_well(ended, tmp_path, said="")


def test_all_ranks_exit_with_an_error(run: Run, tmp_path: Path) -> None:
    assert_ended_well(run("sys.exit(3)"), tmp_path, said="")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("", id="together"),
        pytest.param("time.sleep(2.0 * (world.rank == 1))", id="one-later"),
        pytest.param("world.close()", id="closed"),
        pytest.param("sys.exit(0)", id="exit-0"),
    ],
)
def test_all_ranks_end_normally(run: Run, tmp_path: Path, body: str) -> None:
    ended = run(body)
    assert ended.code == 0, ended.text
    assert "left" not in ended.text
    assert_nothing_left(tmp_path)


def test_a_rank_that_did_its_part_may_leave(run: Run, tmp_path: Path) -> None:
    """The others' operation completes without it, also when one comes later than the grace."""
    body = """
if world.rank == 2:
    time.sleep(5)
result = mpidist.reduce(np.full(3, float(world.rank)), world, op=mpidist.MAX)
work = mpidist.ireduce(np.full(3, 1.0), world)
if world.rank == 0:
    os.write(1, f"got {result[0]} and {work.wait()[0]}\\n".encode())
"""
    ended = run(body)
    assert ended.code == 0, ended.text
    assert "got 2.0 and 3.0" in ended.text


def test_arrays_of_dropped_work_on_a_dropped_group_are_held(run: Run, tmp_path: Path) -> None:
    body = """
import gc, weakref

def drop():
    group = world.split(0)
    x = np.ones(1 << 20)
    out = np.empty_like(x)
    if world.rank == 1:
        time.sleep(1)
    mpidist.iall_reduce(x, group, out=out)
    return weakref.ref(x), weakref.ref(out)

arrays = drop()
gc.collect()
assert all(array() is not None for array in arrays)
junk = [np.zeros(1 << 20) for _ in range(3)]
mpidist.barrier(world)
assert all((other == 0).all() for other in junk)
"""
    ended = run(body)
    assert ended.code == 0, ended.text


def test_worlds_of_some_and_then_of_all_ranks(run: Run, tmp_path: Path) -> None:
    body = """
from mpi4py import MPI

part = mpidist.init(comm=MPI.COMM_WORLD.Split(world.rank // 2), timeout=20)
again = mpidist.init(timeout=20)
mpidist.barrier(part)
mpidist.barrier(again)
"""
    ended = run(body)
    assert ended.code == 0, ended.text


def test_an_init_that_others_do_not_call_ends_the_job(run: Run, tmp_path: Path) -> None:
    body = """
if world.rank:
    mpidist.init(timeout=2)
else:
    time.sleep(60)
"""
    assert_ended_well(run(body), tmp_path, said="has been in init for")


def test_a_hook_that_was_there_before_is_called(run: Run, tmp_path: Path) -> None:
    body = """
from mpidist import hooks

hooks._installed._next_hook = lambda kind, error, trace: os.write(2, b"the old hook was here\\n")
if world.rank == 1:
    raise ValueError("no such luck")
work_for_ever()
"""
    assert_ended_well(run(body), tmp_path, said="the old hook was here")
