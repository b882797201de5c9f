"""Nobody hangs: however a rank ends, the job ends with it, says so, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests._ranks.launcher import default_dispositions
from tests.deaths.job import Ended, Job

pytestmark = pytest.mark.mpirun

SIZE = 3
LIMIT = 10.0  # seconds from the event to the end of the job

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
while not os.path.exists("go"):  # mpirun may drop what it has not passed on when a rank dies
    time.sleep(0.01)
"""

Event = Callable[[Job, dict[int, int]], None]
"""What is done to a job, and to its processes by rank."""


@dataclass(frozen=True)
class Run:
    """Runs a script on ranks, and does something to them once all are ready."""

    mpirun: list[str]
    directory: Path
    jobs: list[Job]

    def __call__(
        self, body: str, event: Event = lambda job, pids: None, **variables: str
    ) -> tuple[Ended, float]:
        """Return how the job ended, and how many seconds after the event."""
        # As most users have it: reports go to the current directory, and only where one is due.
        environment = {"MPIDIST_DUMP": "", **variables}
        with default_dispositions():
            job = Job(self.mpirun, SIZE, HEAD + body, self.directory, environment)
        self.jobs.append(job)
        found = job.until(r"ready (\d+) (\d+)", SIZE)
        began = time.monotonic()
        (self.directory / "go").touch()
        event(job, {int(rank): int(pid) for rank, pid in (each.groups() for each in found)})
        ended = job.end(LIMIT + 5)
        return ended, ended.time - began


@pytest.fixture
def run(tmp_path: Path, mpirun: list[str]) -> Iterator[Run]:
    jobs: list[Job] = []
    yield Run(mpirun, tmp_path, jobs)
    for job in jobs:
        job.kill()


def assert_ends_badly(ended: tuple[Ended, float], *, said: str) -> None:
    """Check what holds for every end but the good one."""
    job, seconds = ended
    assert job.code not in (0, None), job.text
    assert re.search(said, job.text), job.text
    assert seconds < LIMIT, job.text
    assert job.left == [], job.text


def assert_ends_well(ended: tuple[Ended, float]) -> str:
    """Check that nothing is wrong, and return the output."""
    job, _ = ended
    assert job.code == 0, job.text
    assert job.left == [], job.text
    return job.text


def test_abort_of_a_rank(run: Run) -> None:
    body = """
if world.rank == 1:
    os.abort()
work_for_ever()
"""
    assert_ends_badly(run(body), said="")


def test_collectives_in_exit_handlers(run: Run) -> None:
    """No Python calls them, so that nobody is there who could be named as the caller."""
    body = """
import atexit
tell = lambda work: os.write(1, f"sum {work.wait()[0]}\\n".encode())
atexit.register(tell, mpidist.iall_reduce(x, world))
atexit.register(mpidist.barrier, world)
atexit.register(world.split, 0)
atexit.register(mpidist.iall_reduce(x, world).wait)
"""
    text = assert_ends_well(run(body))
    assert "Traceback" not in text
    assert text.count(f"sum {float(SIZE)}") == SIZE


def test_a_forked_child_that_raises_is_no_rank(run: Run) -> None:
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
    text = assert_ends_well(run(body, MPIDIST_LOG="warning"))
    assert "ZeroDivisionError" in text
    assert "mpidist: rank 0" not in text


def test_exception_while_others_compute(run: Run) -> None:
    body = """
if world.rank == 1:
    raise ValueError("no such luck")
time.sleep(60)
"""
    ended = run(body)
    assert_ends_badly(ended, said="ValueError: no such luck")
    assert "waits" not in ended[0].text
    assert list(run.directory.glob("mpidist-report-*")) == []  # nobody hung


def test_the_same_mistake_on_all_ranks_is_told_once(run: Run) -> None:
    body = """
def step():
    mpidist.all_reduce(x, world, out=np.empty(4))

step()
"""
    ended = run(body)
    assert_ends_badly(
        ended, said=r"mpidist: ranks 0-2 raised the same: \S+SizeMismatchError: all_r"
    )
    text = ended[0].text
    assert text.count("Traceback") == text.count("out must have shape") == 1
    assert text.count("in step") == 1
    assert "_reductions.py" not in text
    assert "last operation" not in text  # all are in the traceback
    assert list(run.directory.glob("mpidist-report-*")) == []


