"""What one rank says about one test, and how all ranks' words become one result."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


class Outcome(Enum):
    """How a test ended; the numbers are the gate's bytes, 0 there meaning not yet."""

    PASSED = 1
    FAILED = 2
    SKIPPED = 3
    XFAILED = 4


@dataclass(frozen=True)
class Phase:
    """One phase of one test on one rank: setup, call or teardown.

    `message` is the last line of a traceback, or the reason of a skip.
    """

    test: str
    rank: int
    when: str
    outcome: Outcome
    duration: float
    text: str
    message: str
    sections: tuple[tuple[str, str], ...]

    def line(self) -> str:
        """Return this phase as one line of JSON."""
        return json.dumps({"what": "phase", **asdict(self), "outcome": self.outcome.name})

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Phase:
        """Build a phase from a parsed line."""
        rest = {k: v for k, v in fields.items() if k not in ("what", "outcome", "sections")}
        sections = tuple((title, content) for title, content in fields["sections"])
        return cls(outcome=Outcome[fields["outcome"]], sections=sections, **rest)


def overall(phases: Sequence[Phase]) -> Outcome:
    """Return the outcome of a test on one rank from its phases."""
    found = {phase.outcome for phase in phases}
    for outcome in (Outcome.FAILED, Outcome.XFAILED, Outcome.SKIPPED):
        if outcome in found:
            return outcome
    return Outcome.PASSED


@dataclass(frozen=True)
class Result:
    """One test over all ranks."""

    outcome: Outcome
    message: str = ""
    text: str = ""
    duration: float = 0.0
    sections: list[tuple[str, str]] = field(default_factory=list)


def merge(size: int, phases: Sequence[Phase], *, problem: str = "", details: str = "") -> Result:
    """Join the phases of one test on all ranks.

    Parameters
    ----------
    size : int
        Ranks of the job.
    phases : sequence of Phase
        Everything that any rank reported about the test.
    problem : str, optional
        Why the test counts as failed whatever its phases say: a deadline, a lost rank.
    details : str, optional
        What to show below the tracebacks: stacks and output of the ranks.
    """
    phases = sorted(phases, key=lambda phase: phase.rank)
    by_rank = {r: [p for p in phases if p.rank == r] for r in range(size)}
    outcomes = {rank: overall(own) for rank, own in by_rank.items() if own}
    sections = [
        (f"rank {p.rank}'s {title}", content) for p in phases for title, content in p.sections
    ]
    duration = max((sum(p.duration for p in own) for own in by_rank.values()), default=0.0)
    distinct = set(outcomes.values())
    if not problem and Outcome.FAILED not in distinct and len(distinct) > 1:
        problem = "the ranks disagree: " + ", ".join(
            f"rank {rank} {outcome.name.lower()}" for rank, outcome in sorted(outcomes.items())
        )
    if problem or Outcome.FAILED in distinct:
        failed = [p for p in phases if p.outcome is Outcome.FAILED]
        message = f"rank {failed[0].rank}: {failed[0].message}" if failed else problem
        text = "\n".join(filter(None, [_tracebacks(size, failed), details, problem]))
        return Result(Outcome.FAILED, message, text, duration, sections)
    reasons = [p.message for p in phases if p.outcome is not Outcome.PASSED]
    outcome = distinct.pop() if distinct else Outcome.PASSED
    return Result(outcome, reasons[0] if reasons else "", "", duration, sections)


def _tracebacks(size: int, failed: Sequence[Phase]) -> str:
    """Write every failing rank's traceback once, equal ones under one heading."""
    alike: dict[tuple[str, str], list[Phase]] = {}
    for phase in failed:
        # An object's address is all that differs in many messages.
        text = re.sub(r"0x[0-9a-f]+", "0x", phase.text)
        alike.setdefault((phase.when, text), []).append(phase)
    blocks = []
    for phases in alike.values():
        who = f"rank{'s' * (len(phases) > 1)} {', '.join(str(phase.rank) for phase in phases)}"
        blocks.append(heading(f"{who} of {size}, {phases[0].when}") + "\n" + phases[0].text)
    return "\n".join(blocks)


def heading(title: str) -> str:
    """Return a ruled heading line."""
    return f" {title} ".center(90, "-")


class LineReader:
    """Read the complete lines that a growing file of JSON lines has gained."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Return what was appended since the last call; a half-written last line waits."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]
