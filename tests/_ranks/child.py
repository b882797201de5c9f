"""The pytest hooks inside one rank of a job that the outer run started."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import pytest

from tests._ranks.launcher import MARK
from tests._ranks.records import Outcome, Phase, overall

STACKS_SIGNAL = signal.SIGRTMIN + 7
"""Asks a rank for the stacks of its threads; answered in C, so inside a blocked collective too."""

_BACKSTOP = 15.0  # seconds after a test's deadline; only if the outer run is no longer there to act


def rank_from_environment() -> int:
    """Return this process's rank as its launcher wrote it, without starting MPI."""
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    raise RuntimeError("no launcher's rank in the environment: was this process started by mpirun?")


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Turn this rank's output, also that of C code, into a file of its own."""
    directory, rank = Path(os.environ[MARK]), rank_from_environment()
    output = os.open(directory / f"rank-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    early_config.pluginmanager.register(RankPlugin(directory, rank), "ranks-rank")


class RankPlugin:
    """Record this rank's outcomes, one JSON line each, and pass the gate after every test."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        plan = json.loads((directory / "plan.json").read_text())
        self._size: int = plan["size"]
        self._deadlines: dict[str, float] = plan["tests"]
        self._phases: list[Phase] = []
        self._lines: IO[str] = (directory / f"rank-{rank}.jsonl").open("a", buffering=1)
        self._stacks: IO[str] = (directory / f"rank-{rank}.stacks").open("a")
        with (directory / "gate").open("r+b") as gate:
            self._gate = mmap.mmap(gate.fileno(), 0)
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        self._write(what="hello", pid=os.getpid())

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Give this rank a base directory for tmp_path that no other rank numbers or cleans."""
        config.option.basetemp = str(self._directory / f"tmp-{self._rank}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the planned tests, in the plan's order, on all ranks."""
        by_id = {item.nodeid: item for item in items}
        items[:] = [by_id[test] for test in self._deadlines if test in by_id]
        for item in items:
            # pytest-timeout would end this rank alone; the outer run watches all of them.
            item.add_marker(pytest.mark.timeout(0), append=False)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Announce the test, run it, and wait for the other ranks."""
        deadline = self._deadlines[item.nodeid]
        self._phases = []
        self._write(what="start", test=item.nodeid, offset=os.fstat(1).st_size)
        faulthandler.dump_traceback_later(deadline + _BACKSTOP, exit=True, file=self._stacks)
        answer = yield
        self._pass_gate(list(self._deadlines).index(item.nodeid), overall(self._phases))
        faulthandler.cancel_dump_traceback_later()
        return answer

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Refuse N jobs of one rank each, which would pass every test of an empty world."""
        from mpi4py import MPI

        if MPI.COMM_WORLD.size != self._size:
            pytest.exit(
                f"mpirun was asked for {self._size} ranks and MPI sees {MPI.COMM_WORLD.size}: "
                "mpi4py uses another MPI library than mpirun"
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self) -> tuple[str, str, str]:
        """Print no progress: this rank's output is shown where it helps to explain a failure."""
        return "", "", ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a phase the moment it is over: a failure is known while other ranks still wait."""
        phase = phase_of(report, self._rank)
        self._phases.append(phase)
        self._lines.write(phase.line() + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Exit with 0 after failed tests, which are recorded: Open MPI kills a job for less."""
        if session.exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = pytest.ExitCode.OK

    def _write(self, **fields: Any) -> None:
        self._lines.write(json.dumps({"rank": self._rank, **fields}) + "\n")

    def _pass_gate(self, index: int, outcome: Outcome) -> None:
        """See [Note: the gate]."""
        row = slice(index * self._size, (index + 1) * self._size)
        self._gate[row.start + self._rank] = outcome.value
        pause = 0.0005
        while set(self._gate[row]) != {outcome.value}:
            time.sleep(pause)
            pause = min(2 * pause, 0.01)


def phase_of(report: pytest.TestReport, rank: int) -> Phase:
    """Return what there is to say about a phase."""
    outcome = Outcome[report.outcome.upper()]
    text, message = report.longreprtext, ""
    if hasattr(report, "wasxfail"):
        outcome = Outcome.XFAILED if report.skipped else Outcome.PASSED
        message = report.wasxfail.removeprefix("reason: ")
    elif text.startswith("[XPASS(strict)]"):
        # The outer run sees the same xfail mark and comes to the same verdict from a plain pass.
        outcome = Outcome.PASSED
    elif isinstance(report.longrepr, tuple):
        message = report.longrepr[2].removeprefix("Skipped: ")
    elif report.longrepr is not None:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else text.strip().rpartition("\n")[2]
    # Sections, "Captured stdout call", pile up over the phases: each belongs to the one it names.
    sections = tuple(
        (title.removeprefix("Captured ").removesuffix(" call"), content)
        for title, content in report.sections
        if title.endswith(f" {report.when}")
    )
    return Phase(
        test=report.nodeid,
        rank=rank,
        when=report.when or "",
        outcome=outcome,
        duration=report.duration,
        text=text,
        message=message,
        sections=sections,
    )
