"""Show the machine, the software and the settings of this job, and what is wrong with them.

Alone, or on all ranks of a job: mpirun -n 4 python -m mpidist info. The exit code is 1 if no job
can run like this, and 0 if there are only warnings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from mpidist import env
from mpidist.backends.node.shared_memory import DIRECTORY
from mpidist.info.ask import REPORTED, Answer, ask
from mpidist.info.checks import Problem, find_problems
from mpidist.info.facts import FORMAT, JobFacts
from mpidist.info.leftovers import clean, describe
from mpidist.info.text import render_facts
from mpidist.usage import positive


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--json", action="store_true", help="print everything, as JSON")
    action.add_argument(
        "--clean",
        action="store_true",
        help="report nothing: remove what your jobs that are over have left in /dev/shm",
    )
    parser.add_argument(
        "--timeout",
        type=positive(float),
        default=60.0,
        metavar="SECONDS",
        help="for MPI to start on all ranks (default: %(default)g)",
    )


def run(options: argparse.Namespace) -> int:
    """Collect, judge, print on the first rank; the exit code is 1 if no job can run like this."""
    if options.clean:
        return _clean()
    answer = ask(options.timeout)
    if answer.job is None or not _is_first(answer.job):
        return _say_failure(answer)
    problems = find_problems(answer.job)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if options.json:
        text = json.dumps(as_fields(answer.job, problems, date=date), indent=1) + "\n"
    else:
        text = render_facts(answer.job, problems, date=date)
    sys.stdout.write(text)
    sys.stdout.flush()
    return int(any(problem.fatal for problem in problems))


def as_fields(job: JobFacts, problems: Sequence[Problem], *, date: str) -> dict[str, Any]:
    """Return what is printed as JSON."""
    return {
        "format": FORMAT,
        "date": date,
        "problems": [dataclasses.asdict(problem) for problem in problems],
        **dataclasses.asdict(job),
    }


def _clean() -> int:
    """Remove what dead jobs have left on this node; of several ranks there, each removes some."""
    where = f"{DIRECTORY} of {platform.node()}"
    files = clean(DIRECTORY)
    if env.launcher_rank() == 0 or any(not file.kept for file in files):
        sys.stdout.write(f"{describe(files, where)}\n")
    return int(any(file.kept.startswith(("cannot", "nobody")) for file in files))


def _is_first(job: JobFacts) -> bool:
    """Whether this process reports: of ranks that do not see each other, the launcher's first."""
    return len(job.ranks) > 1 or env.launcher_rank() == 0


def _say_failure(answer: Answer) -> int:
    """Tell in one line what kept this rank from answering; the first rank reports the rest."""
    rank, failure = env.launcher_rank(), answer.failure
    if failure is None:
        return 0
    text = f"[rank {rank}] mpidist info: MPI does not start here: {failure.reason}\n"
    sys.stderr.write(text)
    sys.stderr.flush()
    if rank == 0:
        return 1
    if failure.kind == "missing":
        return 0  # MPI has not begun to start, so no launcher minds
    # A launcher kills the other ranks when one that has begun to start MPI ends: not before the
    # first one has reported, which then ends this one in the same way.
    launcher, deadline = os.getppid(), time.monotonic() + REPORTED
    while os.getppid() == launcher and time.monotonic() < deadline:
        time.sleep(0.1)
    return 1
