"""What a plain run leaves out, and what is said of deadlines on a busy machine."""

from __future__ import annotations

import subprocess

import pytest

from tests.__main__ import PARALLEL, main

pytest_plugins = ["pytester"]

SAMPLE = """
import pytest

@pytest.mark.full
def test_long():
    pass

@pytest.mark.parametrize("size", [2, pytest.param(8, marks=pytest.mark.full)])
def test_sizes(size):
    pass

def test_fixture(full):
    print("full is", full)
"""

LATE = """
def test_late():
    raise TimeoutError("the answer did not arrive")

def test_wrong():
    assert 1 == 2
"""


SLOW = """
import time

def test_slow():
    time.sleep(60)

def test_after():
    pass
"""

RANKS = """
import pytest

@pytest.mark.ranks(2, full=(4,))
def test_ranks():
    pass
"""


def run(pytester: pytest.Pytester, source: str, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess("-p", "tests.tiers", "-s", *arguments)


def test_a_plain_run_leaves_out_what_is_marked(pytester: pytest.Pytester) -> None:
    result = run(pytester, SAMPLE)
    result.assert_outcomes(passed=2, deselected=2)
    result.stdout.fnmatch_lines(["*full is False*"])


def test_a_full_run_leaves_out_nothing(pytester: pytest.Pytester) -> None:
    result = run(pytester, SAMPLE, "--full")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines(["*full is True*"])


@pytest.mark.parametrize(("options", "sizes"), [([], ["2"]), (["--full"], ["2", "4"])])
def test_numbers_of_ranks_may_be_for_a_full_run(
    pytester: pytest.Pytester, options: list[str], sizes: list[str]
) -> None:
    result = run(pytester, RANKS, "-p", "tests._ranks.plugin", "--collect-only", "-q", *options)
    collected = [line for line in result.outlines if "::" in line]
    assert [line.partition("[")[2] for line in collected] == [f"{n}ranks]" for n in sizes]


def test_a_failed_deadline_says_how_busy_the_machine_is(pytester: pytest.Pytester) -> None:
    result = run(pytester, LATE)
    result.assert_outcomes(failed=2)
    told = [line for line in result.outlines if "a busy machine may be why" in line]
    assert len(told) == 1, result.outlines
    assert "load average" in told[0]


@pytest.mark.parametrize(
    ("codes", "code"),
    [((0, 0), 0), ((1, 0), 1), ((0, 2), 2), ((5, 0), 0), ((5, 5), 5), ((1, 5), 1)],
)
def test_the_parts_of_a_run_select_each_test_once(
    monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], code: int
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        subprocess, "call", lambda words: (commands.append(words), codes[len(commands) - 1])[1]
    )
    assert main(["-q", "-m", "cupy", "tests/nn"]) == code
    marks = [words[words.index("-m", 3) + 1] for words in commands]
    assert marks[0] == f"(cupy) and (not ({marks[1].removeprefix('(cupy) and (')})"
    assert all(words[-2:] == ["-q", "tests/nn"] for words in commands)


def test_a_deadline_in_the_parallel_part_ends_one_test_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SLOW)
    result = pytester.runpytest_subprocess("-n", "1", *PARALLEL, "--timeout", "1", timeout=60)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*Timeout (>1.0s)*", "FAILED*test_slow*"])
