"""The harness itself: what a plain pytest shows of tests that run on ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests._ranks.launcher import clean_environment, marked_processes

ROOT = Path(__file__).parents[1]
MARK = "MPIDIST_TEST_HARNESS"

HEAD = """
import os, signal, time
import pytest
from mpi4py import MPI
WORLD = MPI.COMM_WORLD
"""


@dataclass(frozen=True)
class Answer:
    """What a pytest of a sample printed, and how it ended."""

    code: int
    text: str
    seconds: float

    def outcome(self, test: str) -> str:
        """Return the outcome that -v printed for a test."""
        found = re.search(rf"::{re.escape(test)} ([A-Z]+)", self.text)
        assert found, f"{test} is not in:\n{self.text}"
        return found[1]

    def failure(self, test: str) -> str:
        """Return what was shown of a failed test."""
        _, _, rest = self.text.partition(f"_ {test} _")
        assert rest, f"no failure of {test} in:\n{self.text}"
        return re.split(r"\n_{5,} \S+ _{5,}\n|\n={5,} (?:XPASSES|short test summary)", rest)[0]


def run_sample(
    directory: Path,
    body: str,
    *arguments: str,
    head: str = HEAD,
    environment: Mapping[str, str] | None = None,
) -> Answer:
    """Run a sample module under a pytest of its own; no process of it may be left."""
    (directory / "test_sample.py").write_text(head + body)
    (directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nranks_grace = 1\n")
    start = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests._ranks.plugin", "-v", "-ra", *arguments],
        cwd=directory,
        env=clean_environment()
        | {"PYTHONPATH": str(ROOT), MARK: str(directory)}
        | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    seconds = time.monotonic() - start
    assert marked_processes(str(directory), name=MARK) == []
    return Answer(answer.returncode, answer.stdout, seconds)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Tests that end on all ranks, well or not."""
    body = """
@pytest.mark.ranks(2, 3)
def test_sum(rank_count):
    print("hello from", WORLD.rank)
    assert WORLD.allreduce(1) == WORLD.size == rank_count

@pytest.mark.ranks(2)
@pytest.mark.parametrize("x", ["a", "b"])
def test_skips(x):
    pytest.skip("not today")

@pytest.mark.ranks(2)
@pytest.mark.skipif(True, reason="never")
def test_skip_mark():
    pass

@pytest.mark.ranks(2)
@pytest.mark.xfail(strict=True)
def test_xfails():
    assert WORLD.rank < 0

@pytest.mark.ranks(2)
@pytest.mark.xfail(strict=True)
def test_xpasses():
    pass

@pytest.mark.ranks(2)
def test_fails_everywhere():
    assert WORLD.size == 17, "all are wrong"

class TestOfClass:
    pytestmark = pytest.mark.ranks(2)

    def test_method(self, tmp_path):
        paths = WORLD.allgather(str(tmp_path))
        assert len(set(paths)) == 2

def test_plain():
    pass

@pytest.mark.ranks(2)
def test_same_job(request):
    pids = WORLD.allgather(os.getpid())
    assert len(set(pids)) == 2
"""
    return run_sample(tmp_path_factory.mktemp("ordinary"), body)


@pytest.mark.mpirun
class TestOrdinary:
    @pytest.mark.parametrize(
        ("test", "outcome"),
        [
            ("test_sum[2ranks]", "PASSED"),
            ("test_sum[3ranks]", "PASSED"),
            ("test_skips[2ranks-a]", "SKIPPED"),
            ("test_skip_mark[2ranks]", "SKIPPED"),
            ("test_xfails[2ranks]", "XFAIL"),
            ("test_xpasses[2ranks]", "FAILED"),
            ("test_fails_everywhere[2ranks]", "FAILED"),
            ("TestOfClass::test_method[2ranks]", "PASSED"),
            ("test_plain", "PASSED"),
            ("test_same_job[2ranks]", "PASSED"),
        ],
    )
    def test_each_test_is_an_item(self, ordinary: Answer, test: str, outcome: str) -> None:
        assert ordinary.outcome(test) == outcome

    def test_equal_tracebacks_are_shown_once(self, ordinary: Answer) -> None:
        shown = ordinary.failure("test_fails_everywhere[2ranks]")
        assert "ranks 0, 1 of 2, call" in shown
        assert shown.count("E       AssertionError: all are wrong") == 1

    def test_reason_of_a_skip_is_shown(self, ordinary: Answer) -> None:
        assert re.search(r"SKIPPED \[2\] \S*test_sample.py:\d+: not today", ordinary.text)

    def test_exit_code_is_that_of_failed_tests(self, ordinary: Answer) -> None:
        assert ordinary.code == pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Tests that end on some ranks only; each is followed by one that must still pass."""
    body = """