def test_exit_while_others_compute_ends_the_job_at_their_next_collective(
    run: Run,
) -> None:
    """A rank that leaves early is no fault by itself: others may still write their results."""
    body = """
if world.rank == 1:
    sys.exit(0)
time.sleep(2)
work_for_ever()
"""
    assert_ends_badly(run(body), said="rank 1 left")


def test_exception_in_a_thread(run: Run) -> None:
    body = """
def fail():
    raise ValueError("no such luck")

if world.rank == 1:
    threading.Thread(target=fail).start()
work_for_ever()
"""
    assert_ends_badly(run(body), said="ValueError: no such luck")


def test_a_rank_killed_from_outside(run: Run) -> None:
    ended = run("work_for_ever()", lambda job, pids: os.kill(pids[1], signal.SIGKILL))
    assert_ends_badly(ended, said="")


def test_interrupt_to_mpirun(run: Run) -> None:
    ended = run("work_for_ever()", lambda job, pids: job.process.send_signal(signal.SIGINT))
    assert_ends_badly(ended, said="")


def test_interrupt_from_the_terminal(run: Run) -> None:
    """A terminal sends Ctrl-C to all of its foreground group, not to mpirun alone."""
    ended = run("work_for_ever()", lambda job, pids: os.killpg(job.process.pid, signal.SIGINT))
    assert_ends_badly(ended, said="")


def test_all_ranks_exit_with_an_error(run: Run) -> None:
    assert_ends_badly(run("sys.exit(3)"), said="")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("", id="together"),
        pytest.param("time.sleep(2.0 * (world.rank == 1))", id="one-later"),
        pytest.param("world.close()", id="closed"),
        pytest.param("sys.exit(0)", id="exit-0"),
    ],
)
def test_all_ranks_end_normally(run: Run, body: str) -> None:
    text = assert_ends_well(run(body))
    assert "left" not in text
    assert re.search(r"^mpidist: rank 0-2 on \S+ \(pid [\d, -]+\)$", text, re.MULTILINE)


def test_a_rank_that_did_its_part_may_leave(run: Run) -> None:
    """The others' operation completes without it, also when one comes later than the grace."""
    body = """
if world.rank == 2:
    time.sleep(5)
result = mpidist.reduce(np.full(3, float(world.rank)), world, op=mpidist.MAX)
work = mpidist.ireduce(np.full(3, 1.0), world)
if world.rank == 0:
    os.write(1, f"got {result[0]} and {work.wait()[0]}\\n".encode())
"""
    assert "got 2.0 and 3.0" in assert_ends_well(run(body))


@pytest.mark.alone
def test_arrays_of_dropped_work_on_a_dropped_group_are_held(run: Run) -> None:
    """And however many are outstanding at the end of the program, the job ends soon and well."""
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

group = world.duplicate("many")
for _ in range(4000):
    mpidist.iall_reduce(np.ones(10), group)
del group
"""
    assert_ends_well(run(body))


def test_worlds_of_some_and_then_of_all_ranks(run: Run) -> None:
    body = """
from mpi4py import MPI

part = mpidist.init(comm=MPI.COMM_WORLD.Split(world.rank // 2), timeout=20)
again = mpidist.init(timeout=20)
mpidist.barrier(part)
mpidist.barrier(again)
"""
    assert_ends_well(run(body))


def test_an_init_that_others_do_not_call_ends_the_job(run: Run) -> None:
    body = """
if world.rank:
    mpidist.init(timeout=2)
else:
    time.sleep(60)
"""
    assert_ends_badly(run(body), said="has been in init for")


def test_a_hook_that_was_there_before_is_called(run: Run) -> None:
    body = """
from mpidist.job import end

end._installed._next_hook = lambda kind, error, trace: os.write(2, b"the old hook was here\\n")
if world.rank == 1:
    raise ValueError("no such luck")
work_for_ever()
"""
    assert_ends_badly(run(body), said="the old hook was here")
