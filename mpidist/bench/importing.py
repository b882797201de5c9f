"""How long it takes to import mpidist, beside numpy.

Each import is timed inside a fresh interpreter, without the interpreter's own start. They take
turns. No ranks are needed. The package's names bring their modules when they are used first; "all
names" is what a program pays that uses all of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from mpidist.bench.harness import BenchmarkError, BenchmarkRun, add_number
from mpidist.bench.report import Comparison, Report
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
    add_number(parser, "--repeats", 25, "how many imports of each are timed")


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure imports in fresh interpreters; for one rank."""
    if world.size > 1:
        raise BenchmarkError(
            f"bench import: expected one rank, got {world.size}; start it without mpirun: "
            "python -m mpidist bench import"
        )
    bench = BenchmarkRun("import", world, options, least=1)
    for statement in _IMPORTS.values():  # so that files are cached and compiled
        _import_time(statement)
    samples: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for number in range(options.repeats):
        for name in list(_IMPORTS)[:: -1 if number % 2 else 1]:
            samples[name].append(_import_time(_IMPORTS[name]))
    bench.add("import", 0, {name: Times.of(times) for name, times in samples.items()})
    return bench.report(
        legend=_IMPORTS,
        comparisons=(
            Comparison("mpidist over numpy", "numpy", "mpidist"),
            Comparison("all names over numpy", "numpy", "all names"),
        ),
    )


def _import_time(statement: str) -> float:
    """Return the seconds that an import takes in a fresh interpreter."""
    command = [sys.executable, "-c", _CODE.format(statement)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # this interpreter, and a text of ours
    if answer.returncode != 0:
        raise BenchmarkError(f"bench import: {statement} failed:\n{answer.stderr}")
    return float(answer.stdout)
