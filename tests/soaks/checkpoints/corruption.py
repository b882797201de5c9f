"""Copies of checkpoints are spoilt at random; each time that is found, or does no harm.

    python -m tests.soaks.checkpoints.corruption --cases 2000 --seed 0

States of several shapes, saved by 1 to 4 simulated ranks, are spoilt in one of the ways of
`tests.soaks.checkpoints.damage`, and loaded by `load_full` and on 1 to 4 ranks with other
boxes. Either all ranks raise the same error, of the right class, which names the file; or what is
loaded is what was saved, bit for bit. A manifest that was edited and given a digest anew may be a
checkpoint that says something else, which nobody can tell; it must only end in nothing worse than
an error of the package. Every tenth case goes through `verify`, too, which must list what made a
load fail.
"""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpidist import checkpoint
from mpidist.checkpoint.directory import step_directory
from mpidist.checkpoint.format.manifest import MANIFEST
from mpidist.errors import CheckpointError, CheckpointNotFoundError
from mpidist.group import ProcessGroup
from mpidist.testing.ranks import run_ranks
from mpidist.usage import RankArgumentParser
from tests.soaks.checkpoints.damage import DAMAGES, Damage, Place, Touched
from tests.soaks.checkpoints.states import KINDS, Contents, Cut

__all__ = ["Case", "Verdict", "copy", "judge", "main", "soak", "source"]

_BEFORE, _STEP = 1, 2
"""The steps that are there; the second one is spoilt."""

_RUN, _OTHER = 1, 2
"""Seeds of the run that is spoilt, and of another one."""

_MOST_RANKS = 4
_HANGS = 120
"""Seconds after which a case ends the process, with a report of where it was."""


@dataclass(frozen=True)
class Case:
    """A checkpoint that is spoilt and loaded.

    Attributes
    ----------
    kind : str
        Of the contents.
    size : int
        How many ranks have saved it.
    damage : str
        What is done to it, of `DAMAGES`.
    cut : Cut
        By how many ranks it is loaded, and how the arrays are split then.
    seed : str
        Of the damage.
    """

    kind: str
    size: int
    damage: str
    cut: Cut
    seed: str

    @classmethod
    def draw(cls, seed: str) -> Case:
        """Draw one."""
        rng = random.Random(seed)
        names = list(DAMAGES)
        return cls(
            kind=rng.choice(list(KINDS)),
            size=rng.randint(1, _MOST_RANKS),
            damage=rng.choices(names, [DAMAGES[name].share for name in names])[0],
            cut=Cut(rng.randint(1, _MOST_RANKS), rng.randrange(1000)),
            seed=seed,
        )


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes
    ----------
    full, ranks, verify : str
        What `load_full`, `load` and `verify` made of it: "detected", "harmless", "another
        checkpoint" where it was forged, "not asked"; or "WRONG" and why.
    """

    full: str
    ranks: str
    verify: str

    @property
    def wrong(self) -> list[str]:
        """What is wrong, if anything is."""
        return [text for text in (self.full, self.ranks, self.verify) if text.startswith("WRONG")]


def source(directory: Path, kind: str, size: int, seed: int) -> Path:
    """Return where so many ranks have saved the steps of a run; they do it now if they have not."""
    path = directory / f"{kind}-{size}-{seed}"
    contents = Contents(kind, seed)

    def save(group: ProcessGroup) -> None:
        for step in (_BEFORE, _STEP):
            # Every run is split in the same way: their files have the same names and places.
            state = contents.state(step, group.rank, Cut(size, step))
            checkpoint.save(path, state, group, step=step, metadata={"seed": seed})

    if not path.exists():
        run_ranks(size, save)
    return path


def copy(case: Case, sources: Path, directory: Path) -> Place:
    """Copy what is to be spoilt, and link the rest."""
    run = source(sources, case.kind, case.size, _RUN)
    other = source(sources, case.kind, case.size, _OTHER)
    before, spoilt = step_directory(directory, _BEFORE), step_directory(directory, _STEP)
    shutil.copytree(step_directory(run, _BEFORE), before, copy_function=os.link)
    shutil.copytree(step_directory(run, _STEP), spoilt)
    return Place(spoilt, before, step_directory(other, _STEP))


def judge(case: Case, sources: Path, directory: Path, *, verify: bool) -> Verdict:
    """Spoil a checkpoint and load it.

    Parameters
    ----------
    case : Case
        How.
    sources : Path
        Where `source` keeps what it has made.
    directory : Path
        Must not exist.
    verify : bool
        Whether to ask `verify`, too, which starts a process.

    Returns
    -------
    Verdict
        What came of it.
    """
    place = copy(case, sources, directory)
    damage = DAMAGES[case.damage]
    touched = damage.spoil(place, random.Random(case.seed))
    if _is_whole(place):
        damage = replace(damage, forged=True)
    contents = Contents(case.kind, _RUN)
    full = _judge_full(directory, contents, damage, touched)
    ranks = _judge_ranks(directory, contents, damage, touched, case.cut)
    asked = _judge_verify(directory, full) if verify else "not asked"
    return Verdict(full, ranks, asked)


def _is_whole(place: Place) -> bool:
    """Whether all files, taken one by one, have become those of another run's checkpoint."""
    names = [MANIFEST, *(path.name for path in place.shards())]
    return all(
        (place.directory / name).is_file()
        and (place.directory / name).read_bytes() == (place.other / name).read_bytes()
        for name in names
    )


