"""One mpirun and the tests it runs: started, watched, ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests._ranks.child import STACKS_SIGNAL
from tests._ranks.direct import Ranks
from tests._ranks.launcher import MARK, clean_environment, end_job, marked_processes
from tests._ranks.records import LineReader, Outcome, Phase, Result, heading, merge, overall

ROOT = Path(__file__).resolve().parents[2]

_START = 60.0  # seconds from mpirun to the first test
_EXIT = 15.0  # seconds from the last test to mpirun's end
_EXIT_ON_HOSTS = 40.0  # there the daemons of the launcher end one after the other
_POLL = 0.02
_TAIL = 8000  # characters of one rank's output in a report


@dataclass(frozen=True)
class Launch:
    """How to start pytest on ranks; the same for every job of a run."""

    mpirun: Callable[[Ranks], Sequence[str]]  # the start of its command line
    pytest_arguments: Sequence[str]
    directory: Path
    grace: float  # seconds that ranks have to end a test which has failed on another rank

    def command(self, modules: Sequence[Path], ranks: Ranks) -> list[str]:
        """Return the command line that runs `modules` on ranks."""
        plugins = ["-p", "tests._ranks.child", "-p", "tests._ranks.plugin"]
        start = [*self.mpirun(ranks), "-n", str(ranks.count), sys.executable]
        return [*start, "-m", "pytest", *plugins, *self.pytest_arguments, *map(str, modules)]


@dataclass
class _Test:
    """What is known so far about one test of the job."""

    phases: list[Phase] = field(default_factory=list)
    offsets: dict[int, int] = field(default_factory=dict)  # by rank, into its output
    started: float | None = None  # the outer run's clock, as are the next two
    failed: float | None = None
    ended: float | None = None

    def ranks_done(self) -> set[int]:
        return {phase.rank for phase in self.phases if phase.when == "teardown"}

    def ranks_differ(self) -> bool:
        ranks = {phase.rank for phase in self.phases}
        return len({overall([p for p in self.phases if p.rank == rank]) for rank in ranks}) > 1


def _without_machinery(stacks: str) -> str:
    """Leave out the frames below the test: they are pytest's, the same in every stack."""
    hidden = ("/_pytest/", "/pluggy/", "/pytest/__main__", "<frozen runpy>", "/tests/_ranks/")
    return "\n".join(
        line for line in stacks.splitlines() if not any(part in line for part in hidden)
    )


