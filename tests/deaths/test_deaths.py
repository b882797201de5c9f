"""Whatever one rank does, the job ends in time, says who it was, and leaves nothing behind.

The jobs of all tests that were selected run a few at a time, since they mostly wait. The seconds
that they took are told at the end of

    python -m pytest tests/deaths/test_deaths.py -v

With ``--full`` each case is tried with all its numbers of ranks, and ``-o "deaths_sizes=2 3 4"``
tries all cases with these.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.deaths import endings, lifetimes, mismatches, pipelines, sharded
from tests.deaths.case import Case, Ending
from tests.deaths.matrix import Matrix, Outcome

pytestmark = [pytest.mark.mpirun, pytest.mark.usefixtures("matrices")]

CASES = (*endings.CASES, *lifetimes.CASES, *mismatches.CASES, *sharded.CASES, *pipelines.CASES)
FIRST = 20  # lines
FIRST_CASES = ("raise", "exit-0", "kill")
"""What happens most: tried on more ranks, and on hosts, in every run."""
WHO = r"rank ([\d, -]+) on [^ ,:]+ \(pid ([\d, -]+)\)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try each case on few ranks, with ``--full`` on more, or as the command line says."""
    if "size" not in metafunc.fixturenames:
        return
    asked = [int(size) for size in metafunc.config.getini("deaths_sizes").split()]
    jobs = [
        pytest.param(
            case,
            size,
            marks=[] if asked or size == 2 or case.name in FIRST_CASES else pytest.mark.full,
            id=f"{case.name}-{size}-ranks",
        )
        for case in CASES
        for size in asked or case.sizes
    ]
    metafunc.parametrize(("case", "size"), jobs)


def test_death(matrix: Matrix, case: Case, size: int) -> None:
    check(matrix.outcome(case, size), case, size)


# None of them needs the deadline, which is for init, too: over hosts that takes seconds.
@pytest.mark.parametrize(
    "case",
    [replace(case, timeout=30.0) for case in endings.CASES if case.name in FIRST_CASES],
    ids=lambda case: case.name,
)
def test_death_on_hosts(matrix_on_hosts: Matrix, case: Case) -> None:
    if case.name == "raise":
        case = replace(case, dumps=False)  # it writes down its own node's records, and asks nobody
    # Open MPI first writes 16 lines about a peer that has disconnected.
    check(matrix_on_hosts.outcome(case, 4), case, 4, first=40)


# The node of the stopped rank may be too late with its answer, and counts as silent then.
STOPPED = replace(
    next(case for case in endings.CASES if case.name == "stop"),
    timeout=8.0,
    within=25.0,
    sees=("not complete after 8 s",),
    blames="(?:Missing|Silent): rank <guilty>",
)


@pytest.mark.any_mpi
@pytest.mark.parametrize("case", [STOPPED], ids=lambda case: case.name)
def test_a_stopped_rank_of_another_host_is_reported(matrix_on_hosts: Matrix, case: Case) -> None:
    check(matrix_on_hosts.outcome(case, 4), case, 4, first=40)


def check(outcome: Outcome, case: Case, size: int, *, first: int = FIRST) -> None:
    """Check all that a case says of a job of so many ranks, whose first lines tell who it was."""
    ended = outcome.ended
    assert ended.code is not None, f"the job did not end by itself:\n{outcome}"
    assert outcome.seconds < case.within, outcome
    assert ended.left == [], outcome
    if case.ending is not Ending.ANY:
        assert (ended.code == 0) == (case.ending is Ending.GOOD), outcome
    for words in case.sees:
        assert re.search(case.pattern(words, size), ended.text), f"{words}\n{outcome}"
    assert_blamed(outcome, case, size, first)
    if first == FIRST:
        for name in case.sites:
            assert re.search(case.place(name), ended.text), f"{name}: {case.place(name)}\n{outcome}"
    if case.dumps:
        assert_dumped(outcome, size)
        assert_nothing_in_shared_memory(outcome)


def assert_blamed(outcome: Outcome, case: Case, size: int, first: int) -> None:
    """Check that the first lines tell which rank it was, the line that names all apart."""
    lines = [line.text for line in outcome.ended.lines[:first]]
    if case.launcher:
        assert_launcher_blames(outcome, case.guilty(size), first)
    elif case.blames is not None:
        pattern = case.pattern(case.blames, size)
        assert any(re.search(pattern, line) for line in lines), f"{pattern}\n{outcome}"


def assert_launcher_blames(outcome: Outcome, guilty: int, first: int) -> None:
    """Check that the process that the launcher names is one of those that `init` told.

    Open MPI names the one that was killed, sometimes with 0 for its process. MPICH kills the others
    before it looks, and names any of them.
    """
    head = "\n".join(line.text for line in outcome.ended.lines[:first])
    ranks = {
        str(pid): rank
        for node in re.findall(WHO, head)
        for rank, pid in zip(*map(numbers, node), strict=True)
    }
    found = re.search(r"(?:process rank (\d+) with )?PID (\d+)", head)
    assert found, f"no process is named:\n{outcome}"
    named, pid = found.groups()
    known = (ranks.get(pid), None if named is None else int(named))
    if pid != "0":
        assert known[0] is not None, f"no line of init's says which rank is {pid}:\n{outcome}"
    # Over hosts another rank may end first, when its connection to the one that was killed breaks.
    if named is not None and first == FIRST:
        assert set(known) - {None} == {guilty}, outcome


def numbers(text: str) -> list[int]:
    """Return what ``0-2, 5`` stands for."""
    runs = [part.split("-") for part in text.split(", ")]
    return [number for run in runs for number in range(int(run[0]), int(run[-1]) + 1)]


def assert_dumped(outcome: Outcome, size: int) -> None:
    """Check that somebody wrote the records of all ranks as JSON."""
    files = list(outcome.directory.glob("mpidist-report-*.json"))
    assert files, f"no records were written:\n{outcome}"
    for file in files:
        told = json.loads(file.read_text())["ranks"]
        assert [state["rank"] for state in told] == list(range(size)), file.read_text()


def assert_nothing_in_shared_memory(outcome: Outcome) -> None:
    """Check that a job which mpidist has ended leaves none of the MPI library's files there."""
    told = [file.read_text().split() for file in outcome.directory.glob("memory-*")]
    assert told, outcome
    assert [name for name in set().union(*told) if Path(name).exists()] == [], outcome