def _judge_full(directory: Path, contents: Contents, damage: Damage, touched: Touched) -> str:
    try:
        loaded = checkpoint.load_full(directory, step=_STEP)
    except Exception as error:  # every one is judged
        return _of_error(error, damage, touched)
    try:
        contents.check(_STEP, loaded)
    except AssertionError as error:
        return "another checkpoint" if damage.forged else f"WRONG load_full: {error}"
    return "harmless"


def _judge_ranks(
    directory: Path, contents: Contents, damage: Damage, touched: Touched, cut: Cut
) -> str:
    def load(group: ProcessGroup) -> tuple[Exception | None, str]:
        state = contents.empty(group.rank, cut)
        try:
            found = checkpoint.load(directory, state, group, step=_STEP)
        except Exception as error:  # every one is judged
            return error, ""
        try:
            contents.check_rank(_STEP, group.rank, cut, state, found.values)
        except AssertionError as error:
            return None, str(error)
        return None, ""

    try:
        results: list[Any] = run_ranks(cut.size, load)
    except Exception as error:  # a rank that hangs is wrong, too
        return f"WRONG load: {type(error).__name__}: {error}"
    if len({(type(error), str(error)) for error, _ in results}) > 1:
        return f"WRONG load: the ranks were told {[str(error) for error, _ in results]}"
    if results[0][0] is not None:
        return _of_error(results[0][0], damage, touched)
    different = [text for _, text in results if text]
    if not different:
        return "harmless"
    return "another checkpoint" if damage.forged else f"WRONG load: {different[0]}"


def _of_error(error: Exception, damage: Damage, touched: Touched) -> str:
    """Return "detected" if an error is of the right class, and names a file that was spoilt."""
    if not isinstance(error, damage.errors):
        return f"WRONG class: {type(error).__name__}: {error}"
    named = any(name in str(error) for name in touched)
    # Where the manifest is gone there is no checkpoint, and the message tells which there are.
    if not named and not isinstance(error, CheckpointNotFoundError) and not damage.forged:
        return f"WRONG words: none of {sorted(touched)} in: {error}"
    return "detected"


def _judge_verify(directory: Path, full: str) -> str:
    try:
        listed = checkpoint.verify(directory, step=_STEP)
    except CheckpointNotFoundError:
        return (
            "detected" if full == "detected" else "WRONG verify: found nothing, and it was loaded"
        )
    except Exception as error:  # every one is judged
        return f"WRONG verify: {type(error).__name__}: {error}"
    if not all(isinstance(error, CheckpointError) for error in listed):
        return f"WRONG verify: listed {listed}"
    if not listed and full == "detected":
        return "WRONG verify: lists nothing, and load_full failed"
    return "detected" if listed else "harmless"


def soak(
    directory: Path, *, cases: int, seed: int, verify_every: int = 10
) -> Iterator[tuple[Case, Verdict]]:
    """Spoil so many checkpoints.

    Parameters
    ----------
    directory : Path
        Where to work.
    cases : int
        How many.
    seed : int
        Of all that is drawn.
    verify_every : int, optional
        Which cases go through `verify`.

    Yields
    ------
    case, verdict
        What was done, and what came of it.
    """
    for number in range(cases):
        case = Case.draw(f"{seed} {number}")
        faulthandler.dump_traceback_later(_HANGS, exit=True)
        verdict = judge(
            case, directory / "sources", directory / "copy", verify=number % verify_every == 0
        )
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(directory / "copy")
        yield case, verdict


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = RankArgumentParser(
        prog="python -m tests.soaks.checkpoints.corruption", description=__doc__
    )
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    options = parser.parse_args(arguments)
    table: Counter[tuple[str, str, str]] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for case, verdict in soak(Path(temporary), cases=options.cases, seed=options.seed):
            wrong += bool(verdict.wrong)
            for text in verdict.wrong:
                _say(f"{case}: {text}")
            for way in ("full", "ranks", "verify"):
                table[case.damage, way, getattr(verdict, way).partition(" ")[0]] += 1
    _say(f"{options.cases} spoilt checkpoints, seed {options.seed}; wrong: {wrong}")
    ways = (("load_full", "full"), ("load on ranks", "ranks"), ("verify", "verify"))
    results = ("detected", "harmless", "another")
    _say(f"{'detected / harmless / another checkpoint':42}" + "".join(f"{t:>18}" for t, _ in ways))
    for damage in DAMAGES:
        cells = [" / ".join(str(table[damage, way, r]) for r in results) for _, way in ways]
        _say(f"{damage:42}" + "".join(f"{cell:>18}" for cell in cells))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
