"""Jobs that save checkpoints are killed at random instants, and what is left is looked at.

    python -m tests.soaks.checkpoints.kills --runs 300 --ranks 4 --seed 0

All jobs, of 1 to so many ranks, work in one directory: each goes on from the newest checkpoint that
the one before has left. They save step after step, every second one beside the program, and prune
now and then; every bit is a function of the step. Half of them are killed from outside, at a random
instant after they began: one rank, several, all, or mpirun. In the others a rank kills itself, or
all, just before or just after a random call that touches a file. After each kill
the newest checkpoint must be the last one that a rank was told of, or the next one; all that `list`
names must load and hold what was saved; no process may be left; and `prune` must clean up.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mpidist import checkpoint
from mpidist.usage import RankArgumentParser
from tests._ranks.launcher import (
    MARK,
    clean_environment,
    end_job,
    find_mpirun,
    marked_processes,
    vendor_arguments,
)
from tests.soaks.checkpoints.loop import KEEP, mark_of
from tests.soaks.checkpoints.states import Contents

__all__ = ["Kill", "Report", "main", "soak"]

_START = 60.0
"""Seconds that a job may take to begin, on a machine that is busy with others."""

_END = 30.0
"""Seconds that a job may take to end after a kill."""

_LATEST = 0.6
"""Seconds after a job has begun until it is killed from outside, at most."""

_CALLS = 80
"""Calls that touch a file until a rank kills itself, at most."""


@dataclass(frozen=True)
class Kill:
    """How a job is killed.

    Attributes
    ----------
    size : int
        Number of its ranks.
    victim : {"itself", "one rank", "several ranks", "all ranks", "mpirun"}
        Who; "itself" is a rank just before or after a call.
    ranks : tuple of int
        The victims, if they are ranks.
    moment : float
        Seconds after the job has begun.
    fatal : int
        At which call, for "itself", and for "all ranks" if it is not 0.
    """

    size: int
    victim: str
    ranks: tuple[int, ...]
    moment: float = 0.0
    fatal: int = 0

    @classmethod
    def draw(cls, rng: random.Random, most: int) -> Kill:
        """Draw one for a job of at most so many ranks."""
        size = rng.randint(1, most)
        one = (rng.randrange(size),)
        if rng.random() < 0.5:
            victim = rng.choice(["itself", "itself", "all ranks"])
            return cls(size, victim, one, fatal=rng.randint(1, _CALLS))
        victim = rng.choice(["one rank", "several ranks", "all ranks", "mpirun"])
        if victim == "mpirun" and size == 1:  # Open MPI lets a single rank go on without it
            victim = "one rank"
        some = tuple(sorted(rng.sample(range(size), rng.randint(1, size))))
        ranks = {"one rank": one, "several ranks": some}.get(victim, tuple(range(size)))
        return cls(size, victim, ranks, moment=rng.uniform(0, _LATEST))

    def __str__(self) -> str:
        """Say it in a line."""
        when = f"at call {self.fatal}" if self.fatal else f"after {self.moment:.3f} s"
        return f"{self.victim} {self.ranks} of {self.size} killed {when}"


@dataclass(frozen=True)
class Report:
    """What was seen after a kill.

    Attributes
    ----------
    phase : str
        What the first of the killed ranks was doing, by its own last note.
    newest : int
        Step of the newest complete checkpoint; 0 if there was none.
    untold : bool
        Whether no rank had been told of that one.
    partial : bool
        Whether a directory without a manifest was left.
    seconds : float
        From a kill from outside to the end of the last process; 0 for others.
    """

    phase: str
    newest: int
    untold: bool
    partial: bool
    seconds: float


class _Job:
    """A job that saves until it is killed."""

    def __init__(self, command: Sequence[str], kill: Kill, directory: Path, seed: int) -> None:
        self.log = Path(tempfile.mkdtemp(prefix="log-", dir=directory.parent))
        self.kill = kill
        arguments = [str(directory), str(self.log), "--seed", str(seed)]
        if kill.fatal:
            arguments += ["--rank", str(kill.ranks[0]), "--fatal", str(kill.fatal)]
            arguments += ["--all"] if kill.victim == "all ranks" else []
        module = "tests.soaks.checkpoints.loop"
        # What mpidist was imported from is what the ranks shall import.
        path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
        with (self.log / "output").open("wb") as output:
            self.process = subprocess.Popen(  # of this checkout
                [*command, "-n", str(kill.size), sys.executable, "-m", module, *arguments],
                env={**clean_environment(), MARK: str(self.log), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def told(self, word: str) -> list[str]:
        """Return what ranks have told that begins with a word."""
        lines = [
            line
            for file in sorted(self.log.glob("rank-*.log"))
            for line in file.read_text().splitlines()
        ]
        return [line.partition(" ")[2] for line in lines if line.startswith(word)]

    def perform(self) -> float:
        """Have it killed, wait until no process is left, and return how long that took."""
        if self.kill.fatal:
            self._wait(lambda: self.process.poll() is not None, _START + _END, "has not ended")
            self._wait(lambda: not marked_processes(str(self.log)), _END, "has left processes")
            return 0.0
        self._wait(lambda: len(self.told("process")) == self.kill.size, _START, "did not begin")
        time.sleep(self.kill.moment)
        begin = time.monotonic()
        for pid in self._victims():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._wait(lambda: self.process.poll() is not None, _END, "has not ended")
        self._wait(lambda: not marked_processes(str(self.log)), _END, "has left processes")
        return time.monotonic() - begin

    def _victims(self) -> list[int]:
        if self.kill.victim == "mpirun":
            return [self.process.pid]
        pids = [(self.log / f"rank-{rank}.log").read_text().split()[1] for rank in self.kill.ranks]
        return list(map(int, pids))

    def _wait(self, done: Callable[[], bool], seconds: float, words: str) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise AssertionError(f"the job {words} within {seconds:g} s\n{self.output()}")
            time.sleep(0.005)

    def output(self) -> str:
        """Return the end of what it has printed."""
        return (self.log / "output").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End what is left of it."""
        end_job(self.process, self.log)
        shutil.rmtree(self.log)


