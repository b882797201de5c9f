"""The jobs of the matrix, and the table of what they measured: ``pytest tests/deaths -v``.

The jobs of all cases that were selected start with the first test that asks for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.deaths.matrix import Matrix

MATRIX = pytest.StashKey[Matrix]()


@pytest.fixture(scope="package")
def matrices(request: pytest.FixtureRequest) -> None:
    """Start the jobs of both matrices at once; the tests that need them tell what is missing."""
    for name in ("matrix", "matrix_on_hosts"):
        if _parameters(request, name):
            with contextlib.suppress(pytest.skip.Exception, pytest.fail.Exception):
                request.getfixturevalue(name)


@pytest.fixture(scope="package")
def matrix(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mpirun: list[str]
) -> Iterator[Matrix]:
    """The jobs of the cases that were selected, in the order in which their tests ask."""
    selected = [(p["case"], p["size"]) for p in _parameters(request, "matrix")]
    jobs = Matrix(mpirun, tmp_path_factory.mktemp("deaths"), selected)
    request.config.stash[MATRIX] = jobs
    yield jobs
    jobs.close()


@pytest.fixture(scope="package")
def matrix_on_hosts(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    hosts_mpirun: Callable[[int, int], list[str]],
) -> Iterator[Matrix]:
    """The same on two hosts of two ranks."""
    selected = [(p["case"], 4) for p in _parameters(request, "matrix_on_hosts")]
    jobs = Matrix(hosts_mpirun(2, 2), tmp_path_factory.mktemp("deaths-on-hosts"), selected)
    yield jobs
    jobs.close()


def _parameters(request: pytest.FixtureRequest, fixture: str) -> list[dict[str, Any]]:
    """Return the parameters of all selected tests that use a fixture."""
    return [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and fixture in item.fixturenames
    ]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the seconds and the exit codes, from which docs/faults.rst is filled."""
    jobs = config.stash.get(MATRIX, None)
    if jobs is None or config.get_verbosity() < 1:
        return
    terminalreporter.section("seconds from the event to the end of the job, and its exit code")
    for (name, size), outcome in jobs.done().items():
        seconds = "never" if outcome.event is None else f"{outcome.seconds:5.1f} s"
        row = f"{name:24} {size} ranks {seconds:>8}  code {outcome.ended.code}"
        terminalreporter.write_line(row)