@pytest.mark.ranks(2)
def test_one_fails():
    print("said before it")
    WORLD.Barrier()
    assert WORLD.rank == 0, "rank one is wrong"

@pytest.mark.ranks(2)
def test_after_one():
    assert WORLD.allreduce(1) == 2

@pytest.mark.ranks(2)
def test_aborts():
    print("about to abort")
    if WORLD.rank == 0:
        os.abort()
    WORLD.Barrier()

@pytest.mark.ranks(2)
def test_after_abort():
    assert WORLD.allreduce(1) == 2

@pytest.mark.ranks(2)
def test_is_killed():
    if WORLD.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    WORLD.Barrier()

@pytest.mark.ranks(2)
@pytest.mark.timeout(1)
def test_hangs():
    if WORLD.rank == 1:
        WORLD.recv(source=0)

@pytest.mark.ranks(2)
def test_ranks_disagree():
    if WORLD.rank == 1:
        pytest.skip("not me")

@pytest.mark.ranks(2)
def test_at_the_end():
    assert WORLD.allreduce(1) == 2
"""
    return run_sample(tmp_path_factory.mktemp("broken"), body)


@pytest.mark.mpirun
class TestBroken:
    @pytest.mark.parametrize(
        ("test", "said"),
        [
            ("test_one_fails", ["rank 1 of 2, call", "rank one is wrong", "said before it"]),
            ("test_aborts", ["the job ended while this test ran", "about to abort", "Aborted"]),
            ("test_is_killed", ["the job ended while this test ran", "output of mpirun"]),
            (
                "test_hangs",
                [
                    "rank 1 did not end within the deadline of 1 s",
                    "stacks of rank 1",
                    "in test_hangs",
                ],
            ),
            ("test_ranks_disagree", ["the ranks disagree: rank 0 passed, rank 1 skipped"]),
        ],
    )
    def test_failure_says(self, broken: Answer, test: str, said: list[str]) -> None:
        assert broken.outcome(f"{test}[2ranks]") == "FAILED"
        shown = broken.failure(f"{test}[2ranks]")
        assert [words for words in said if words not in shown] == []

    @pytest.mark.parametrize("test", ["test_after_one", "test_after_abort", "test_at_the_end"])
    def test_the_rest_goes_on(self, broken: Answer, test: str) -> None:
        assert broken.outcome(f"{test}[2ranks]") == "PASSED"


@pytest.mark.mpirun
def test_ranks_that_wait_for_a_failed_one_are_ended(tmp_path: Path) -> None:
    body = """
@pytest.mark.ranks(2)
def test_leaves():
    if WORLD.rank == 1:
        raise ValueError("left the others")
    WORLD.Barrier()
"""
    answer = run_sample(tmp_path, body)
    shown = answer.failure("test_leaves[2ranks]")
    assert "ValueError: left the others" in shown
    assert "rank 0 did not end within 1 s of the failure above" in shown
    assert answer.seconds < 50  # the deadline of a test on ranks is 60


@pytest.mark.mpirun
def test_only_selected_tests_run_on_ranks(tmp_path: Path) -> None:
    body = """
@pytest.mark.ranks(2)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_n(n):
    open(f"ran-{n}", "w").close()
"""
    answer = run_sample(tmp_path, body, "-k", "2ranks-3 or 2ranks-1", "--durations=3")
    assert answer.code == 0
    assert sorted(path.name for path in tmp_path.glob("ran-*")) == ["ran-1", "ran-3"]


@pytest.mark.mpirun
def test_a_job_that_does_not_end_well_fails_its_last_test(tmp_path: Path) -> None:
    body = """
import atexit