def _newest(directory: Path) -> int:
    found = checkpoint.latest(directory)
    return 0 if found is None else found.step


def _check(job: _Job, directory: Path, before: int, seed: int) -> tuple[int, bool]:
    """Return the newest step, and whether nobody was told; AssertionError if something is wrong."""
    if not job.process.returncode:
        raise AssertionError("the job was not killed")
    wrong = job.told("wrong")
    # Ranks that lose the others see that, and say so; anything else is a failure.
    wrong = [text for text in wrong if "PeerLostError" not in text and "GroupBroken" not in text]
    if wrong:
        raise AssertionError(f"a rank failed: {wrong[0]}")
    if before and any(int(step) != before for step in job.told("loaded")):
        raise AssertionError(f"loaded {job.told('loaded')}, and the newest was {before}")
    told = max([before, *map(int, job.told("committed"))])
    newest = _newest(directory)
    if newest not in (told, told + 1):
        raise AssertionError(f"the newest is {newest}, and a rank was told of {told}")
    contents = Contents("few", seed)
    for found in checkpoint.list(directory):
        contents.check(found.step, checkpoint.load_full(directory, step=found.step))
    return newest, newest > told


def _partial(directory: Path) -> bool:
    complete = {found.directory for found in checkpoint.list(directory)}
    return (
        any(path not in complete for path in directory.iterdir()) if directory.exists() else False
    )


def _clean(directory: Path) -> None:
    """Prune, and raise AssertionError if more than whole checkpoints is left."""
    before = [found.step for found in checkpoint.list(directory)]
    checkpoint.prune(directory, keep=KEEP, stale=0)
    after = [found.step for found in checkpoint.list(directory)]
    if after != before[-KEEP:] or _partial(directory) or list(directory.rglob("*.tmp")):
        names = sorted(map(str, directory.rglob("*")))
        raise AssertionError(f"prune has made {after} of {before}, and there is {names}")


def soak(
    command: Sequence[str], directory: Path, *, runs: int, ranks: int, seed: int
) -> Iterator[tuple[Kill, Report]]:
    """Start jobs, kill them, and look at what is left.

    Parameters
    ----------
    command : sequence of str
        The start of mpirun's command line.
    directory : Path
        Of the checkpoints; need not exist. Logs lie beside it while a job runs.
    runs, ranks : int
        Number of jobs, and of ranks that one has at most.
    seed : int
        Of all that is drawn. The system decides the rest.

    Yields
    ------
    kill, report
        What was done, and what was seen.

    Raises
    ------
    AssertionError
        If something is not as it has to be; names the run and the kill.
    """
    newest = 0
    for run in range(runs):
        rng = random.Random(f"{seed} {run}")
        kill = Kill.draw(rng, ranks)
        job = _Job(command, kill, directory, seed)
        try:
            seconds = job.perform()
            newest, untold = _check(job, directory, newest, seed)
            phase = mark_of(job.log / f"rank-{kill.ranks[0]}.mark")
            report = Report(phase, newest, untold, _partial(directory), seconds)
            if run % 2 and directory.exists():  # every other job has to cope with what is left
                _clean(directory)
        except Exception as error:
            raise AssertionError(f"seed {seed}, run {run}, {kill}: {error}") from error
        finally:
            job.close()
        yield kill, report


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _tell(seen: Sequence[tuple[Kill, Report]]) -> None:
    """Print what has been seen."""
    reports = [report for _, report in seen]
    _say(f"the newest checkpoint in the end is of step {reports[-1].newest}; all that were there")
    _say("after a kill held what was saved, and none that a rank was told of was missing")
    _say(f"{sum(r.untold for r in reports)} kills came between the commit and its news")
    _say(f"{sum(r.partial for r in reports)} kills left a directory without a manifest")
    _say(f"no process was left {max(r.seconds for r in reports):.1f} s after any kill from outside")
    for title, names in {
        "killed was": [
            f"{k.victim}, {'by a rank' if k.fatal else 'from outside'}" for k, _ in seen
        ],
        "a killed rank (of mpirun, rank 0) was doing": [r.phase.partition(":")[0] for r in reports],
        "and was last seen": [r.phase for r in reports],
    }.items():
        _say(f"{title}:")
        for name, count in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])):
            _say(f"  {count:4}  {name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = RankArgumentParser(prog="python -m tests.soaks.checkpoints.kills", description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="number of jobs (default: 300)")
    parser.add_argument("--ranks", type=int, default=4, help="most ranks of a job (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    options = parser.parse_args(arguments)
    mpirun = find_mpirun()
    if mpirun is None:
        _say("there is no mpirun beside this Python, nor on PATH")
        return 1
    command = [str(mpirun), *vendor_arguments(mpirun)]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, "run")
        jobs = soak(command, directory, runs=options.runs, ranks=options.ranks, seed=options.seed)
        seen = list(jobs)
    _say(f"{len(seen)} jobs of 1 to {options.ranks} ranks killed, seed {options.seed}")
    _tell(seen)
    _say(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
