"""Steps of a pipeline beside what its schedule says, and torch's pipelining over Gloo.

Three things are measured. Stages that sleep, under every schedule: the step over the span that
`simulate` gives, which is the row's value `simulated`, in seconds. Stages that pass 1 KiB on and do
nothing else: the time of a step over the number of a rank's actions, all of it added by the
pipeline. And stages of the model of ``bench ddp``, forward and backward without optimizer: for
these `simulated` is made of what the passes of each stage take alone, on all ranks at once, in the
same library. The peer is compared by the step over its own simulated span, since it computes at
another speed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

from mpidist import env, nn
from mpidist._types import Array
from mpidist.bench.ddp import Shape, make_model, torch_model
from mpidist.bench.harness import BenchmarkRun, add_effort, add_number
from mpidist.bench.peers import Gloo, open_gloo, pipeline_step
from mpidist.bench.report import Report, Target
from mpidist.bench.times import Series, measure_rounds
from mpidist.collectives import all_gather_object
from mpidist.errors import ScheduleError
from mpidist.group import ProcessGroup
from mpidist.parallel import Costs, Pipeline, Schedule, simulate
from mpidist.parallel.pipeline.generators import SCHEDULES

SLEEPING, PASSING, STEP = "sleeping stages", "an action", "pipeline step"
ALONE, TORCH_ALONE = "alone", "torch alone"
PEERS = {"gpipe": "torch GPipe", "1f1b": "torch 1F1B"}
"""The schedules that torch has, too, and the series of its steps."""

_ROUNDS = 5
_MODE = nn.Mode(training=True)

_LEGEND = {
    **dict.fromkeys(SCHEDULES, "Pipeline(model, world, schedule=...).step()"),
    ALONE: "each rank's stage over all micro-batches, without the others",
    **dict.fromkeys(PEERS.values(), "the schedule of torch.distributed.pipelining, over Gloo"),
    TORCH_ALONE: "the same as alone, in torch",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_number(parser, "--sleep", 20.0, "how long each pass of a sleeping stage takes", "MS")
    add_number(parser, "--micro-batches", 8, "parts of a batch")
    add_number(parser, "--millions", 4.0, "about how many million parameters the model has")
    add_number(parser, "--batch", 64, "samples of a micro-batch")
    parser.add_argument("--no-torch", action="store_true", help="leave out the peer torch")
    add_effort(parser, seconds=20.0)


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the steps; collective over `world`."""
    bench = BenchmarkRun("pipeline", world, options)
    if env.omp_num_threads() != "1":
        bench.notes.append("set OMP_NUM_THREADS=1: numpy's threads take the cores of other ranks")
    targets = _sleeping(bench, options)
    if bench.machine.usable_cores < world.local_size:
        bench.notes.append("only stages that sleep: the others need a core for each rank")
    else:
        targets += [_passing(bench, options), *_training(bench, options)]
    bench.notes.append(f"load average {os.getloadavg()[0]:.2f} after")
    return bench.report(legend=_LEGEND, comparisons=(), targets=targets)


# -- stages that compute nothing -------------------------------------------------------------------


