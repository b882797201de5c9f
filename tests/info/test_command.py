"""``python -m mpidist info`` as a user runs it: alone, on ranks, and where MPI is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpidist.info import ask as asking
from mpidist.info.facts import FORMAT
from tests._ranks.launcher import clean_environment
from tests.info.test_facts import NAMES, names
from tests.test_small_shm import with_small_shm

pytestmark = pytest.mark.timeout(100)

ROOT = Path(__file__).parents[2]
INFO = [sys.executable, "-m", "mpidist", "info"]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )


def problems(report: dict[str, Any]) -> set[str]:
    return {problem["check"] for problem in report["problems"]}


@pytest.mark.mpirun
def test_one_rank_tells_which_mpi_there_would_be() -> None:
    answer = run(*INFO)
    assert answer.returncode == 0, answer.stderr
    sections = [line for line in answer.stdout.splitlines() if line and line[0] != " "]
    assert sections[0].endswith(" UTC")
    assert "1 rank on 1 node" in sections[0]
    host = os.uname().nodename
    assert sections[1:] == [
        "MPI",
        f"Node {host} (rank 0)",
        "Device arrays",
        "Software",
        "Settings",
        "Wrong",
    ]
    assert "MPI_THREAD_" in answer.stdout
    assert "none: no variable of a launcher is set" in answer.stdout


@pytest.mark.mpirun
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.full), 4])
def test_ranks_give_one_report(size: int, mpirun: list[str]) -> None:
    answer = run(*mpirun, "-n", str(size), *INFO, "--json")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    check_ranks(report, size)
    there = names(report)
    absent = {name for name in NAMES[FORMAT].split() if name not in there}
    # Where nothing has failed or been left, no GPU is, and mpidist is not installed.
    may_be = ("failure.", "problems.", "nodes.leftovers.", "nodes.gpus.", "ranks.versions.mpidist")
    assert [name for name in absent if not name.startswith(may_be)] == []


def check_ranks(report: dict[str, Any], size: int) -> None:
    """Check what a report says of so many ranks of this machine."""
    assert report["format"] == FORMAT
    assert [rank["rank"] for rank in report["ranks"]] == list(range(size))
    assert [node["ranks"] for node in report["nodes"]] == [list(range(size))]
    assert len({rank["pid"] for rank in report["ranks"]}) == size
    for rank in report["ranks"]:
        assert rank["library"]["size"] == rank["launch"]["size"] == size
        assert rank["library"]["vendor"] in rank["library"]["name"]
        assert Path(rank["library"]["path"]).is_file()
        assert rank["library"]["thread_level"] == "MPI_THREAD_MULTIPLE"
        assert rank["blas"]["threads"] in (1, None)  # as the variables say
        assert rank["settings"]["OMP_NUM_THREADS"] == "1"
    usable = len({core for rank in report["ranks"] for core in rank["cores"]})
    assert ("oversubscribed" in problems(report)) == (size > usable)
    assert not any(problem["fatal"] for problem in report["problems"])


@pytest.mark.any_mpi
@pytest.mark.mpirun
def test_the_crossovers_in_force_are_told_with_their_source(tmp_path: Path) -> None:
    report = json.loads(run(*INFO, "--json", MPIDIST_CROSSOVERS="small=7,scratch=never").stdout)
    assert report["crossovers"]["sizes"] == {"small": 7, "registered": 32768, "scratch": 2**62}
    assert report["crossovers"]["source"] == "MPIDIST_CROSSOVERS"
    nowhere = {"MPIDIST_CROSSOVERS": "", "XDG_CACHE_HOME": str(tmp_path)}
    report = json.loads(run(*INFO, "--json", **nowhere).stdout)
    assert report["crossovers"]["source"] == ""


@pytest.mark.any_mpi
@pytest.mark.mpirun
def test_crossovers_that_init_would_refuse_are_fatal() -> None:
    answer = run(*INFO, MPIDIST_CROSSOVERS="small=much")
    assert answer.returncode == 1
    assert "unusable: expected sizes in bytes" in answer.stdout


def test_a_missing_library_is_told() -> None:
    answer = run(*INFO, "--json", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert answer.returncode == 1
    report = json.loads(answer.stdout)
    assert report["failure"]["kind"] == "missing"
    assert "/nowhere/libmpi.so" in report["failure"]["reason"]
    assert "mpi_starts" in problems(report)
    assert report["ranks"][0]["library"] is None
    assert report["ranks"][0]["hdf5"]["version"]


@pytest.mark.mpirun
def test_a_missing_library_is_told_once_by_ranks(mpirun: list[str]) -> None:
    answer = run(*mpirun, "-n", "3", *INFO, MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert answer.returncode != 0
    assert answer.stdout.count("MPI cannot be loaded") == 1
    assert "3 processes that do not see each other; this is the first" in answer.stdout


def test_without_mpi4py(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('No module named mpi4py')")
    answer = run(*INFO, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert answer.returncode == 1
    assert "MPI cannot be loaded: No module named mpi4py" in answer.stdout


@pytest.mark.mpirun
@pytest.mark.parametrize(("process", "reports"), [("0", True), ("1", False)])
def test_ranks_that_srun_left_alone_give_one_report(process: str, reports: bool) -> None:
    answer = run(*INFO, "--json", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID=process)
    assert answer.returncode == reports
    if not reports:
        assert answer.stdout == ""
        return
    report = json.loads(answer.stdout)
    assert "lone_ranks" in problems(report)
    (problem,) = [each for each in report["problems"] if each["check"] == "lone_ranks"]
    open_mpi = report["ranks"][0]["library"]["vendor"] == "Open MPI"
    assert ("--mpi=pmix" if open_mpi else "--mpi=pmi2") in problem["cure"]


@pytest.mark.mpirun
def test_what_the_library_made_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI 5.0.11 leaves a file behind when it is started without a launcher."""
    for variable in os.environ.keys() - clean_environment().keys():
        monkeypatch.delenv(variable)
    removed: list[Path] = []
    remove = asking._remove

    def spy(files: Any) -> None:
        removed.extend(files)
        remove(removed)

    monkeypatch.setattr(asking, "_remove", spy)
    answer = asking.ask(60)
    assert answer.job is not None
    library = answer.job.first.library
    assert library is not None
    if library.vendor == "Open MPI":
        assert removed
    assert not any(file.exists() for file in removed)


def test_it_has_help() -> None:
    answer = run(*INFO, "--help")
    assert answer.returncode == 0
    assert "--json" in answer.stdout
    assert "--timeout" in answer.stdout


def test_a_deadline_must_be_a_time() -> None:
    for words in (["--timeout", "soon"], ["--timeout", "0"], ["--timeout", "nan"]):
        answer = run(*INFO, *words)
        assert answer.returncode == 2
        assert "--timeout" in answer.stderr


@pytest.mark.mpirun
def test_a_small_shm_is_told_whatever_the_library_does(mpirun: list[str]) -> None:
    """MPICH dies of it, Open MPI warns and does without."""
    answer = run(*with_small_shm(), *mpirun, "-n", "4", *INFO, "--json", "--timeout", "30")
    report = json.loads(answer.stdout[: answer.stdout.rindex("\n}") + 2])
    assert "shared_memory" in problems(report)
    assert report["nodes"][0]["shared"]["total"] == 1 << 20
    library = report["ranks"][0]["library"]
    if library is None:
        assert report["failure"]["reason"] == "ended by SIGBUS"
        assert "mpi_starts" in problems(report)
        assert answer.returncode != 0
    else:
        assert library["vendor"] == "Open MPI"
        assert len(report["ranks"]) == 4
