"""Let one rank of four call something else than the others, thousands of times.

    python -m tests.soaks.mismatches --cases 2000 --seed 0

In every case one rank, drawn from the seed, makes a call that differs from the others' in one
respect. All ranks must raise an error of the package; nobody may return. In some cases nobody
deviates, and the result must equal numpy's. After each case a plain sum must be right. Verbs,
forms, kinds of deviation, and sizes are drawn; the places are one node, one that pretends to be two
(MPIDIST_RANKS_PER_NODE), and two pretended hosts. It prints for each case that went wrong how to
repeat it, and exits with 1 if there was one.

caught    an error on all ranks, and the next sum was right
late      the error came at the deadline, or ended the job
died      the MPI library ended the job first
silent    a rank returned
wrong     nobody deviated, and something else came out
foreign   an error that is not the package's
unusable  the error was right, and the next sum was not
hung      the job had to be killed
right     nobody deviated, or only by the form of a call, and the result was numpy's
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests._ranks.hosts import Hosts, HostsUnavailableError
from tests._ranks.launcher import MARK, clean_environment, end_job, find_mpirun, vendor_arguments
from tests.soaks.mismatch_cases import Case, draw

__all__ = ["BAD", "PLACES", "RANKS", "Found", "main", "repeat", "run", "table", "verdict_of"]

ROOT = Path(__file__).parents[2]
RANKS = 4
PLACES = ("node", "nodes", "hosts")
BAD = ("died", "silent", "wrong", "foreign", "unusable", "hung")
VERDICTS = ("caught", "late", *BAD, "right")
_PATIENCE = 60.0  # seconds without a new case, until a job is given up


@dataclass(frozen=True)
class Found:
    """What became of a case.

    Attributes
    ----------
    case : Case
        The case.
    place : str
        One of `PLACES`.
    verdict : str
        One of `VERDICTS`.
    told : tuple of str
        How it ended on each rank, and what was wrong afterwards.
    """

    case: Case
    place: str
    verdict: str
    told: tuple[str, ...]


def run(
    mpirun: Sequence[str],
    place: str,
    numbers: range,
    *,
    seed: int,
    in_job: int = 50,
    environment: Mapping[str, str] | None = None,
) -> list[Found]:
    """Run cases, some of them in each job; return what became of them.

    Parameters
    ----------
    mpirun : sequence of str
        The start of a command line that puts `RANKS` ranks on the place.
    place : str
        One of `PLACES`.
    numbers : range
        Of the cases.
    seed : int
        Of the cases.
    in_job : int, optional
        Cases of a job at most.
    environment : mapping of str to str, optional
        Variables to be added.
    """
    found: list[Found] = []
    while len(found) < len(numbers):
        left = numbers[len(found) :][:in_job]
        found += _job(mpirun, place, left, seed, environment or {})
    return found


def _job(
    mpirun: Sequence[str], place: str, numbers: range, seed: int, environment: Mapping[str, str]
) -> list[Found]:
    """Run one job to its end, or to the case that ends it."""
    with tempfile.TemporaryDirectory(prefix="mpidist-mismatches-") as own:
        directory = Path(own)
        output = directory / "output"
        arguments = [str(seed), str(numbers[0]), str(len(numbers)), own]
        program = [sys.executable, "-m", "tests.soaks.mismatch_job", *arguments]
        with output.open("wb") as written:
            process = subprocess.Popen(
                [*mpirun, "-n", str(RANKS), *program],
                cwd=ROOT,
                env={
                    **clean_environment(),
                    **({"MPIDIST_RANKS_PER_NODE": "2"} if place == "nodes" else {}),
                    **environment,
                    MARK: own,
                    "MPIDIST_DUMP": own,
                },
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ended = _wait(process, directory)
        finally:
            end_job(process, directory)
        answers = [_lines(directory / f"rank-{rank}") for rank in range(RANKS)]
        found = []
        for number in numbers:
            of_ranks = [answer.get(number, {}) for answer in answers]
            case, over = draw(seed, number, RANKS), all("after" in told for told in of_ranks)
            verdict = verdict_of(case, of_ranks, over=over, ended=ended)
            told = [f"{a.get('ended')} {a.get('words', '')} {a.get('after', '')}" for a in of_ranks]
            if not over:
                told.append(output.read_text(errors="replace")[-3000:])
            found.append(Found(case, place, verdict, tuple(told)))
            if not over:
                break
        return found


def _lines(file: Path) -> dict[int, dict[str, str]]:
    """Return what a rank wrote of each case."""
    told: dict[int, dict[str, str]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        fields = json.loads(line)
        told.setdefault(fields.pop("number"), {}).update(fields)
    return told


def verdict_of(case: Case, told: Sequence[Mapping[str, str]], *, over: bool, ended: bool) -> str:
    """Say what became of a case, from what the ranks wrote of it."""
    endings = {each.get("ended", "") for each in told}
    if endings == {"right"}:
        return "right" if not any(each.get("after") for each in told) else "unusable"
    if case.kind == "none":
        return "wrong"
    if endings & {"returned", "right", "wrong"}:
        return "silent"
    if "foreign" in endings:
        return "foreign"
    if not over:  # the job has ended, or stands still: in time, if any rank has said why
        return "hung" if not ended else "late" if endings & {"caught", "late"} else "died"
    if any(each.get("after") for each in told):
        return "unusable"
    return "late" if "late" in endings else "caught"


def _wait(process: subprocess.Popen[bytes], directory: Path) -> bool:
    """Wait until a job ends; return False if it makes no progress."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        if (now := sum(file.stat().st_size for file in directory.glob("rank-*"))) != size:
            size, since = now, time.monotonic()
        if time.monotonic() > since + _PATIENCE:
            return False
    return True


