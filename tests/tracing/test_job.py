"""MPIDIST_TRACE: the trace of a whole job, however the job ends."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from mpidist.tracing import session as session_module
from mpidist.tracing.parts import TracePart
from mpidist.tracing.session import Session, begin_job_trace
from mpidist.tracing.summary import load, summarise
from tests._ranks.launcher import clean_environment
from tests.tracing.format import check_trace

ROOT = Path(__file__).parents[2]

BEGIN = """
import os, signal, sys, time
import numpy as np
import mpidist
world = mpidist.init(timeout=20)
x = np.ones(100, np.float32)
for _ in range(5):
    with mpidist.region("step"):
        mpidist.all_reduce(x, world, out=x)
"""


def run(start: list[str], script: str, directory: Path, **more: str) -> Any:
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "MPIDIST_TRACE": str(directory)}
    return subprocess.run(
        [*start, sys.executable, "-c", script],
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def the_trace(directory: Path) -> Any:
    (path,) = directory.iterdir()
    assert path.name.startswith("trace-")
    document = load(path)
    check_trace(document)
    return summarise(document)


def parts_left(directory: Path) -> dict[int, list[str]]:
    (parts,) = directory.iterdir()
    found = [TracePart.of(path.read_bytes()) for path in parts.iterdir()]
    return {part.facts["rank"]: [row.what for row in part.rows()] for part in found}


def test_a_lone_process_is_traced_from_init_to_its_exit(tmp_path: Path) -> None:
    answer = run([], BEGIN + "world.close()", tmp_path / "new")
    assert answer.returncode == 0, answer.stderr
    summary = the_trace(tmp_path / "new")
    assert len(summary.steps) == 5
    assert summary.calls[0].calls == 5


def test_jobs_of_the_same_second_and_process_number_have_traces_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers, where every job may be process 1."""

    class Frozen(datetime):
        @classmethod
        def now(cls, _: Any = None) -> datetime:
            return datetime(2026, 1, 2, tzinfo=timezone.utc)

    monkeypatch.setattr(session_module, "datetime", Frozen)

    def begin(group: ProcessGroup) -> Session:
        begin_job_trace(str(tmp_path), group, lambda _: True)
        return session_module._job.pop()

    sessions = [run_ranks(1, begin)[0] for _ in range(2)]
    for session in sessions:
        session.end()
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.mpirun
@pytest.mark.timeout(70)
@pytest.mark.parametrize("end", ["", "world.close()", "sys.exit(0)"])
def test_a_job_is_traced_from_init_to_its_exit(mpirun: list[str], tmp_path: Path, end: str) -> None:
    answer = run([*mpirun, "-n", "3"], BEGIN + end, tmp_path)
    assert answer.returncode == 0, answer.stderr
    summary = the_trace(tmp_path)
    assert [rank.rank for rank in summary.ranks] == [0, 1, 2]
    assert len(summary.steps) == 5
    assert summary.notes == []


@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.timeout(70)
def test_what_rank_0_finds_in_the_environment_counts(mpirun: list[str], tmp_path: Path) -> None:
    script = (
        "import os\n"
        "rank = os.environ.get('PMI_RANK') or os.environ['OMPI_COMM_WORLD_RANK']\n"
        "if rank != '0':\n    del os.environ['MPIDIST_TRACE']\n"
    )
    answer = run([*mpirun, "-n", "2"], script + BEGIN, tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert [rank.rank for rank in the_trace(tmp_path).ranks] == [0, 1]


@pytest.mark.mpirun
@pytest.mark.timeout(70)
def test_a_rank_that_raises_leaves_all_there_is_to_be_merged(
    mpirun: list[str], tmp_path: Path
) -> None:
    script = BEGIN + (
        "time.sleep(2.5)\n"  # the other ranks' events are in their files by then
        "if world.rank == 1:\n    mpidist.recv(world, src=7)\n"
        "mpidist.barrier(world)\n"
    )
    answer = run([*mpirun, "-n", "3"], script, tmp_path)
    assert answer.returncode != 0
    assert "has left its part of the trace in" in answer.stderr
    left = parts_left(tmp_path)
    assert {rank: names.count("step") for rank, names in left.items()} == {0: 5, 1: 5, 2: 5}
    (parts,) = tmp_path.iterdir()
    merged = run(
        [], f"from mpidist.cli import main\nmain(['trace', 'merge', {str(parts)!r}])", tmp_path
    )
    assert merged.returncode == 0, merged.stderr
    document = load(parts.with_suffix(""))
    check_trace(document)
    assert len(summarise(document).steps) == 5
    assert len(document["otherData"]["notes"]) == 3


@pytest.mark.mpirun
@pytest.mark.timeout(70)
def test_a_rank_that_is_killed_leaves_what_was_written_in_time(
    mpirun: list[str], tmp_path: Path
) -> None:
    script = BEGIN + (
        "time.sleep(2.5)\n"
        "if world.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "mpidist.barrier(world)\n"
    )
    answer = run([*mpirun, "-n", "3"], script, tmp_path)
    assert answer.returncode != 0
    left = parts_left(tmp_path)
    assert {rank: names.count("step") for rank, names in left.items()} == {0: 5, 1: 5, 2: 5}


@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.timeout(70)
def test_a_directory_that_cannot_be_used_is_told_at_init(mpirun: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = run([*mpirun, "-n", "2"], BEGIN, tmp_path / "file" / "traces")
    assert answer.returncode != 0
    assert "LaunchError: init: there can be no MPIDIST_TRACE=" in answer.stderr
