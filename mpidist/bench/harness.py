"""What the benchmarks have in common: options, sizes, one operation over several sizes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mpidist._formatting import format_bytes
from mpidist._optional import require
from mpidist.bench.report import Row, bus_factor
from mpidist.bench.times import Effort, Series, measure
from mpidist.errors import BackendUnavailableError
from mpidist.group import ProcessGroup

_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}


def read_size(text: str) -> int:
    """Return the number of bytes that a word of the command line means.

    Parameters
    ----------
    text : str
        A whole number, of bytes or with a unit that is a power of 1024: ``4``, ``64K``, ``1MiB``.

    Returns
    -------
    int
        Number of bytes, at least 1.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is none.
    """
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


class BenchmarkError(Exception):
    """A benchmark cannot run as asked; raised by all ranks alike, before anything is measured."""


def add_effort(
    parser: argparse.ArgumentParser, *, sizes: Sequence[int] | None, seconds: float = 2.0
) -> None:
    """Add ``--sizes``, ``--seconds`` and ``--repeats``.

    Parameters
    ----------
    parser : ArgumentParser
        Parser of one benchmark.
    sizes : sequence of int or None
        Default of ``--sizes`` in bytes; None for a benchmark without sizes.
    seconds : float, optional
        Default of ``--seconds``, for each size.
    """
    if sizes is not None:
        parser.add_argument(
            "--sizes",
            type=read_size,
            nargs="+",
            default=list(sizes),
            metavar="SIZE",
            help=f"bytes, such as 4, 64K or 16MiB (default: {' '.join(map(_word, sizes))})",
        )
    parser.add_argument(
        "--seconds",
        type=positive(float),
        default=seconds,
        help="about how long to measure at each size, at least 25 calls of each series "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=positive(int),
        metavar="N",
        help="time N calls of each series at each size instead",
    )


def effort(options: argparse.Namespace) -> Effort:
    """Return what `add_effort` was given."""
    return Effort(seconds=options.seconds, repeats=options.repeats)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--plot``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a picture; .png, .svg or .pdf"
    )


def check_files(options: argparse.Namespace, command: str) -> None:
    """Raise what is wrong with the options of `add_files`, before the work.

    Parameters
    ----------
    options : Namespace
        What the parser made.
    command : str
        With which the message begins.

    Raises
    ------
    BenchmarkError
        If files cannot be written, or the picture cannot be drawn; it names all that is wrong.
    """
    problems = [] if options.plot is None else list(_of_picture(options.plot))
    problems += [
        f"cannot write {path}"
        for path in filter(None, (options.json, options.plot))
        if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir()
    ]
    if problems:
        raise BenchmarkError("\n".join(f"{command}: {problem}" for problem in problems))


def _of_picture(path: Path) -> Iterator[str]:
    try:
        require("matplotlib", extra="bench", purpose="--plot")
    except BackendUnavailableError as error:
        yield str(error)
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        yield f"--plot {path}: expected a name that ends with .{', .'.join(sorted(known))}"


def require_ranks(world: ProcessGroup, benchmark: str, *, least: int = 2) -> None:
    """Raise unless there are enough ranks.

    Parameters
    ----------
    world : ProcessGroup
        All ranks of the job.
    benchmark : str
        Name of the benchmark, for the message.
    least : int, optional
        Number of ranks from which on it can run.

    Raises
    ------
    BenchmarkError
        If there are fewer.
    """
    if world.size < least:
        raise BenchmarkError(
            f"bench {benchmark}: expected at least {least} ranks, got {world.size}; start it with "
            f"mpirun -n {least} python -m mpidist bench {benchmark}"
        )


def report_progress(world: ProcessGroup, operation: str, nbytes: int) -> None:
    """Write on the first rank's standard error that a size has been measured."""
    if world.rank == 0:
        sys.stderr.write(f"measured {operation} at {format_bytes(nbytes)}\n")
        sys.stderr.flush()


def _word(nbytes: int) -> str:
    return format_bytes(nbytes).removesuffix(" B").replace(" ", "")


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a reader of numbers above 0, for the ``type`` of an option.

    Parameters
    ----------
    kind : callable
        Makes a number of a text, such as `int`.

    Returns
    -------
    callable
        Takes the text, and raises `argparse.ArgumentTypeError` unless it is such a number.
    """

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
        return value

    return read


def rows_over(
    sizes: Sequence[int],
    make: Callable[[int], Sequence[Series]],
    world: ProcessGroup,
    *,
    operation: str,
    options: argparse.Namespace,
) -> list[Row]:
    """Measure what `make` returns for each size.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of the whole array.
    make : callable
        ``make(nbytes)`` returns the series to measure at a size; collective over `world`.
    world : ProcessGroup
        The ranks taking part.
    operation : str
        Name of the operation, for the rows.
    options : Namespace
        With what `add_effort` adds.

    Returns
    -------
    list of Row
        One per size and series, the same on all ranks.

    Notes
    -----
    Collective over `world`; blocks. Tells the first rank's standard error how far it is.
    """
    factor = bus_factor(operation, world.size)
    rows = []
    for nbytes in sizes:
        times = measure(make(nbytes), world, effort=effort(options))
        report_progress(world, operation, nbytes)
        rows += [
            Row(operation=operation, series=name, nbytes=nbytes, times=measured, bus_factor=factor)
            for name, measured in times.items()
        ]
    return rows
