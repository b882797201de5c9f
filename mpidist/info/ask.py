"""Start the processes that collect the facts, and wait for none of them beyond a deadline.

This process starts no MPI. It starts a child that becomes the rank, as a wrapper script would:
the child inherits the variables and the descriptors by which a launcher knows it. If MPI hangs
there, or ends the child, a second one tells what can be told without MPI.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpidist.backends.node.shared_memory import DIRECTORY
from mpidist.info.facts import Failure, JobFacts
from mpidist.info.leftovers import mapped_by
from mpidist.info.rank import ALONE, WITH_MPI

_WITHOUT_MPI = 20.0
"""Seconds for what needs no MPI; mostly reading Python's modules from a slow disk."""

_GRACE = 2.0
"""Seconds until a killed process is gone; one that waits for a dead disk never is."""

REPORTED = _WITHOUT_MPI + 2 * _GRACE
"""Seconds after which the first rank has reported that MPI does not start."""

_LINES = 8
"""Lines of a library's output that are kept."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The facts of the job, and why there are fewer than there should be.

    There are none if another rank has them, or if not even a process without MPI could tell any.
    """

    job: JobFacts | None
    failure: Failure | None


def ask(seconds: float) -> Answer:
    """Return the facts of the job, within so many seconds; collective over its ranks.

    Where MPI fails to start, or does not answer, the whole takes up to 22 s more.
    """
    fields, failure = _run(WITH_MPI, seconds)
    if failure is None and "missing" in fields:
        failure = Failure(kind="missing", reason=fields["missing"], output=())
    if failure is None:
        return Answer(JobFacts.from_fields(fields, None) if "ranks" in fields else None, None)
    fields, without = _run(ALONE, _WITHOUT_MPI)
    if without is not None:
        return Answer(None, failure)
    return Answer(JobFacts.from_fields(fields, failure), failure)


def _run(how: str, seconds: float) -> tuple[dict[str, Any], Failure | None]:
    """Start one process; return what it wrote, or why it wrote nothing."""
    command = [sys.executable, "-m", "mpidist.info.rank", how, str(seconds)]
    # Not pipes: a daemon that the library starts may hold their other end for ever.
    with _in_memory("answer") as answer, _in_memory("output") as output:
        child = subprocess.Popen(  # noqa: S603  # this interpreter, and a module of ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=output,
            close_fds=False,  # by one of them MPICH's launcher speaks with its rank
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(child)
            return {}, _failure("late", f"no answer within {seconds:g} s", _text(output))
        if code < 0:
            return {}, _failure("died", f"ended by {_signal_name(-code)}", _text(output))
        try:
            fields: dict[str, Any] = json.loads(_text(answer))
        except ValueError:
            return {}, _failure("died", f"ended with exit code {code}", _text(output))
        sys.stderr.write(_text(output))
        _remove(map(Path, fields.pop("made", ())))
        return fields, None


def _in_memory(name: str) -> BinaryIO:
    return os.fdopen(os.memfd_create(name), "w+b")


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill it, and take away what it made."""
    made = mapped_by(str(child.pid), DIRECTORY)
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)
    _remove(made)


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _failure(kind: str, reason: str, output: str) -> Failure:
    lines: Sequence[str] = [line.rstrip() for line in output.splitlines() if line.strip()]
    return Failure(kind=kind, reason=reason, output=lines[-_LINES:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
