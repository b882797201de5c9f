"""How long it takes to import mpidist, beside numpy.

Each import is timed inside a fresh interpreter, without the interpreter's own start. The two take
turns. No ranks are needed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from mpidist.bench.machine import Machine
from mpidist.bench.options import BenchmarkError
from mpidist.bench.report import Comparison, Report, Row
from mpidist.bench.times import Times
from mpidist.group import ProcessGroup

__all__ = ["configure", "run"]

_CODE = """
from time import perf_counter
start = perf_counter()
import {}
print(perf_counter() - start)
"""

_MODULES = ("mpidist", "numpy")


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
    for module in _MODULES:  # so that files are cached and compiled
        _import_time(module)
    samples: dict[str, list[float]] = {module: [] for module in _MODULES}
    for number in range(options.repeats):
        for module in _MODULES if number % 2 == 0 else _MODULES[::-1]:
            samples[module].append(_import_time(module))
    return Report(
        benchmark="import",
        machine=machine,
        rows=[
            Row(operation="import", series=module, nbytes=0, times=Times.of(samples[module]))
            for module in _MODULES
        ],
        comparisons=(Comparison("mpidist over numpy", "numpy", "mpidist"),),
        legend={"mpidist": "import mpidist, numpy included", "numpy": "import numpy"},
    )


def _import_time(module: str) -> float:
    """Return the seconds that a fresh interpreter takes to import a module."""
    command = [sys.executable, "-c", _CODE.format(module)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # this interpreter, and a text of ours
    if answer.returncode != 0:
        raise BenchmarkError(f"bench import: import {module} failed:\n{answer.stderr}")
    return float(answer.stdout)
