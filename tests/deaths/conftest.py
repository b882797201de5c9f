"""The jobs of the matrix, and the table of what they measured: ``pytest tests/deaths -v``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deaths.matrix import Matrix

MATRIX = pytest.StashKey[Matrix]()


@pytest.fixture(scope="module")
def matrix(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mpirun: list[str]
) -> Iterator[Matrix]:
    """The jobs of the cases that were selected, in the order in which their tests ask."""
    selected = [
        (item.callspec.params["case"], item.callspec.params["size"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and "matrix" in item.fixturenames
    ]
    jobs = Matrix(mpirun, tmp_path_factory.mktemp("deaths"), selected)
    request.config.stash[MATRIX] = jobs
    yield jobs
    jobs.close()


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
