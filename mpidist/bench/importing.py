"""How long it takes to import mpidist, beside numpy.

Each import is timed inside a fresh interpreter, without the interpreter's own start. They take
turns. No ranks are needed. The package's names bring their modules when they are used first; "all
names" is what a program pays that uses all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from mpidist.bench.harness import BenchmarkError
from mpidist.bench.report import Comparison, Machine, Report, Row
from mpidist.bench.times import Times
from mpidist.group import ProcessGroup

_CODE = """
from time import perf_counter
start = perf_counter()
{}
print(perf_counter() - start)
"""

_IMPORTS = {
    "mpidist": "import mpidist",
    "all names": "from mpidist import *",
    "numpy": "import numpy",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--repeats",
        type=int,
        default=25,
        metavar="N",
        help="how many imports of each are timed (default: %(default)s)",
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure imports in fresh interpreters; for one rank."""
    if world.size > 1 or options.repeats < 1:
        raise BenchmarkError(
            f"bench import: expected one rank and at least one repeat, got {world.size} ranks and "
            f"--repeats {options.repeats}; start it without mpirun: python -m mpidist bench import"
        )
    machine = Machine.of(world)
    for statement in _IMPORTS.values():  # so that files are cached and compiled
        _import_time(statement)
    samples: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for number in range(options.repeats):
        names = list(_IMPORTS)
        for name in names if number % 2 == 0 else names[::-1]:
            samples[name].append(_import_time(_IMPORTS[name]))
    return Report(
        benchmark="import",
        machine=machine,
        rows=[
            Row(operation="import", series=name, nbytes=0, times=Times.of(samples[name]))
            for name in _IMPORTS
        ],
        comparisons=(
            Comparison("mpidist over numpy", "numpy", "mpidist"),
            Comparison("all names over numpy", "numpy", "all names"),
        ),
        legend=_IMPORTS,
    )


def _import_time(statement: str) -> float:
    """Return the seconds that an import takes in a fresh interpreter."""
    command = [sys.executable, "-c", _CODE.format(statement)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # this interpreter, and a text of ours
    if answer.returncode != 0:
        raise BenchmarkError(f"bench import: {statement} failed:\n{answer.stderr}")
    return float(answer.stdout)
