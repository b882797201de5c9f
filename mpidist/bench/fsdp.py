"""A training step with FSDP, beside DDP, sharded optimizers and torch's FSDP2 over Gloo.

A step is forward, backward and the update by AdamW, of the model of ``bench ddp``. Over several
nodes HYBRID_SHARD is measured beside FULL_SHARD. Sizes are the bytes of all parameters. The row of
each series has the values `parameters`, `layers` and `width`; those that communicate also `added`,
the seconds over the same step without communication; and mpidist's strategies `held`, the bytes of
parameters, gradients, buffers and optimizer state that rank 0 holds, at most, `messages`, in which
gradients travel, and the bytes of the `largest` one. Sums in a node and between nodes are measured
first; from these and the step alone ``plan`` predicts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mpidist import env, nn
from mpidist._types import Array
from mpidist.arrays.boxes import split_evenly
from mpidist.backends.work import Work
from mpidist.bench.ddp import Shape, make_model, torch_model
from mpidist.bench.harness import BenchmarkRun, add_effort, add_number
from mpidist.bench.peers import Gloo, open_gloo, shard_fully
from mpidist.bench.report import Comparison, Measure, Report, Target
from mpidist.bench.strategies import (
    ALL_REDUCE,
    ALONE,
    GATHER,
    REDUCE_SCATTER,
    SCATTER,
    STEP,
    SUM,
    UPDATE,
    plan_strategies,
    strategies_table,
)
from mpidist.bench.times import Effort, Series, Times, measure
from mpidist.collectives import iall_gather, iall_reduce, ireduce_scatter
from mpidist.group import ProcessGroup
from mpidist.optim import AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    BucketSizes,
    MemoryUse,
    ShardedOptimizer,
    ShardingStrategy,
    memory_use,
)
from mpidist.parallel.sharded.units import find_units
from mpidist.usage import positive

FULL_SHARD, HYBRID_SHARD = ShardingStrategy.FULL_SHARD.name, ShardingStrategy.HYBRID_SHARD.name
ZERO1, ZERO2, REPLICATED = "DDP+sharded", "sharded", "DDP"
FSDP2, TORCH_ALONE = "torch FSDP2", "torch alone"
_RATE = 1e-4

COMPARISONS = (
    Comparison("FULL/DDP+sharded", FULL_SHARD, ZERO1),
    Comparison("FULL/DDP", FULL_SHARD, REPLICATED),
    Comparison("HYBRID/DDP", HYBRID_SHARD, REPLICATED),
    *(
        Comparison(f"{name} added", name, ALONE, Measure.ADDED)
        for name in (FULL_SHARD, HYBRID_SHARD, ZERO1)
    ),
    Comparison("FSDP2 added", FSDP2, TORCH_ALONE, Measure.ADDED),
)

_LEGEND = {
    FULL_SHARD: "FSDP(model, world, units=...) and a ShardedOptimizer of it",
    HYBRID_SHARD: "the same with strategy=ShardingStrategy.HYBRID_SHARD",
    ZERO1: "DDP(model, world) and ShardedOptimizer(ddp, world): only the state is sharded",
    ZERO2: "ShardedOptimizer(model, world): gradients, too; buckets instead of units",
    REPLICATED: "DDP(model, world) and AdamW: every rank has all",
    ALONE: "no communication: forward, backward, and AdamW of this rank's share of each parameter",
    UPDATE: "of that the part of AdamW",
    FSDP2: "torch's fully_shard of the same units over Gloo, and torch's AdamW",
    TORCH_ALONE: "the same as alone, in torch",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--millions",
        type=positive(float),
        nargs="+",
        default=[5.0, 50.0],
        metavar="N",
        help="about how many million parameters the models have (default: 5 50)",
    )
    add_number(parser, "--units", 32.0, "most MiB of parameters in a unit", "MIB")
    add_number(parser, "--batch", 16, "samples of each rank")
    parser.add_argument("--no-torch", action="store_true", help="leave out the peer torch")
    add_effort(parser, seconds=10.0)


_SIZES = (256 << 10, 4 << 20, 32 << 20)
"""Bytes of the sums in a node."""

_SIZES_BETWEEN = (1 << 20, 16 << 20)
"""Bytes of a node's sums with others; shorter ones may fit into buffers on their way."""

