"""Each call of a save that touches a file fails, one at a time, on each rank.

    python -m tests.soaks.checkpoints.failures

A first run on simulated ranks writes down every call by which a save touches its directory, so that
none is left out when the package changes. Then each of them fails once: with one of several errors,
instead of being done or (as a network's file system may have it) after it was done, or it writes
half of what it should. Afterwards the checkpoint before must be as it was, all ranks must have been
told the same, with the rank and the reason, and the same save must succeed on the same group.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mpidist import checkpoint
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.directory import step_directory
from mpidist.collectives import barrier
from mpidist.errors import CheckpointError
from mpidist.group import ProcessGroup
from mpidist.testing.ranks import run_ranks
from mpidist.usage import RankArgumentParser
from tests.soaks.checkpoints.calls import Call, Perform, intercepted
from tests.soaks.checkpoints.states import Contents, Cut

__all__ = [
    "ERRORS",
    "Fault",
    "Outcome",
    "Scenario",
    "attempt",
    "faults_of",
    "main",
    "soak",
    "verdict_of",
]

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
_CONTENTS = Contents("few", seed=5)
_BEFORE, _STEP = 1, 2
"""The step of the checkpoint that must survive, and of the one that is being saved."""

_MAYBE = "it may be there"
"""Said where a disk that fails for good does not tell whether there is a manifest."""


@dataclass(frozen=True)
class Scenario:
    """How the state is saved.

    Attributes
    ----------
    size : int
        Number of ranks.
    beside : bool
        By `save_async`.
    over : bool
        Where a killed save has left its directory.
    """

    size: int
    beside: bool
    over: bool

    def __str__(self) -> str:
        """Say it in a line."""
        verb = "save_async" if self.beside else "save"
        return f"{verb} on {self.size} ranks{', over what a killed one has left' * self.over}"


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes
    ----------
    call : Call
        Which call.
    occurrence : int
        Which one of several alike, from 0.
    kind : {"instead", "after", "half", "on"}
        Whether the error comes instead of the call or after it was done (`os.close` is always
        done); half of the bytes are written and there is no error; or every call of this rank fails
        from then on.
    error : int
        Number of the error, as in `errno`.
    """

    call: Call
    occurrence: int
    kind: str
    error: int

    def __str__(self) -> str:
        """Say it in a line."""
        name = errno.errorcode[self.error]
        what = {
            "instead": f"fails with {name}",
            "after": f"is done and fails with {name}",
            "half": "writes half of it",
            "on": f"and all later ones of the rank fail with {name}",
        }
        call = self.call
        number = f"{call.name} of {call.file} (no. {self.occurrence + 1}) on rank {call.rank}"
        return f"{number} {what[self.kind]}"


@dataclass
class Outcome:
    """What came of a save.

    Attributes
    ----------
    calls : list of Call
        Those of the save, in the order in which they came.
    fired : bool
        Whether the fault came.
    told : str or None
        The error, the same on all ranks; None if the save succeeded.
    """

    calls: list[Call] = field(default_factory=list)
    fired: bool = False
    told: str | None = None