class Sleep(nn.Module):
    """Passes arrays on; each forward pass, and each half of backward, takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def forward(self, x: Array, mode: nn.Mode) -> tuple[Array, nn.Context]:
        """Return `x`."""
        self._sleep()
        return x, nn.Context(None)

    def backward_input(self, ctx: nn.Context, dy: Array) -> tuple[Array, None]:
        """Return `dy`."""
        self._sleep()
        return dy, None

    def backward_weight(self, wctx: None) -> None:
        """Only sleep."""
        self._sleep()

    def _sleep(self) -> None:
        if self._seconds > 0:  # a sleep of 0 s gives the core away
            sleep(self._seconds)


def _no_loss(y: Array, _: Array, /, *, denominator: float) -> tuple[Array, Array]:
    """Return 0, and `y` as its own gradient."""
    return np.zeros(()) / denominator, y


def _asleep(world: ProcessGroup, schedule: Schedule, seconds: float) -> Pipeline:
    """Return a pipeline of one layer per stage."""
    return Pipeline(
        nn.Sequential(*(Sleep(seconds) for _ in range(schedule.stages))),
        world,
        micro_batches=schedule.micro_batches,
        schedule=schedule,
        loss=_no_loss,
        cut="layers",
    )


def _sleeping(bench: BenchmarkRun, options: argparse.Namespace) -> list[Target]:
    """Measure stages that sleep: a core is free for whoever waits, however many ranks it has."""
    world, seconds = bench.world, options.sleep * 1e-3
    x = np.ones((options.micro_batches, 256), np.float32)
    series, spans = [], {}
    with ExitStack() as stack:
        for name, make in SCHEDULES.items():
            try:
                schedule = make(world.size, options.micro_batches)
            except ScheduleError as error:
                bench.notes.append(f"left out: {error}")
                continue
            pipe = stack.enter_context(_asleep(world, schedule, seconds))
            series.append(Series(name, partial(pipe.step, x, x, _MODE)))
            spans[name] = simulate(schedule).span * seconds
        times = measure_rounds(series, world, rounds=options.repeats or _ROUNDS)
    bench.add(SLEEPING, 0, times, {name: {"simulated": span} for name, span in spans.items()})
    return [
        Target(
            what=f"sleeping stages, {name}, step over simulated",
            value=times[name].median / span,
            bound=1.1,
            most=True,
            detail=f"{times[name].median * 1e3:.1f} ms, {span * 1e3:.1f} ms",
        )
        for name, span in spans.items()
    ]


def _passing(bench: BenchmarkRun, options: argparse.Namespace) -> Target:
    """Measure stages that take no time."""
    world, name = bench.world, "1f1b"
    schedule = SCHEDULES[name](world.size, 2 * options.micro_batches)
    x = np.ones((schedule.micro_batches, 256), np.float32)
    with _asleep(world, schedule, 0.0) as pipe:
        actions = len(schedule.actions[world.rank])
        series = Series(name, partial(pipe.step, x, x, _MODE), operations=actions)
        times = bench.measure(PASSING, 0, [series])
    bench.add(PASSING, 0, times)
    added = times[name].median * 1e6
    return Target(what="added to an action, us", value=added, bound=150.0, most=True)


# -- stages of a model ---------------------------------------------------------------------------


class _PassTimes:
    """How long the passes of a rank's stage take without the other ranks, in seconds."""

    def __init__(self) -> None:
        self.forward: list[float] = []
        self.backward: list[float] = []

    def span(self, schedule: Schedule, world: ProcessGroup) -> float:
        """Return the span of a schedule with the medians of all ranks; collective."""
        own = median(self.forward), median(self.backward) / 2
        forward, half = zip(*all_gather_object(own, world), strict=True)
        return simulate(schedule, Costs(forward, half, half)).span


def _training(bench: BenchmarkRun, options: argparse.Namespace) -> list[Target]:
    """Measure steps of a model beside torch's."""
    world, micro = bench.world, options.micro_batches
    shape = Shape.of(options.millions * 1e6)
    shape = Shape(shape.width, max(shape.layers, world.size))
    bench.notes.append(f"{shape.layers} layers of {shape.width}; {options.batch} samples each")
    x, target = np.random.default_rng(0).standard_normal(
        (2, micro * options.batch, shape.width), np.float32
    )
    peer = nullcontext("torch was left out") if options.no_torch else open_gloo(world)
    with ExitStack() as stack:
        gloo = stack.enter_context(peer)
        bench.notes.append(gloo if isinstance(gloo, str) else f"torch {gloo.version}, 1 thread")
        ours, taken = stack.enter_context(_ours(world, shape, x, target, micro))
        theirs, taken_by_torch = stack.enter_context(_theirs(gloo, world, shape, x, target, micro))
        times = bench.measure(STEP, shape.nbytes, [*ours, *theirs])
    values: dict[str, dict[str, float]] = {}
    for name, series in PEERS.items():
        schedule = SCHEDULES[name](world.size, micro)
        values[name] = {"simulated": taken.span(schedule, world)}
        if theirs:
            values[series] = {"simulated": taken_by_torch.span(schedule, world)}
    bench.add(STEP, shape.nbytes, times, values)
    over = {name: times[name].median / row["simulated"] for name, row in values.items()}
    bench.notes += [
        f"{name}: {times[name].median * 1e3:.2f} ms, {over[name]:.3f} of the simulated "
        f"{row['simulated'] * 1e3:.2f} ms"
        for name, row in values.items()
    ]
    return [
        Target(
            what=f"{name}, step over simulated, over torch's",
            value=over[name] / over[series],
            bound=1.0,
            most=True,
            detail=f"{over[name]:.3f}, {over[series]:.3f}",
        )
        for name, series in PEERS.items()
        if theirs
    ]