_REPEATS = 10

_PLAN = "\nWhat the formulae of python -m mpidist plan say of these steps:"


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the step of each model; collective over `world`."""
    bench = BenchmarkRun("fsdp", world, options)
    targets: list[Target] = []
    _measure_sums(bench)
    bench.notes.append(f"{options.batch} samples on each rank in each step")
    if env.omp_num_threads() != "1":
        bench.notes.append("set OMP_NUM_THREADS=1: numpy's threads take the cores of other ranks")
    peer = nullcontext("torch was left out") if options.no_torch else open_gloo(world)
    with peer as gloo:
        bench.notes.append(gloo if isinstance(gloo, str) else f"torch {gloo.version}, 1 thread")
        for millions in options.millions:
            shape = Shape.of(millions * 1e6)
            units = int(options.units * (1 << 20))
            ours = _ours(world, shape, options.batch, units)
            theirs = _theirs(gloo, world, shape, options.batch, units)
            with ours as (strategies, alone), theirs as peers:
                series = [Series(name, s.step) for name, s in strategies.items()]
                series += [Series(UPDATE, alone.step), *peers]
                times = bench.measure(STEP, shape.nbytes, series)
                held = {name: s.held() for name, s in strategies.items() if s.held is not None}
            values = _values(shape, times)
            for name, use in held.items():
                values[name] |= {"held": float(use.total)} | _messages(name, shape, units)
            bench.add(STEP, shape.nbytes, times, values)
            targets += _targets(shape, times, world.num_nodes)
    report = bench.report(legend=_LEGEND, comparisons=COMPARISONS, targets=targets)
    steps = [step for step in plan_strategies(report, []) if step.measured is not None]
    return replace(report, notes=(*report.notes, _PLAN, strategies_table(steps)))


def _measure_sums(bench: BenchmarkRun) -> None:
    """Measure what a step's communication consists of: sums in a node and between nodes."""
    world = bench.world
    node, across = world.node_group(), world.cross_group()
    for nbytes in _SIZES if world.local_size > 1 else ():
        x = node.empty(nbytes // 4)
        x.fill(0)
        counts = [count for _, count in split_evenly(x.size, node.size)]
        own = np.empty(counts[node.rank], np.float32)
        for operation, begin in (
            (ALL_REDUCE, partial(iall_reduce, x, node, out=x)),
            (REDUCE_SCATTER, partial(ireduce_scatter, x, node, out=own, counts=counts)),
        ):
            _measure_sum(bench, operation, nbytes, begin)
    if across is None or across.size == 1:
        return
    for nbytes in _SIZES_BETWEEN:
        x, own = (np.zeros(nbytes // 4 // parts, np.float32) for parts in (node.size, world.size))
        y = world.empty(own.size * world.size)  # as many for each rank
        y.fill(0)
        gathered = x[: own.size * across.size]
        for operation, begin in (
            (SUM, partial(iall_reduce, x, across, out=x)),
            (GATHER, partial(iall_gather, own, across, out=gathered)),
            (SCATTER, partial(ireduce_scatter, y, world, out=own)),
        ):
            _measure_sum(bench, operation, nbytes, begin)


def _measure_sum(
    bench: BenchmarkRun, operation: str, nbytes: int, begin: Callable[[], Work[Any]]
) -> None:
    """Measure an immediate operation, as steps use them."""
    series = Series("sum", lambda: begin().wait())
    bench.add(operation, nbytes, measure([series], bench.world, effort=Effort(repeats=_REPEATS)))


def _messages(name: str, shape: Shape, units: int) -> dict[str, float]:
    """Return in how many messages a strategy sends gradients, and the bytes of the largest one."""
    cut = units if name in ShardingStrategy.__members__ else BucketSizes()
    sizes = [unit.nbytes for unit in find_units(make_model(shape), cut)]
    return {"messages": float(len(sizes)), "largest": float(max(sizes))}


def _values(shape: Shape, times: Mapping[str, Times]) -> dict[str, dict[str, float]]:
    """Return what the rows of the series say of the model and of their times."""
    values = {name: shape.values() for name in times}
    for name in times:
        added = _added(times, name)
        if added is not None:
            values[name]["added"] = added
    return values


def _added(times: Mapping[str, Times], name: str) -> float | None:
    """Return the seconds that communication adds; None where nothing was measured beside it."""
    alone = TORCH_ALONE if name == FSDP2 else ALONE
    if name not in times or name in (ALONE, UPDATE, TORCH_ALONE):
        return None
    return times[name].median - times[alone].median


def _targets(shape: Shape, times: Mapping[str, Times], nodes: int) -> list[Target]:
    """Return what FSDP is to reach beside DDP and torch."""
    bounds = {(FULL_SHARD, ZERO1): 1.05}
    if nodes > 1:
        bounds = {(HYBRID_SHARD, REPLICATED): 1.1, (FULL_SHARD, REPLICATED): 1.5}
    millions = f"{shape.parameters / 1e6:.2f}"
    targets = [
        Target(
            what=f"{millions} million, {name} over {reference}",
            value=times[name].median / times[reference].median,
            bound=bound,
            most=True,
            detail=f"{times[name].median * 1e3:.1f} ms, {times[reference].median * 1e3:.1f} ms",
        )
        for (name, reference), bound in bounds.items()
        if name in times
    ]
    added, peer = _added(times, FULL_SHARD), _added(times, FSDP2)
    if added is not None and peer is not None:
        targets.append(
            Target(
                what=f"{millions} million, added over FSDP2's",
                value=added / peer,
                bound=1 / 3,
                most=True,
                detail=f"{added * 1e3:.1f} ms, {peer * 1e3:.1f} ms",
            )
        )
    return targets


class _Trained(NamedTuple):
    """A step of one strategy, and what counts the memory that it holds."""

    step: Callable[[], None]
    held: Callable[[], MemoryUse] | None


@contextmanager
def _ours(
    world: ProcessGroup, shape: Shape, batch: int, units: int
) -> Iterator[tuple[dict[str, _Trained], Alone]]:
    """Give the strategies of mpidist, each of which has made a step, and the one of `ALONE`."""
    rng = np.random.default_rng(world.rank)
    x, dy = rng.standard_normal((2, batch, shape.width), np.float32)
    hybrid = [HYBRID_SHARD] if world.num_nodes > 1 else []
    names = [FULL_SHARD, *hybrid, ZERO1, ZERO2, REPLICATED]
    with ExitStack() as stack:
        strategies = {}
        for name in names:
            model = make_model(shape)
            forward, training, held = _training(name, model, world, units, stack)
            strategies[name] = _Trained(partial(make_step, forward, training, x, dy), held)
        model = make_model(shape)
        alone = Alone(model, world)
        strategies[ALONE] = _Trained(partial(make_step, model.forward, alone, x, dy), None)
        for strategy in strategies.values():
            strategy.step()
        yield strategies, alone


def _training(
    name: str, model: nn.Module, world: ProcessGroup, units: int, stack: ExitStack
) -> tuple[Callable[..., Any], Any, Callable[[], MemoryUse]]:
    """Return a forward pass, what has ``zero_grad``, ``backward`` and ``step``, and its memory."""
    factory = partial(AdamW, lr=_RATE)
    if name == REPLICATED:
        ddp, optimizer = stack.enter_context(DDP(model, world)), factory(model.named_parameters())
        return ddp.forward, _Replicated(ddp, optimizer), partial(memory_use, model, optimizer)
    if name == ZERO1:
        ddp = stack.enter_context(DDP(model, world))
        forward, sharded = ddp.forward, ShardedOptimizer(ddp, world, optimizer=factory)
    elif name == ZERO2:
        forward, sharded = model.forward, ShardedOptimizer(model, world, optimizer=factory)
    else:
        strategy = ShardingStrategy[name]
        fsdp = stack.enter_context(FSDP(model, world, strategy=strategy, units=units))
        forward, sharded = fsdp.forward, ShardedOptimizer(fsdp, optimizer=factory)
    return forward, stack.enter_context(sharded), sharded.memory_use


class _Replicated(NamedTuple):
    """A `DDP` and an optimizer of all its parameters."""

    ddp: DDP
    optimizer: AdamW

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def backward(self, ctx: nn.Context, dy: Array) -> None:
        self.ddp.backward(ctx, dy)

    def step(self) -> None:
        self.optimizer.step()


class Alone:
    """What every strategy has to compute: all gradients, and the update of this rank's share."""

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self._model = model
        self._shares = []
        for name, parameter in model.named_parameters():
            own = share(parameter.size, group)
            shard = nn.Parameter(parameter.data.reshape(-1)[own], name=name)
            self._shares.append((parameter, own, shard))
        self._optimizer = AdamW([(shard.name, shard) for *_, shard in self._shares], lr=_RATE)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter, *_ in self._shares:
            parameter.zero_grad()

    def backward(self, ctx: nn.Context, dy: Array) -> None:
        """Compute all gradients."""
        self._model.backward(ctx, dy)

    def step(self) -> None:
        """Update this rank's share of each parameter."""
        for parameter, own, shard in self._shares:
            assert parameter.grad is not None, "backward has been run"
            part = parameter.grad.reshape(-1)[own]
            shard.zero_grad()
            shard.attach(part)
            shard.add_grad(part)
        self._optimizer.step()


def share(size: int, group: ProcessGroup) -> slice:
    """Return this rank's part of so many elements."""
    start, count = split_evenly(size, group.size)[group.rank]
    return slice(start, start + count)


def make_step(forward: Callable[..., Any], training: Any, x: Array, dy: Array) -> None:
    """Train on one batch."""
    training.zero_grad()
    _, ctx = forward(x, nn.Mode(training=True))
    training.backward(ctx, dy)
    training.step()


@contextmanager
def _theirs(
    gloo: Gloo | str, world: ProcessGroup, shape: Shape, batch: int, units: int
) -> Iterator[list[Series]]:
    """Give the series of torch, if there is one."""
    if isinstance(gloo, str):
        yield []
        return
    torch = gloo.torch
    with gloo.one_thread():
        x, dy = torch.randn(2, batch, shape.width)
        sharded, alone = torch_model(torch, shape), torch_model(torch, shape)
        names = [unit.parameters for unit in find_units(make_model(shape), units)]
        shard_fully(sharded, names, world.size)
        optimizer = torch.optim.AdamW(sharded.parameters(), lr=_RATE)
        shares = []
        for parameter in alone.parameters():
            own = share(parameter.numel(), world)
            shard = torch.nn.Parameter(parameter.detach().view(-1)[own])
            shares.append((parameter, own, shard))
        of_shares = torch.optim.AdamW([shard for *_, shard in shares], lr=_RATE)
        yield [
            Series(FSDP2, partial(_torch_step, sharded, optimizer, [], x, dy)),
            Series(TORCH_ALONE, partial(_torch_step, alone, of_shares, shares, x, dy)),
        ]


def _torch_step(model: Any, optimizer: Any, shares: list[tuple[Any, ...]], x: Any, dy: Any) -> None:
    model.zero_grad()
    model(x).backward(dy)
    for parameter, own, shard in shares:
        shard.grad = parameter.grad.view(-1)[own]
    optimizer.step()
