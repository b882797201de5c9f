"""What a case of the matrix is: a short program in which one rank fails, and what must be seen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["EARLY", "LIMIT", "SIZES", "SOON", "TIMEOUT", "Case", "Ending"]

TIMEOUT = 4.0  # seconds: the deadline of all jobs but those that say another
LIMIT = TIMEOUT + 5.0  # seconds from the event to the end of the job
SOON = 2.5  # seconds, for what needs nobody's deadline, nor the time that leaving ranks are given
SIZES = (2, 4)

HEAD = """\
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

import mpidist
from mpidist import env

rank, evidence = env.launcher_rank(), env.launcher_evidence()
size = evidence.size
guilty = size // 2


def it_happens():
    time.sleep(0.5)  # the others go on to their next operation
    Path(f"event-{rank}").write_text(repr(time.monotonic()))


"""

EARLY = """\
# Not within the deadline of init: a busy machine starts ranks one by one.
from mpidist.backends.mpi.library import load_mpi

load_mpi()
import mpidist.job.end
"""

START = """\
world = mpidist.init(timeout=<timeout>)
small, large = np.ones(1000), np.ones(1 << 16)
for x in (small, large):
    mpidist.all_reduce(x, world)
maps = Path("/proc/self/maps").read_text().split()
Path(f"memory-{rank}").write_text("\\n".join(word for word in maps if "/mpich_shm_" in word))


def work_for_ever():
    while True:
        mpidist.all_reduce(small, world)  # at: others


"""


class Ending(Enum):
    """How a job ends, to its launcher."""

    BAD = "with an exit code that is not 0"
    GOOD = "with exit code 0: nothing is wrong"
    ANY = "as the MPI library has it"


@dataclass(frozen=True)
class Case:
    """One fault, as it is and as it is seen.

    Regular expressions may hold ``<guilty>`` and ``<size>``, and ``<at:NAME>`` for the line of the
    program whose comment says ``# at: NAME``.

    Attributes
    ----------
    name : str
        Of the test.
    fault : str
        For people; docs/faults.rst has a row for it, which several cases may share.
    body : str
        The program, after `HEAD` and `START`. It calls `it_happens` where the seconds begin.
    before : str
        What comes before `START`, which calls `init`.
    sees : tuple of str
        Regular expressions, each of which the output must hold.
    blames : str or None
        One that a line of the first 20 must hold with 4 ranks; None where nobody can be named.
    sites : tuple of str
        Names of lines of the program that the output must tell, on one host.
    launcher : bool
        Whether the launcher alone tells of it, by a process number.
    dumps : bool
        Whether the records are written as JSON.
    timeout : float
        Seconds: the deadline.
    within : float
        Seconds from the event to the end of the job.
    sizes : tuple of int
        Numbers of ranks.
    environment : mapping of str to str
        What is set for the job.
    ending : Ending
        How it ends.
    """

    name: str
    fault: str
    body: str
    before: str = EARLY
    sees: tuple[str, ...] = ()
    blames: str | None = None
    sites: tuple[str, ...] = ("guilty", "others")
    launcher: bool = False
    dumps: bool = True
    timeout: float = TIMEOUT
    within: float = LIMIT
    sizes: tuple[int, ...] = SIZES
    environment: Mapping[str, str] = field(default_factory=dict)
    ending: Ending = Ending.BAD

    @property
    def script(self) -> str:
        """The whole program."""
        start = START.replace("<timeout>", str(self.timeout))
        return HEAD + self.before.lstrip("\n") + start + self.body.lstrip("\n")

    def guilty(self, size: int) -> int:
        """Return the rank that does it, of so many."""
        return size // 2

    def pattern(self, words: str, size: int) -> str:
        """Return a regular expression for a job of so many ranks."""
        words = words.replace("<guilty>", str(self.guilty(size))).replace("<size>", str(size))
        return re.sub(r"<at:(\w+)>", lambda found: self.place(found[1]), words)

    def place(self, name: str) -> str:
        """Return a regular expression for a line of the program, as errors and reports tell it."""
        lines = enumerate(self.script.split("\n"), 1)
        line = max(number for number, text in lines if f"# at: {name}" in text)
        return rf'script\.py(?::{line}\b|", line {line}\b)'