class Job:
    """A running mpirun for some tests.

    Parameters
    ----------
    launch : Launch
        The command line's fixed parts.
    modules : sequence of Path
        The test modules.
    ranks : Ranks
        How many, and on which hosts.
    deadlines : mapping of str to float
        The node ids to run, in order, with the seconds that each may take.
    """

    def __init__(
        self,
        launch: Launch,
        modules: Sequence[Path],
        *,
        ranks: Ranks,
        deadlines: Mapping[str, float],
    ) -> None:
        self._size = size = ranks.count
        self._grace = launch.grace
        self._exit = _EXIT_ON_HOSTS if ranks.hosts else _EXIT
        self._deadlines = deadlines
        self._waiting = list(deadlines)
        self._tests = {test: _Test() for test in deadlines}
        self._pids: dict[int, int] = {}
        self._directory = Path(tempfile.mkdtemp(prefix=f"ranks-{size}-", dir=launch.directory))
        plan = {"size": size, "tests": dict(deadlines)}
        (self._directory / "plan.json").write_text(json.dumps(plan))
        (self._directory / "gate").write_bytes(bytes(len(deadlines) * size))
        self._readers = [LineReader(self._directory / f"rank-{r}.jsonl") for r in range(size)]
        directory = str(self._directory)
        environment = clean_environment() | {MARK: directory, "MPIDIST_DUMP": directory}
        path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        self._since = time.monotonic()
        with (self._directory / "mpirun.out").open("wb") as output:
            self._process = subprocess.Popen(
                launch.command(modules, ranks),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.ended = False

    def watch(self) -> dict[str, Result]:
        """Look once at every rank and return the results that became final.

        Notes
        -----
        When `ended` is set afterwards the job is gone; tests without a result were never begun.
        """
        exited = self._process.poll() is not None  # asked first, so that all it wrote is read below
        self._read()
        results: dict[str, Result] = {}
        while self._waiting and (test := self._tests[self._waiting[0]]).ended is not None:
            last, differ = len(self._waiting) == 1, test.ranks_differ()
            if last and not exited and not differ:
                break  # how the job ends is part of the last test's result
            problem = self._exit_code_problem() if last and exited else ""
            results[self._waiting.pop(0)] = self._result(test, problem, stacks=False)
            self._since = time.monotonic()
            if differ:
                self.close()  # see [Note: the gate]: the ranks wait there for nothing
                return results
        if not self._waiting:
            self.close()
        elif problem := self._problem(self._waiting[0], exited=exited):
            name = self._waiting.pop(0)
            results[name] = self._result(self._tests[name], problem, stacks=not exited)
            self.close()
        else:
            time.sleep(_POLL)
        return results

    @property
    def began(self) -> bool:
        """Whether any rank has begun any test."""
        return any(test.started is not None for test in self._tests.values())

    def close(self) -> None:
        """End the job, with every process it started, and remove its files."""
        if not self.ended:
            end_job(self._process, self._directory)
            shutil.rmtree(self._directory, ignore_errors=True)
            self.ended = True

    def _read(self) -> None:
        now = time.monotonic()
        for reader in self._readers:
            for fields in reader.new():
                if fields["what"] == "hello":
                    self._pids[fields["rank"]] = fields["pid"]
                    continue
                test = self._tests[fields["test"]]
                if fields["what"] == "start":
                    test.offsets[fields["rank"]] = fields["offset"]
                    test.started = test.started or now
                    continue
                phase = Phase.from_fields(fields)
                test.phases.append(phase)
                if phase.outcome is Outcome.FAILED:
                    test.failed = test.failed or now
                if len(test.ranks_done()) == self._size:
                    test.ended = now

    def _problem(self, name: str, *, exited: bool) -> str:
        """Say what is wrong with the running test, or nothing."""
        test, deadline, now = self._tests[name], self._deadlines[name], time.monotonic()
        if exited:
            where = "while this test ran" if test.started else "before this test began"
            return f"the job ended {where}: mpirun's exit code is {self._process.returncode}"
        if test.started is None:
            if now - self._since > _START:
                return f"the ranks did not begin this test within {_START:g} s"
        elif test.ended is not None:
            if now - test.ended > self._exit:
                limit = f"{self._exit:g} s"
                return f"after this test, the last one, the job did not end within {limit}"
        elif test.failed is not None and now - test.failed > self._grace:
            return (
                f"{self._missing(test)} did not end within {self._grace:g} s of the failure above"
            )
        elif now - test.started > deadline:
            return f"{self._missing(test)} did not end within the deadline of {deadline:g} s"
        return ""

    def _exit_code_problem(self) -> str:
        code = self._process.returncode
        return f"after this test, the last one, the job ended with exit code {code}" if code else ""

    def _missing(self, test: _Test) -> str:
        missing = sorted(set(range(self._size)) - test.ranks_done())
        return f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"

    def _result(self, test: _Test, problem: str, *, stacks: bool) -> Result:
        details = self._details(test, stacks=stacks) if problem else ""
        return merge(self._size, test.phases, problem=problem, details=details)

    def _details(self, test: _Test, *, stacks: bool) -> str:
        """Return the stacks of the ranks still at it and the output of all, for a broken test."""
        if stacks:
            self._ask_for_stacks()
        blocks = []
        for rank in range(self._size):
            stack = ""
            if rank not in test.ranks_done():
                stack = _without_machinery(self._tail(f"rank-{rank}.stacks"))
            output = self._tail(f"rank-{rank}.out", start=test.offsets.get(rank, 0))
            for title, text in (
                (f"stacks of rank {rank}", stack),
                (f"output of rank {rank}", output),
            ):
                if text.strip():
                    blocks.append(heading(title) + "\n" + text)
        if launcher := self._tail("mpirun.out").strip():
            blocks.append(heading("output of mpirun") + "\n" + launcher)
        return "\n".join(blocks)

    def _ask_for_stacks(self) -> None:
        alive = set(marked_processes(str(self._directory)))
        asked = {rank: pid for rank, pid in self._pids.items() if pid in alive}
        for pid in asked.values():
            os.kill(pid, STACKS_SIGNAL)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not all(
            (self._directory / f"rank-{rank}.stacks").stat().st_size for rank in asked
        ):
            time.sleep(_POLL)
        time.sleep(0.1)  # the files have begun; let the last lines in

    def _tail(self, name: str, *, start: int = 0) -> str:
        try:
            data = (self._directory / name).read_bytes()[start:]
        except FileNotFoundError:
            return ""
        return data[-_TAIL:].decode(errors="replace")
