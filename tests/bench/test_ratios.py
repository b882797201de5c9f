"""The guard against losing what makes all_reduce fast, as a job of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._ranks.launcher import clean_environment

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.mpirun,
    pytest.mark.alone,
    pytest.mark.timeout(90),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each rank"),
]


def guard(mpirun: list[str], *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*mpirun, "-n", "2", sys.executable, "-m", "mpidist", "bench", "guard", *words],
        env=clean_environment() | {"PYTHONPATH": str(ROOT)} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )


@pytest.mark.any_mpi  # what is guarded is mpidist's; one library is enough
def test_all_reduce_is_as_fast_as_it_must_be(mpirun: list[str]) -> None:
    answer = guard(mpirun)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_guard_sees_that_memory_is_not_shared(mpirun: list[str]) -> None:
    """Ranks that take themselves for two nodes have no registered memory in common."""
    answer = guard(mpirun, "--attempts", "1", "--repeats", "20", MPIDIST_RANKS_PER_NODE="1")
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert "FAILED: registered all_reduce of 16 MiB" in answer.stdout
