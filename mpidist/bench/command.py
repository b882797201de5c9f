"""``python -m mpidist bench``: the list of benchmarks, and what happens to their reports.

A benchmark is a module with a docstring, whose first line is its help, and two functions:
``configure(parser)`` adds its options; ``run(world, options)`` is collective over all ranks and
returns a `Report`. Add it to `BENCHMARKS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Protocol

from mpidist import env
from mpidist.bench import (
    all_reduce,
    checkpoint,
    collectives,
    crossovers,
    ddp,
    fsdp,
    guard,
    importing,
    nccl,
    overhead,
    p2p,
    pipeline,
    tracing,
)
from mpidist.bench.harness import BenchmarkError, add_files, check_files
from mpidist.bench.rendering import plot_report, render_table
from mpidist.bench.report import Report
from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup
from mpidist.job.start import init
from mpidist.usage import write_once


class Benchmark(Protocol):
    """A module that measures something."""

    __doc__: str | None

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this benchmark."""

    def run(self, world: ProcessGroup, options: argparse.Namespace) -> Report:
        """Run a benchmark, and print, write and draw what it found on the first rank.

        The exit code is 1 if the benchmark is a check that failed, 2 if it cannot run as asked.
        Collective over all ranks of the job. What is missing is reported before MPI starts.
        """
        ...


BENCHMARKS: Mapping[str, Benchmark] = {
    "all_reduce": all_reduce,
    "collectives": collectives,
    "p2p": p2p,
    "overhead": overhead,
    "ddp": ddp,
    "fsdp": fsdp,
    "pipeline": pipeline,
    "nccl": nccl,
    "checkpoint": checkpoint,
    "import": importing,
    "crossovers": crossovers,
    "guard": guard,
    "trace": tracing,
}
"""Every benchmark by its name on the command line."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks and their options."""
    choices = parser.add_subparsers(title="benchmarks", dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        text = (benchmark.__doc__ or "").strip()
        own = choices.add_parser(name, help=text.split("\n")[0], description=text)
        benchmark.configure(own)
        add_files(own)


def run(options: argparse.Namespace) -> int:
    """Run a benchmark, and print, write and draw what it found on the first rank.

    Returns
    -------
    int
        Exit code: 0; 1 if the benchmark is a check that failed; 2 if it cannot run as asked.

    Notes
    -----
    Collective over all ranks of the job. What is missing is reported before MPI starts.
    """
    if options.plot is not None and find_spec("matplotlib") is None:
        write_once(f"{_problem(options)}\n")
        return 2
    if env.launcher_rank() == 0:
        sys.stderr.writelines(f"{text}\n" for text in _absent_peers(options))
    with init() as world:
        try:
            _check_files(options, world)
            report = BENCHMARKS[options.benchmark].run(world, options)
        except BenchmarkError as error:
            if world.rank == 0:
                sys.stderr.write(f"{error}\n")
            return 2
        if world.rank == 0:
            start = ("mpirun", "-n", str(world.size)) if world.size > 1 else ()
            command = (*start, "python", "-m", "mpidist", *options.argv)
            _output(dataclasses.replace(report, command=command), options)
        return 1 if report.failures else 0


def _problem(options: argparse.Namespace) -> str:
    """Return what would fail after the measuring, or nothing."""
    try:
        check_files(options, f"bench {options.benchmark}")
    except BenchmarkError as error:
        return str(error)
    return ""


def _check_files(options: argparse.Namespace, world: ProcessGroup) -> None:
    """Raise on all ranks what the first one, which writes the files, finds wrong with them."""
    if message := broadcast_object(_problem(options) if world.rank == 0 else "", world):
        raise BenchmarkError(message)


def _absent_peers(options: argparse.Namespace) -> Iterator[str]:
    """Yield a sentence on each peer that is wanted and will be missing from the report."""
    for option in ("no_gloo", "no_torch"):
        if getattr(options, option, True) is False and find_spec("torch") is None:
            yield (
                f"bench {options.benchmark}: torch is not installed, so it is not measured beside "
                "mpidist; for the comparison: pip install 'mpidist[torch]'; without this line: "
                f"--{option.replace('_', '-')}"
            )


def _output(report: Report, options: argparse.Namespace) -> None:
    sys.stdout.write(render_table(report))
    sys.stdout.flush()
    if options.json is not None:
        report.save(options.json)
    if options.plot is not None:
        plot_report(report, options.plot)
