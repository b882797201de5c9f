"""What a trace adds to a training step.

The step is that of ``bench ddp``, marked as a region. Blocks of some seconds take turns, every
second one inside `mpidist.trace`: so long that the thread which writes the events does its part.
Beginning and ending a trace is not timed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil
from pathlib import Path
from time import perf_counter

import numpy as np

from mpidist._types import MAX, Array
from mpidist.bench.ddp import Shape, our_series
from mpidist.bench.harness import positive, report_progress, require_ranks
from mpidist.bench.report import Comparison, Machine, Measure, Report, Row
from mpidist.bench.times import Times
from mpidist.collectives import all_reduce, barrier, broadcast_object
from mpidist.group import ProcessGroup
from mpidist.observe.regions import STEP, region
from mpidist.tracing import trace

_TRACED, _PLAIN = "traced", "plain"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--millions",
        type=positive(float),
        default=1.0,
        metavar="N",
        help="about how many million parameters the model has (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=positive(int),
        default=16,
        help="samples of each rank (default: %(default)s)",
    )
    parser.add_argument(
        "--block",
        type=positive(float),
        default=2.0,
        metavar="SECONDS",
        help="about how long each block takes (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=positive(int),
        default=10,
        metavar="N",
        help="blocks of each kind (default: %(default)s)",
    )


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the step with and without a trace; collective over `world`."""
    require_ranks(world, "trace")
    machine, shape = Machine.of(world), Shape.of(options.millions * 1e6)
    directory = broadcast_object(tempfile.mkdtemp() if world.rank == 0 else "", world)
    kinds: dict[str, Callable[[], AbstractContextManager[None]]] = {
        _TRACED: partial(trace, Path(directory, "trace.json.gz"), world),
        _PLAIN: nullcontext,
    }
    samples: dict[str, list[Array]] = {name: [] for name in kinds}
    with our_series(world, shape, options.batch) as series:
        step = series[0].call
        length = _block_length(step, world, options.block)
        for number in range(options.rounds):
            for name in list(kinds)[:: 1 if number % 2 else -1]:
                with kinds[name]():
                    samples[name].append(_block(step, world, length))
            report_progress(world, f"DDP step, round {number + 1},", shape.nbytes)
    if world.rank == 0:
        shutil.rmtree(directory)
    times = {
        name: Times.of(all_reduce(np.concatenate(blocks), world, op=MAX))
        for name, blocks in samples.items()
    }
    share = times[_TRACED].median / times[_PLAIN].median - 1
    return Report(
        benchmark="trace",
        machine=machine,
        rows=[
            Row(operation="DDP step", series=name, nbytes=shape.nbytes, times=measured)
            for name, measured in times.items()
        ],
        comparisons=(Comparison("added", _TRACED, _PLAIN, Measure.ADDED),),
        legend={
            _TRACED: "inside mpidist.trace",
            _PLAIN: "the same step while no trace is on",
        },
        notes=(
            f"{options.rounds} blocks of {length} steps each",
            f"a trace adds {share:.2%} to the median step",
        ),
    )


def _block_length(step: Callable[[], object], world: ProcessGroup, seconds: float) -> int:
    """Warm up, and return how many steps take about so long on the slowest rank."""
    _block(step, world, 3)
    longest = all_reduce(np.array(np.median(_block(step, world, 5))), world, op=MAX)
    return max(2, ceil(seconds / float(longest)))


def _block(step: Callable[[], object], world: ProcessGroup, length: int) -> Array:
    """Make steps, and return this rank's times but the first."""
    times = np.empty(length)
    for number in range(length):
        barrier(world)
        start = perf_counter()
        with region(STEP):
            step()
        times[number] = perf_counter() - start
    return times[1:]
