"""Jobs with device arrays end, whatever NCCL does, on the stub of libnccl."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests._ranks.launcher import clean_environment
from tests.nccl_stub.fixtures import needs_cupy

pytestmark = [needs_cupy, pytest.mark.cupy, pytest.mark.mpirun]

ROOT = Path(__file__).resolve().parents[2]

START = """
from tests.nccl_stub import stand_in
stand_in.install()
# Not within the deadline of init: a busy machine starts ranks one by one.
from mpi4py import MPI
import cupy, mpidist, mpidist.job.end
world = mpidist.init(timeout=1.0)
assert world.backend == "hybrid"
x = cupy.ones(1000)
"""

SECONDS = 25.0
"""How long all the jobs may take, which run at the same time."""


class Ending(NamedTuple):
    """What a job does, the faults that are ordered, and what it says where it fails."""

    program: str
    faults: str = ""
    words: tuple[str, ...] = ()


ENDINGS = {
    "well, without closing anything": Ending("mpidist.all_reduce(x, world, out=x)"),
    "with work that nobody waited for": Ending(
        "works = [mpidist.iall_reduce(x, world) for _ in range(3)]"
    ),
    "when all have had a rank's part, which does not wait for them": Ending(
        "import time\n"
        "if world.rank:\n"
        "    time.sleep(0.5)\n"
        "work = mpidist.iall_reduce(cupy.ones(100_000), world)  # of several chunks\n"
        "if world.rank:\n"
        "    assert work.synchronize().get().sum() == 200_000",
    ),
    "while an operation hangs that nobody waits for": Ending(
        "mpidist.all_reduce(x, world)", "hang:1:1", ("all_reduce", "not complete after 1 s")
    ),
    "after a deadline": Ending(
        "mpidist.iall_reduce(x, world).synchronize()",
        "hang:1:1",
        ("CollectiveTimeoutError", "all_reduce", "'world'"),
    ),
    "after CuPy has waited in vain": Ending(
        "mpidist.all_reduce(x, world, out=x); x.get(); mpidist.all_reduce(x, world)",
        "hang:0:1",
        ("Error: ", "all_reduce", "'world'"),
    ),
    "after a call has failed": Ending(
        "mpidist.iall_reduce(x, world).synchronize()",
        "fail:1:1",
        ("TransportError", "all_reduce", "'world', rank 1 of 2"),
    ),
    "after an asynchronous error": Ending(
        "mpidist.iall_reduce(x, world).synchronize()",
        "async:1:1",
        ("TransportError", "all_reduce", "'world', rank 1 of 2"),
    ),
    "while a rank does not come out of initialisation": Ending(
        "mpidist.all_reduce(x, world)",
        "hang-init:1",
        ("CollectiveTimeoutError", "all_reduce", "'world'"),
    ),
    "after initialisation has failed": Ending(
        "mpidist.all_reduce(x, world)",
        "fail-init:1",
        ("TransportError", "all_reduce", "'world'"),
    ),
}


@pytest.fixture(scope="module")
def jobs(
    mpirun: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Every job, started: they mostly wait."""
    started = {}
    for number, (name, ending) in enumerate(ENDINGS.items()):
        own = {
            "PYTHONPATH": str(ROOT),
            "NCCL_STUB_FAULTS": ending.faults,
            "TMPDIR": str(tmp_path_factory.mktemp(f"job-{number}")),
        }
        started[name] = subprocess.Popen(
            [*mpirun, "-n", "2", sys.executable, "-c", START + ending.program],
            env=clean_environment() | own,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield started
    for job in started.values():
        job.kill()
        job.communicate()


@pytest.mark.parametrize("name", ENDINGS)
def test_a_job_ends(name: str, jobs: dict[str, subprocess.Popen[str]]) -> None:
    words = ENDINGS[name].words
    _, errors = jobs[name].communicate(timeout=SECONDS)
    assert (jobs[name].returncode != 0) == bool(words), errors
    for each in words:
        assert each in errors
