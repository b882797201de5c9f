"""A job under mpirun that is expected to end by itself, and its output in the order of arrival."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests._ranks.launcher import MARK, clean_environment, end_job, marked_processes

ROOT = Path(__file__).parents[2]
START = 60.0  # seconds from mpirun to the event, on a machine that is busy with other jobs
DYING = 2.0  # seconds that the ranks may outlive mpirun


class Line(NamedTuple):
    """A line of output, and when it came by `time.monotonic`."""

    time: float
    text: str


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes
    ----------
    code : int or None
        Of mpirun; None if it had to be ended.
    time : float
        When, by `time.monotonic`.
    lines : sequence of Line
        The output of all ranks and of mpirun.
    left : sequence of int
        Processes that were still alive seconds later.
    """

    code: int | None
    time: float
    lines: Sequence[Line]
    left: Sequence[int]

    @property
    def text(self) -> str:
        """The output."""
        return "\n".join(line.text for line in self.lines)


class Job:
    """An mpirun, started at once.

    Parameters
    ----------
    mpirun : sequence of str
        The start of its command line.
    size : int
        Number of ranks.
    script : str
        Text of the program.
    directory : Path
        The job's own: its current directory, where the script is written, too.
    environment : mapping of str to str, optional
        Variables to be added.
    """

    def __init__(
        self,
        mpirun: Sequence[str],
        size: int,
        script: str,
        directory: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        (directory / "script.py").write_text(script)
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.lines: list[Line] = []
        self._directory = directory
        self._news = threading.Condition()
        self._over = False
        self.process = subprocess.Popen(
            [*mpirun, "-n", str(size), sys.executable, "script.py"],
            cwd=directory,
            env={
                **clean_environment(),
                "PYTHONPATH": path,
                MARK: str(directory),
                "MPIDIST_DUMP": str(directory),
                **(environment or {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            with self._news:
                self.lines.append(Line(time.monotonic(), text))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def until(self, pattern: str, count: int) -> list[re.Match[str]]:
        """Return the matches in the output as soon as there are so many."""
        with self._news:
            self._news.wait_for(
                lambda: self._over or len(self._find(pattern)) >= count, timeout=START
            )
            found = self._find(pattern)
        text = "\n".join(line.text for line in self.lines)
        assert len(found) >= count, f"not {count} times {pattern!r}:\n{text}"
        return found

    def _find(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in self.lines for found in re.finditer(pattern, line.text)]

    def end(self, seconds: float) -> Ended:
        """Return how it ended; if it does not within so many seconds, end it."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=seconds)
        now = time.monotonic()
        while (left := self._alive()) and code is not None and time.monotonic() < now + DYING:
            time.sleep(0.05)
        self.kill()
        return Ended(code, now, tuple(self.lines), left)

    def _alive(self) -> list[int]:
        return marked_processes(str(self._directory))

    def kill(self) -> None:
        """End all that is left of it."""
        end_job(self.process, self._directory)
        self._reader.join(timeout=5)
        if self.process.stdout is not None and not self._reader.is_alive():
            self.process.stdout.close()
