"""What a plain run leaves out, and what a busy machine does to deadlines.

A test marked ``full``, or a parameter of a test, is long or asks once more what another test asks
with other numbers. It runs with ``--full``, as in ``.ci/run full``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

__all__ = ["full"]

_DEADLINE = re.compile(
    r"TimeoutExpired|TimeoutError|DeadlineError|Timeout[ :>]|timed out|deadline of|"
    r"not complete after|did not (?:end|begin)|did not end by itself",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs everything."""
    parser.addoption(
        "--full", action="store_true", help="run the tests, and parameters, marked full, too"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line("markers", "full: it is long or repeats others, and runs with --full")


def pytest_report_header() -> str:
    """Say how busy the machine is before the tests start."""
    return f"machine: {_load()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a full run is to run."""
    if config.getoption("full"):
        return
    left = [item for item in items if item.get_closest_marker("full") is not None]
    items[:] = [item for item in items if item.get_closest_marker("full") is None]
    config.hook.pytest_deselected(items=left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say of a test that failed by a deadline that load may be why."""
    report = yield
    if report.failed and _DEADLINE.search(report.longreprtext):
        text = (
            f"A deadline is among what failed here; a busy machine may be why: {_load()}.\n"
            "Run the test again by itself before you look for another reason."
        )
        report.sections.append(("load", text))
    return report


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether everything is to run, at length."""
    return bool(request.config.getoption("full"))


def _load() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"load average {os.getloadavg()[0]:.1f} on {cores} cores"
