"""What the benchmarks have in common: options, sizes, and the run that makes a report."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mpidist._formatting import format_bytes
from mpidist._optional import require
from mpidist.bench.report import Comparison, Machine, Report, Row, Target, bus_factor
from mpidist.bench.times import Effort, Series, Times, measure
from mpidist.collectives import barrier, broadcast_object
from mpidist.errors import BackendUnavailableError
from mpidist.group import ProcessGroup
from mpidist.usage import positive

_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}


class BenchmarkError(Exception):
    """A benchmark cannot run as asked; raised by all ranks alike, before anything is measured."""


def read_size(text: str) -> int:
    """Return the bytes that an option such as ``4``, ``64K`` or ``1MiB`` means; K is 1024."""
    match = re.fullmatch(r"([1-9]\d*) ?([KMG]?)i?B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; expected a number of bytes such as 4, 64K or 16MiB"
        )
    return int(match[1]) << _SHIFTS[match[2].upper()]


def sweep(first: str, last: str, factor: int) -> tuple[int, ...]:
    """Return the sizes from the first to the last, each `factor` times the one before."""
    sizes, stop = [read_size(first)], read_size(last)
    while sizes[-1] * factor <= stop:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)


def add_number(
    parser: argparse.ArgumentParser, option: str, default: float, text: str, metavar: str = "N"
) -> None:
    """Add an option that takes a number above 0, of the type of its default."""
    parser.add_argument(
        option,
        type=positive(type(default)),
        default=default,
        metavar=metavar,
        help=f"{text} (default: %(default)s)",
    )


def add_effort(
    parser: argparse.ArgumentParser, *, sizes: Sequence[int] = (), seconds: float = 2.0
) -> None:
    """Add ``--seconds`` and ``--repeats`` and, with sizes, ``--sizes``."""
    if sizes:
        defaults = [format_bytes(size).removesuffix(" B").replace(" ", "") for size in sizes]
        parser.add_argument(
            "--sizes",
            type=read_size,
            nargs="+",
            default=list(sizes),
            metavar="SIZE",
            help=f"bytes, such as 4, 64K or 16MiB (default: {' '.join(defaults)})",
        )
    text = "about how long to measure at each size, at least 25 calls of each series"
    add_number(parser, "--seconds", seconds, text, "SECONDS")
    parser.add_argument(
        "--repeats",
        type=positive(int),
        metavar="N",
        help="time N calls of each series at each size instead",
    )


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--plot``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a picture; .png, .svg or .pdf"
    )


def check_files(options: argparse.Namespace, command: str) -> None:
    """Raise `BenchmarkError` if the files of `add_files` could not be written after the work."""
    problems = [] if options.plot is None else _problems_of_picture(options.plot)
    problems += [
        f"cannot write {path}"
        for path in filter(None, (options.json, options.plot))
        if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir()
    ]
    if problems:
        raise BenchmarkError("\n".join(f"{command}: {problem}" for problem in problems))


def _problems_of_picture(path: Path) -> list[str]:
    try:
        require("matplotlib", extra="bench", purpose="--plot")
    except BackendUnavailableError as error:
        return [str(error)]
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() in known:
        return []
    return [f"--plot {path}: expected a name that ends with .{', .'.join(sorted(known))}"]


@contextmanager
def temporary_directory(world: ProcessGroup, parent: Path | None = None) -> Iterator[Path]:
    """Give all ranks a directory that is removed at the end; collective, blocks."""
    name = tempfile.mkdtemp(prefix="mpidist-bench-", dir=parent) if world.rank == 0 else ""
    directory = Path(broadcast_object(name, world))
    try:
        yield directory
        barrier(world)
    finally:
        if world.rank == 0:
            shutil.rmtree(directory)


class BenchmarkRun:
    """One run of a benchmark: the rows so far, and the notes on them; the same on all ranks.

    Making one is collective over `world`. It raises `BenchmarkError` on fewer ranks than `least`.
    """

    def __init__(
        self, benchmark: str, world: ProcessGroup, options: argparse.Namespace, *, least: int = 2
    ) -> None:
        if world.size < least:
            raise BenchmarkError(
                f"bench {benchmark}: expected at least {least} ranks, got {world.size}; start it "
                f"with mpirun -n {least} python -m mpidist bench {benchmark}"
            )
        self.world, self.machine = world, Machine.of(world)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._benchmark, self._options = benchmark, options

    def measure(self, operation: str, nbytes: int, series: Sequence[Series]) -> Mapping[str, Times]:
        """Time series against each other, for as long as the options say; collective, blocks."""
        effort = Effort(seconds=self._options.seconds, repeats=self._options.repeats)
        times = measure(series, self.world, effort=effort)
        self.report_progress(operation, nbytes)
        return times

    def measure_sizes(
        self, operation: str, sizes: Sequence[int], make: Callable[[int], Sequence[Series]]
    ) -> None:
        """Measure the series that ``make(nbytes)`` returns at each size, and add their rows."""
        for nbytes in sizes:
            self.add(operation, nbytes, self.measure(operation, nbytes, make(nbytes)))

    def add(
        self,
        operation: str,
        nbytes: int,
        times: Mapping[str, Times],
        values: Mapping[str, Mapping[str, float]] | None = None,
        *,
        factor: float | None = None,
    ) -> None:
        """Add a row for each series, with its `values` if there are any."""
        for name, measured in times.items():
            self.rows.append(
                Row(
                    operation=operation,
                    series=name,
                    nbytes=nbytes,
                    times=measured,
                    bus_factor=factor or bus_factor(operation, self.world.size),
                    values=(values or {}).get(name, {}),
                )
            )

    def report_progress(self, operation: str, nbytes: int) -> None:
        """Write on the first rank's standard error what has been measured."""
        if self.world.rank == 0:
            sys.stderr.write(f"measured {operation} at {format_bytes(nbytes)}\n")
            sys.stderr.flush()

    def report(
        self,
        *,
        legend: Mapping[str, str],
        comparisons: Sequence[Comparison],
        targets: Sequence[Target] = (),
        failures: Sequence[str] = (),
    ) -> Report:
        """Return the report; of the legend it has the series that were measured."""
        series = dict.fromkeys(row.series for row in self.rows)
        return Report(
            benchmark=self._benchmark,
            machine=self.machine,
            rows=self.rows,
            comparisons=comparisons,
            targets=targets,
            legend={name: legend[name] for name in series if name in legend},
            notes=tuple(dict.fromkeys(self.notes)),
            failures=failures,
        )