class _Injector:
    """The hook that writes down the calls, and lets one of them fail."""

    def __init__(self, fault: Fault | None) -> None:
        self.outcome = Outcome()
        self.armed = False
        self._fault = fault
        self._lock = threading.Lock()

    def __call__(self, call: Call, perform: Perform, args: tuple[Any, ...]) -> Any:
        fault = self._fault if self.armed else None
        if not self.armed or call.rank is None:
            return perform()
        with self._lock:
            number = self.outcome.calls.count(call)
            self.outcome.calls.append(call)
            due = fault is not None and (fault.call, fault.occurrence) == (call, number)
            later = fault is not None and self.outcome.fired and fault.kind == "on"
            hit = due or (later and fault is not None and fault.call.rank == call.rank)
            self.outcome.fired |= hit
        if not hit or fault is None:
            return perform()
        if fault.kind == "half":
            descriptor, data, *others = args
            return perform(descriptor, data[: len(data) // 2], *others)
        # A descriptor is gone, whatever close says.
        if fault.kind == "after" or call.name == "os.close":
            done = perform()
            if call.name == "os.scandir":
                done.close()
        names = (
            () if isinstance(next(iter(args), None), int) else (call.file,)
        )  # as the system does
        raise OSError(fault.error, os.strerror(fault.error), *names)


def attempt(scenario: Scenario, fault: Fault | None, directory: Path) -> Outcome:
    """Save while something goes wrong, and once more, and look at what is there.

    Parameters
    ----------
    scenario : Scenario
        How.
    fault : Fault or None
        What goes wrong.
    directory : Path
        Of the checkpoints; holds the one of the step before, as `prepare` left it.

    Returns
    -------
    Outcome
        What the ranks were told.

    Raises
    ------
    AssertionError
        If anything is not as it has to be.
    """
    injector = _Injector(fault)
    with intercepted(directory, injector):
        told = run_ranks(scenario.size, _on_rank, scenario, directory, injector)
    _equal("what the ranks were told", told)
    _CONTENTS.check(_STEP, checkpoint.load_full(directory))
    _CONTENTS.check(_BEFORE, checkpoint.load_full(directory, step=_BEFORE))
    _nothing_left(directory, [_BEFORE, _STEP])
    injector.outcome.told = told[0]
    return injector.outcome


def _on_rank(
    group: ProcessGroup, scenario: Scenario, directory: Path, injector: _Injector
) -> str | None:
    cut = Cut(group.size, seed=3)
    checkpoint.load(directory, _CONTENTS.empty(group.rank, cut), group)  # makes what is made once
    barrier(group)
    injector.armed = True
    barrier(group)
    told = None
    try:
        _save(scenario, directory, group, cut)
    except CheckpointError as error:
        told = f"{type(error).__name__}: {error}"
    barrier(group)
    injector.armed = False
    barrier(group)
    if told is not None:
        steps = [found.step for found in checkpoint.list(directory)]
        if _MAYBE not in told:
            _equal("the complete steps", [steps, [_BEFORE]])
        _CONTENTS.check(_BEFORE, checkpoint.load_full(directory, step=_BEFORE))
        barrier(group)
        if _STEP not in steps:
            _save(scenario, directory, group, cut)
    other = Cut(group.size, seed=4)
    state = _CONTENTS.empty(group.rank, other)
    found = checkpoint.load(directory, state, group)
    _equal("the newest step", [found.step, _STEP])
    _CONTENTS.check_rank(_STEP, group.rank, other, state, found.values)
    return told


def _save(scenario: Scenario, directory: Path, group: ProcessGroup, cut: Cut) -> None:
    state = _CONTENTS.state(_STEP, group.rank, cut)
    if not scenario.beside:
        checkpoint.save(directory, state, group, step=_STEP)
        return
    future = checkpoint.save_async(directory, state, group, step=_STEP)
    for value in state.values():  # the program goes on
        for piece in value.pieces.values() if isinstance(value, ShardedArray) else [value]:
            if isinstance(piece, np.ndarray):
                piece[...] = 0
    future.wait()


def _equal(what: str, values: Sequence[Any]) -> None:
    if any(value != values[0] for value in values):
        raise AssertionError(f"{what} differ: {values}")


def _nothing_left(directory: Path, steps: Sequence[int]) -> None:
    """Raise AssertionError if there is anything but whole checkpoints."""
    expected = {step_directory(directory, step) for step in steps}
    strange = [str(path) for path in set(directory.iterdir()) ^ expected]
    strange += [str(path) for path in directory.rglob("*.tmp")]
    if strange:
        raise AssertionError(f"left behind, or not there: {strange}")


def prepare(directory: Path, scenario: Scenario) -> None:
    """Make a directory as `attempt` expects it."""

    def save(group: ProcessGroup) -> None:
        state = _CONTENTS.state(_BEFORE, group.rank, Cut(group.size, seed=9))
        checkpoint.save(directory, state, group, step=_BEFORE)

    run_ranks(scenario.size, save)
    if scenario.over:
        partial = step_directory(directory, _STEP)
        partial.mkdir()
        for name in ("rank-00000.h5", "rank-00001.h5.tmp", "manifest.json.tmp"):
            (partial / name).write_bytes(b"cut off")


def faults_of(calls: Sequence[Call], *, thorough: bool) -> Iterator[Fault]:
    """Yield what may go wrong in a save that makes these calls.

    Parameters
    ----------
    calls : sequence of Call
        As a run without a fault wrote them down.
    thorough : bool
        With every error and in every way; else each call once, in one way.
    """
    seen: Counter[Call] = Counter()
    for number, call in enumerate(sorted(calls, key=str)):
        occurrence = seen[call]
        seen[call] += 1
        kinds = ["instead", "after", "on"]
        kinds += ["half"] if call.name in ("os.write", "os.pwrite") else []
        ways = list(product(kinds, ERRORS))
        for kind, error in ways if thorough else [ways[number % len(ways)]]:
            yield Fault(call, occurrence, kind, error)


def verdict_of(fault: Fault, outcome: Outcome) -> str:
    """Return what came of it, in a word; raise AssertionError if the ranks were told too little."""
    if not outcome.fired:
        raise AssertionError("the call did not come again")
    if outcome.told is None:
        return "saved all the same"
    reasons = [os.strerror(fault.error)]
    if fault.call.name == "os.close":  # shutil.rmtree closes once more what it could not close
        reasons.append(os.strerror(errno.EBADF))
    told = outcome.told
    if f"rank {fault.call.rank}" not in told or not any(reason in told for reason in reasons):
        raise AssertionError(f"the error does not say who and why: {told}")
    return told.partition(":")[0] + (" (may be there)" if _MAYBE in told else "")


def soak(scenario: Scenario, *, thorough: bool) -> Iterator[tuple[Fault, str]]:
    """Let each call of a save fail.

    Yields
    ------
    fault, verdict
        What went wrong, and what came of it: the name of the error that all ranks have raised, or
        "saved all the same"; or what was wrong about it, beginning with "WRONG".
    """
    with tempfile.TemporaryDirectory() as temporary:
        before, directory = Path(temporary, "before"), Path(temporary, "run")
        prepare(before, scenario)
        shutil.copytree(before, directory)
        calls = attempt(scenario, None, directory).calls
        for fault in faults_of(calls, thorough=thorough):
            shutil.rmtree(directory)
            shutil.copytree(before, directory)
            try:
                verdict = verdict_of(fault, attempt(scenario, fault, directory))
            except Exception as error:  # all of them are told at the end
                verdict = f"WRONG {type(error).__name__}: {error}"
            yield fault, verdict


SCENARIOS = tuple(Scenario(3, beside, over) for beside in (False, True) for over in (False, True))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = RankArgumentParser(
        prog="python -m tests.soaks.checkpoints.failures", description=__doc__
    )
    parser.add_argument(
        "--short", action="store_true", help="each call fails once, in one way (default: in all)"
    )
    options = parser.parse_args(arguments)
    wrong = 0
    for scenario in SCENARIOS:
        table: Counter[tuple[str, str]] = Counter()
        for fault, verdict in soak(scenario, thorough=not options.short):
            table[fault.call.name, verdict if verdict[:5] != "WRONG" else "WRONG"] += 1
            if verdict.startswith("WRONG"):
                wrong += 1
                _say(f"{scenario}: {fault}: {verdict}")
        _say(f"{scenario}: {table.total()} failing calls")
        for (name, verdict), count in sorted(table.items()):
            _say(f"  {name:18} {verdict:34} {count:5}")
    _say(f"wrong: {wrong}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
