"""What a trace adds to a training step.

The step is that of ``bench ddp``, marked as a region. Blocks of some seconds take turns, every
second one inside `mpidist.trace`: so long that the thread which writes the events does its part.
Beginning and ending a trace is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import ceil
from time import perf_counter

import numpy as np

from mpidist._types import MAX, Array
from mpidist.bench.ddp import Shape, add_model, our_series
from mpidist.bench.harness import BenchmarkRun, add_number, temporary_directory
from mpidist.bench.report import Comparison, Measure, Report
from mpidist.bench.times import Times
from mpidist.collectives import all_reduce, barrier
from mpidist.group import ProcessGroup
from mpidist.observe.regions import STEP, region
from mpidist.tracing import trace

_TRACED, _PLAIN = "traced", "plain"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model(parser, millions=1.0, batch=16)
    add_number(parser, "--block", 2.0, "about how long each block takes", "SECONDS")
    add_number(parser, "--rounds", 10, "blocks of each kind")


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the step with and without a trace; collective over `world`."""
    bench, shape = BenchmarkRun("trace", world, options), Shape.of(options.millions * 1e6)
    samples: dict[str, list[Array]] = {_TRACED: [], _PLAIN: []}
    ours = our_series(world, shape, options.batch)
    with temporary_directory(world) as directory, ours as series:
        step = series[0].call
        length = _block_length(step, world, options.block)
        kinds: dict[str, Callable[[], AbstractContextManager[None]]] = {
            _TRACED: partial(trace, directory / "trace.json.gz", world),
            _PLAIN: nullcontext,
        }
        for number in range(options.rounds):
            for name in list(kinds)[:: 1 if number % 2 else -1]:
                with kinds[name]():
                    samples[name].append(_block(step, world, length))
            bench.report_progress(f"DDP step, round {number + 1},", shape.nbytes)
    times = {
        name: Times.of(all_reduce(np.concatenate(blocks), world, op=MAX))
        for name, blocks in samples.items()
    }
    bench.add("DDP step", shape.nbytes, times)
    share = times[_TRACED].median / times[_PLAIN].median - 1
    bench.notes += [
        f"{options.rounds} blocks of {length} steps each",
        f"a trace adds {share:.2%} to the median step",
    ]
    return bench.report(
        legend={_TRACED: "inside mpidist.trace", _PLAIN: "the same step while no trace is on"},
        comparisons=[Comparison("added", _TRACED, _PLAIN, Measure.ADDED)],
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
