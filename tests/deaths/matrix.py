"""Run the jobs of many cases, a few at once, since most of the time they wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.deaths.case import LIMIT, Case
from tests.deaths.job import START, Ended, Job

__all__ = ["Matrix", "Outcome"]

_AT_ONCE = 6


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes
    ----------
    ended : Ended
        The job.
    event : float or None
        When it happened, by `time.monotonic`; None if it never did.
    directory : Path
        The job's current directory.
    """

    ended: Ended
    event: float | None
    directory: Path

    @property
    def seconds(self) -> float:
        """From the event to the end of the job."""
        assert self.event is not None, f"it never happened:\n{self.ended.text}"
        return self.ended.time - self.event

    def __str__(self) -> str:
        """Return the output, with the seconds since the event, for a test that fails."""
        since = self.event or self.ended.time
        lines = [f"{line.time - since:6.2f}  {line.text}" for line in self.ended.lines]
        return "\n".join([f"ended with {self.ended.code}, left {self.ended.left}", *lines])


class Matrix:
    """The jobs of some cases, of which a few run at a time, in this order.

    Parameters
    ----------
    mpirun : sequence of str
        The start of its command line.
    directory : Path
        Where each job gets a directory.
    cases : iterable of (Case, int)
        With numbers of ranks.
    """

    def __init__(
        self, mpirun: Sequence[str], directory: Path, cases: Iterable[tuple[Case, int]]
    ) -> None:
        self._mpirun = mpirun
        self._directory = directory
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._outcomes: dict[tuple[str, int], Future[Outcome]] = {
            (case.name, size): self._pool.submit(self._run, case, size) for case, size in cases
        }

    def outcome(self, case: Case, size: int) -> Outcome:
        """Return what became of a case, when its job is over."""
        return self._outcomes[case.name, size].result()

    def done(self) -> dict[tuple[str, int], Outcome]:
        """Return what became of the cases whose jobs are over."""
        return {
            key: future.result()
            for key, future in self._outcomes.items()
            if future.done() and not future.cancelled() and future.exception() is None
        }

    def close(self) -> None:
        """Start no more jobs, and wait for those that run."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, case: Case, size: int) -> Outcome:
        directory = self._directory / f"{case.name}-{size}"
        directory.mkdir()
        job = Job(self._mpirun, size, case.script, directory, case.environment)
        ended = job.end(START + LIMIT)
        events = [float(file.read_text()) for file in directory.glob("event-*")]
        return Outcome(ended, min(events, default=None), directory)