@pytest.mark.ranks(2)
def test_leaves_a_mine():
    if WORLD.rank == 1:
        atexit.register(os._exit, 3)
"""
    answer = run_sample(tmp_path, body)
    assert "after this test, the last one, the job" in answer.failure("test_leaves_a_mine[2ranks]")


def test_ranks_that_cannot_start_fail_once(tmp_path: Path) -> None:
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.write_text(f"#!/bin/sh\necho start >> {tmp_path}/starts\necho no slots left\nexit 5\n")
    mpirun.chmod(0o755)
    answer = run_with_other_mpirun(tmp_path, f"{mpirun.parent}:{os.environ['PATH']}")
    assert "mpirun's exit code is 5" in answer.failure("test_first[2ranks]")
    assert "no slots left" in answer.failure("test_second[2ranks]")
    # Once for its version, once for the tests.
    assert (tmp_path / "starts").read_text().count("start") == 2


@pytest.mark.parametrize(("required", "outcome"), [("0", "SKIPPED"), ("1", "FAILED")])
def test_without_mpirun(tmp_path: Path, required: str, outcome: str) -> None:
    answer = run_with_other_mpirun(tmp_path, "/nowhere", MPIDIST_TEST_REQUIRE_MPI=required)
    assert answer.outcome("test_first[2ranks]") == outcome
    assert answer.outcome("test_second[2ranks]") == outcome
    assert "no mpirun: pip install 'mpidist[mpich]'" in answer.text


def run_with_other_mpirun(directory: Path, path: str, **environment: str) -> Answer:
    """Run two tests on ranks, as if no mpirun stood beside the interpreter."""
    head = """
import sys
import pytest
sys.executable = "/nowhere/python"  # so that no mpirun stands beside it
"""
    body = """
@pytest.mark.ranks(2)
def test_first():
    pass

@pytest.mark.ranks(2)
def test_second():
    pass
"""
    return run_sample(directory, body, head=head, environment={"PATH": path, **environment})


@pytest.mark.mpirun
def test_direct_run_takes_the_tests_for_its_size(tmp_path: Path, mpirun: list[str]) -> None:
    body = """
@pytest.mark.ranks(1, 2)
def test_small(rank_count):
    assert WORLD.allreduce(1) == rank_count

@pytest.mark.ranks(3)
def test_three():
    assert WORLD.allreduce(1) == 3

def test_plain():
    pass
"""
    answer = run_directly(mpirun, tmp_path, body)
    assert answer.code == 0, answer.text
    # Both ranks print to one place, so that longer texts may be torn.
    assert answer.text.count("1 passed, 3 deselected") == 2


@pytest.mark.mpirun
def test_direct_run_ends_when_one_rank_fails(tmp_path: Path, mpirun: list[str]) -> None:
    body = """
@pytest.mark.ranks(2)
def test_one_fails():
    assert WORLD.rank == 0, "rank one is wrong"

@pytest.mark.ranks(2)
def test_waits():
    WORLD.Barrier()
"""
    answer = run_directly(mpirun, tmp_path, body)
    assert answer.code != 0
    assert re.search(r"rank 1: E +AssertionError: rank one is wrong", answer.text)
    assert answer.seconds < 50  # the deadline of a test on ranks is 60


def run_directly(mpirun: list[str], directory: Path, body: str) -> Answer:
    """Run a sample under `mpirun -n 2 python -m pytest --with-mpi`."""
    (directory / "test_sample.py").write_text(HEAD + body)
    start = time.monotonic()
    start_ranks = [*mpirun, "-n", "2", sys.executable]
    answer = subprocess.run(
        [
            *start_ranks,
            "-m",
            "pytest",
            "-v",
            "--color=no",
            "--with-mpi",
            "-p",
            "tests._ranks.plugin",
        ],
        cwd=directory,
        env=clean_environment() | {"PYTHONPATH": str(ROOT), MARK: str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert marked_processes(str(directory), name=MARK) == []
    return Answer(answer.returncode, answer.stdout, time.monotonic() - start)


@pytest.mark.parametrize("name", ["PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID"])
def test_children_see_no_other_launcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert name not in clean_environment()
    assert clean_environment()["OMP_NUM_THREADS"] == "1"
