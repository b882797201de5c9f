"""The examples run as their first lines say: with python, under mpirun, and by pytest."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mpidist.testing import run_ranks
from tests._ranks.launcher import MARK, clean_environment, end_job
from tests.docs.pages import DOCS, EXAMPLES, EXAMPLES_DIRECTORY, ROOT

PYTEST = ["-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", "--rootdir"]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=[e.name for e in EXAMPLES])


def run(command: Sequence[object], directory: Path) -> str:
    """Run a command line and return its output; it must succeed and print no traceback."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=directory,
        env=clean_environment() | {"PYTHONPATH": path, MARK: str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=60)[0].decode()
    finally:
        end_job(process, directory)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def test_the_examples_are_found() -> None:
    assert [example.name[:2] for example in EXAMPLES] == ["00", "01", "02", "03", "04", "05"]


def said_by_rank_0(output: str, size: int) -> str:
    """Return the line that rank 0 prints, and nobody else."""
    (line,) = [line for line in output.splitlines() if line.startswith("[world ")]
    assert line.startswith(f"[world 0/{size}] ")
    return line


@each_example
def test_an_example_runs_as_one_rank(example: Path, tmp_path: Path) -> None:
    said_by_rank_0(run([sys.executable, example], tmp_path), 1)


@pytest.mark.any_mpi
@pytest.mark.mpirun
@each_example
def test_an_example_runs_on_four_ranks(example: Path, tmp_path: Path, mpirun: list[str]) -> None:
    line = said_by_rank_0(run([*mpirun, "-n", 4, sys.executable, example], tmp_path), 4)
    if example.name == "00_first.py":
        assert f"   {line}\n" in (DOCS / "quickstart.rst").read_text(encoding="utf-8")


def test_the_resumed_example_has_the_bits_of_one_run(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES_DIRECTORY / "03_resume.py"))["main"]
    whole = run_ranks(3, main, tmp_path / "whole", 100)
    run_ranks(3, main, tmp_path / "halves", 50)
    halves = run_ranks(3, main, tmp_path / "halves", 50)
    for name, array in whole[0].items():
        np.testing.assert_array_equal(halves[0][name], array)


def test_the_sharded_example_learns_and_holds_its_share() -> None:
    main = runpy.run_path(str(EXAMPLES_DIRECTORY / "04_fsdp.py"))["main"]
    unit, size = 4 * 64 * 65, 4
    whole = 3 * unit + 4 * (2 * 64 + 64 + 2 * 64 + 2)
    for loss, held in run_ranks(size, main, 64, 3, 40, node_memory=True):
        assert loss < 0.6  # by chance it is 0.69
        # Parameters, gradients and two arrays of state, cut at rows; and two buffers.
        assert held.total == pytest.approx(4 * whole / size + 2 * unit, rel=0.05)


def test_the_pipeline_example_learns_the_same_under_every_schedule() -> None:
    main = runpy.run_path(str(EXAMPLES_DIRECTORY / "05_pipeline.py"))["main"]
    results = [run_ranks(2, main, schedule, 25) for schedule in ("1f1b", "zb-h1")]
    losses = {loss for everyone in results for loss, _ in everyone}
    assert len(losses) == 1
    assert losses.pop() < 0.6  # by chance it is 0.69


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["test_mean.py"], id="mean"),
        # All cases are asked of this transport elsewhere.
        pytest.param(["test_transport.py", "-k", "barrier or all_reduce"], id="transport"),
    ],
)
def test_tests_without_mpi_pass(arguments: list[str], tmp_path: Path) -> None:
    name, *others = arguments
    run([sys.executable, *PYTEST, tmp_path, EXAMPLES_DIRECTORY / name, *others], tmp_path)


@pytest.mark.any_mpi
@pytest.mark.mpirun
def test_tests_on_ranks_pass(tmp_path: Path, mpirun: list[str]) -> None:
    test = EXAMPLES_DIRECTORY / "test_on_mpi.py"
    arguments = [*PYTEST, tmp_path, "--with-mpi", test]
    output = run([*mpirun, "-n", 3, sys.executable, *arguments], tmp_path)
    assert output.count("1 passed") == 3