def _first_layers(shape: Shape, ranks: int) -> list[int]:
    """Return with which layer each stage begins, and the number of all: `Linear`, `ReLU`, ..."""
    return [2 * (shape.layers * rank // ranks) for rank in range(ranks)] + [2 * shape.layers - 1]


@contextmanager
def _ours(
    world: ProcessGroup, shape: Shape, x: Array, target: Array, micro: int
) -> Iterator[tuple[list[Series], _PassTimes]]:
    """Give the series of mpidist, and the times of the passes alone when they have been run."""
    first, taken = _first_layers(shape, world.size), _PassTimes()
    part = make_model(shape).part(*first[world.rank : world.rank + 2])
    last = world.rank == world.size - 1
    batches = list(zip(np.split(x, micro), np.split(target, micro), strict=True))

    def alone() -> None:
        for parameter in part.parameters():
            parameter.zero_grad()
        for x_part, target_part in batches:
            began = perf_counter()
            dy, ctx = part.forward(x_part, _MODE)
            if last:
                _, dy = nn.mse_loss(dy, target_part, denominator=target.size)
            middle = perf_counter()
            part.backward(ctx, dy)
            taken.forward.append(middle - began)
            taken.backward.append(perf_counter() - middle)

    def step(pipe: Pipeline) -> None:
        pipe.zero_grad()
        pipe.step(x, target, _MODE, denominator=target.size)

    with ExitStack() as stack:
        series = []
        for name in PEERS:
            pipe = stack.enter_context(
                Pipeline(
                    make_model(shape),
                    world,
                    micro_batches=micro,
                    schedule=name,
                    loss=nn.mse_loss,
                    cut=first[1:-1],
                )
            )
            series.append(Series(name, partial(step, pipe)))
        yield [*series, Series(ALONE, alone)], taken


@contextmanager
def _theirs(
    gloo: Gloo | str, world: ProcessGroup, shape: Shape, x: Array, target: Array, micro: int
) -> Iterator[tuple[list[Series], _PassTimes]]:
    """Give the same of torch, if there is one."""
    taken = _PassTimes()
    if isinstance(gloo, str):
        yield [], taken
        return
    torch = gloo.torch
    with gloo.one_thread():
        first = _first_layers(shape, world.size)
        begin, end = first[world.rank : world.rank + 2]
        last = world.rank == world.size - 1
        whole_x, whole_target = torch.from_numpy(x), torch.from_numpy(target)
        batches = list(zip(whole_x.chunk(micro), whole_target.chunk(micro), strict=True))

        def loss(y: Any, target_part: Any) -> Any:
            squares = torch.nn.functional.mse_loss(y, target_part, reduction="sum")
            return squares / target.size

        def part() -> Any:
            return torch.nn.Sequential(*torch_model(torch, shape)[begin:end])

        def alone(module: Any) -> None:
            module.zero_grad()
            for x_part, target_part in batches:
                leaf = x_part.detach().requires_grad_(world.rank > 0)
                began = perf_counter()
                y = module(leaf)
                value = loss(y, target_part) if last else y
                middle = perf_counter()
                value.backward(None if last else y.detach())
                taken.forward.append(middle - began)
                taken.backward.append(perf_counter() - middle)

        series = []
        for name, peer in PEERS.items():
            module = part()
            step = pipeline_step(name, module, world, micro, loss)
            series.append(Series(peer, partial(step, whole_x, whole_target)))
        yield [*series, Series(TORCH_ALONE, partial(alone, part()))], taken