def table(found: Iterable[Found]) -> str:
    """Return the numbers of verdicts by form and verb, kind, size and place."""
    found = list(found)
    blocks = []
    for title, key in (
        ("form", lambda f: f.case.calls[f.case.guilty - 1].form),
        ("verb", lambda f: f.case.calls[f.case.guilty - 1].verb),
        ("kind", lambda f: f.case.kind),
        ("size", lambda f: f.case.size),
        ("place", lambda f: f.place),
        ("", lambda f: "all"),
    ):
        rows: dict[str, Counter[str]] = {}
        for each in found:
            rows.setdefault(key(each), Counter())[each.verdict] += 1
        head = f"{title:20}{'cases':>8}" + "".join(f"{v:>9}" for v in VERDICTS)
        body = [
            f"{name:20}{counted.total():8}" + "".join(f"{counted[v]:9}" for v in VERDICTS)
            for name, counted in sorted(rows.items())
        ]
        blocks.append("\n".join([head, *body]))
    return "\n\n".join(blocks)


def repeat(found: Found, seed: int) -> str:
    """Return the case, how it ended, and the command that repeats it."""
    told = "\n".join(f"    {line}" for line in found.told if line)
    again = f"--seed {seed} --first {found.case.number} --cases 1 --places {found.place}"
    return f"{found.verdict} ({found.place}) {found.case}\n{told}\n    {again}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tests.soaks.mismatches", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=2000, help="in all places (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0)")
    parser.add_argument("--in-job", type=int, default=50, help="cases of a job (default: 50)")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--all", action="store_true", help="show late cases and dead jobs, too")
    options = parser.parse_args(arguments)
    mpirun = find_mpirun()
    if mpirun is None:
        parser.exit(1, "no mpirun\n")
    here, began = [str(mpirun), *vendor_arguments(mpirun)], time.monotonic()
    found: list[Found] = []
    first = options.first
    for index, place in enumerate(options.places):
        count = len(range(options.cases)[index :: len(options.places)])
        with contextlib.ExitStack() as stack:
            start = here
            if place == "hosts":
                try:
                    start = stack.enter_context(Hosts(2)).mpirun(2)
                except HostsUnavailableError as error:
                    parser.exit(1, f"{error}\n")
            numbers = range(first, first + count)
            found += run(start, place, numbers, seed=options.seed, in_job=options.in_job)
        first += count
    shown = (*BAD, "late") if options.all else BAD
    for each in found:
        if each.verdict in shown:
            print(repeat(each, options.seed))
    print(f"{table(found)}\n\n{len(found)} cases in {time.monotonic() - began:.0f} s")
    return int(any(each.verdict in BAD for each in found))


if __name__ == "__main__":
    sys.exit(main())
