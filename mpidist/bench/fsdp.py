"""A training step with FSDP, beside DDP, sharded optimizers and torch's FSDP2 over Gloo.

A step is forward, backward and the update by AdamW, of the model of ``bench ddp``. FSDP is
FULL_SHARD; over several nodes it is HYBRID_SHARD, too, which shards within each. Sizes are the
bytes of all parameters. The row of each series has the values `parameters`, `layers` and `width`;
those of mpidist's strategies also `held`, the bytes of parameters, gradients, buffers and optimizer
state that rank 0 holds, at most; and those that communicate also `added`, the seconds over the same
step without communication.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mpidist import env, nn
from mpidist._formatting import format_bytes
from mpidist._types import Array
from mpidist.arrays.boxes import split_evenly
from mpidist.bench.ddp import Shape, make_model, torch_model
from mpidist.bench.harness import BenchmarkRun, add_effort, add_number, positive
from mpidist.bench.peers import Gloo, open_gloo, shard_fully
from mpidist.bench.report import Comparison, Measure, Report, Target
from mpidist.bench.times import Series, Times
from mpidist.group import ProcessGroup
from mpidist.optim import AdamW
from mpidist.parallel import DDP, FSDP, MemoryUse, ShardedOptimizer, ShardingStrategy, memory_use
from mpidist.parallel.sharded.units import find_units

FULL_SHARD, HYBRID_SHARD = ShardingStrategy.FULL_SHARD.name, ShardingStrategy.HYBRID_SHARD.name
ZERO1, ZERO2, REPLICATED, ALONE = "DDP+sharded", "sharded", "DDP", "alone"
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


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the step of each model; collective over `world`."""
    bench = BenchmarkRun("fsdp", world, options)
    targets: list[Target] = []
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
            with ours as strategies, theirs as peers:
                series = [*(Series(name, s.step) for name, s in strategies.items()), *peers]
                times = bench.measure("FSDP step", shape.nbytes, series)
                held = {name: s.held() for name, s in strategies.items() if s.held is not None}
            bench.add("FSDP step", shape.nbytes, times, _values(shape, times, held))
            targets += _targets(shape, times, world.num_nodes)
            amounts = ", ".join(f"{name} {format_bytes(use.total)}" for name, use in held.items())
            bench.notes.append(f"{shape.parameters / 1e6:.2f} million, rank 0 holds: {amounts}")
    return bench.report(legend=_LEGEND, comparisons=COMPARISONS, targets=targets)


def _values(
    shape: Shape, times: Mapping[str, Times], held: Mapping[str, MemoryUse]
) -> dict[str, dict[str, float]]:
    """Return what the rows of the series say beside their times."""
    values = {name: shape.values() for name in times}
    for name, use in held.items():
        values[name]["held"] = float(use.total)
    for name in times:
        added = _added(times, name)
        if added is not None:
            values[name]["added"] = added
    return values


def _added(times: Mapping[str, Times], name: str) -> float | None:
    """Return the seconds that communication adds; None where nothing was measured beside it."""
    alone = TORCH_ALONE if name == FSDP2 else ALONE
    if name not in times or name in (ALONE, TORCH_ALONE):
        return None
    return times[name].median - times[alone].median


def _targets(shape: Shape, times: Mapping[str, Times], nodes: int) -> list[Target]:
    """Return what FSDP is to reach beside DDP and torch."""
    bounds = {(FULL_SHARD, ZERO1): 1.05}
    if nodes > 1:
        bounds = {(HYBRID_SHARD, REPLICATED): 1.1, (FULL_SHARD, REPLICATED): 1.5}
    targets = [
        Target(
            what=f"{millions} million, {name} over {reference}",
            value=times[name].median / times[reference].median,
            bound=bound,
            most=True,
            detail=f"{times[name].median * 1e3:.1f} ms, {times[reference].median * 1e3:.1f} ms",
        )
        for millions in [f"{shape.parameters / 1e6:.2f}"]
        for (name, reference), bound in bounds.items()
        if name in times
    ]
    added, peer = _added(times, FULL_SHARD), _added(times, FSDP2)
    if added is not None and peer is not None:
        targets.append(
            Target(
                what=f"{shape.parameters / 1e6:.2f} million, added over FSDP2's",
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
) -> Iterator[dict[str, _Trained]]:
    """Give the strategies of mpidist, each of which has made a step."""
    rng = np.random.default_rng(world.rank)
    x, dy = rng.standard_normal((2, batch, shape.width), np.float32)
    several = world.num_nodes > 1
    names = [*([HYBRID_SHARD] if several else []), FULL_SHARD, ZERO1, ZERO2, REPLICATED, ALONE]
    with ExitStack() as stack:
        strategies = {}
        for name in names:
            model, training, held = _training(name, make_model(shape), world, units, stack)
            strategies[name] = _Trained(partial(make_step, model, training, x, dy), held)
            strategies[name].step()
        yield strategies


def _training(
    name: str, model: nn.Module, world: ProcessGroup, units: int, stack: ExitStack
) -> tuple[nn.Module | FSDP, Any, Callable[[], MemoryUse] | None]:
    """Return what runs forward, and has ``zero_grad``, ``backward`` and ``step``, by a strategy."""
    factory = partial(AdamW, lr=_RATE)
    if name == ALONE:
        return model, Alone(model, world), None
    if name == REPLICATED:
        ddp, optimizer = stack.enter_context(DDP(model, world)), factory(model.named_parameters())
        return model, _Replicated(ddp, optimizer), partial(memory_use, model, optimizer)
    runs: nn.Module | FSDP = model
    if name == ZERO1:
        ddp = stack.enter_context(DDP(model, world))
        sharded = ShardedOptimizer(ddp, world, optimizer=factory)
    elif name == ZERO2:
        sharded = ShardedOptimizer(model, world, optimizer=factory)
    else:
        strategy = ShardingStrategy[name]
        runs = fsdp = stack.enter_context(FSDP(model, world, strategy=strategy, units=units))
        sharded = ShardedOptimizer(fsdp, optimizer=factory)
    return runs, stack.enter_context(sharded), sharded.memory_use


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
        for parameter, _, shard in self._shares:
            parameter.zero_grad()
            shard.zero_grad()

    def backward(self, ctx: nn.Context, dy: Array) -> None:
        """Compute all gradients."""
        self._model.backward(ctx, dy)

    def step(self) -> None:
        """Update this rank's share of each parameter."""
        for parameter, own, shard in self._shares:
            assert parameter.grad is not None, "backward has been run"
            part = parameter.grad.reshape(-1)[own]
            shard.attach(part)
            shard.add_grad(part)
        self._optimizer.step()


def share(size: int, group: ProcessGroup) -> slice:
    """Return this rank's part of so many elements."""
    start, count = split_evenly(size, group.size)[group.rank]
    return slice(start, start + count)


def make_step(model: nn.Module | FSDP, training: Any, x: Array, dy: Array) -> None:
    """Train on one batch."""
    training.zero_grad()
    _, ctx = model.forward(x, nn.Mode(training=True))
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a rank has one core
    try:
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
    finally:
        torch.set_num_threads(threads)


def _torch_step(model: Any, optimizer: Any, shares: list[tuple[Any, ...]], x: Any, dy: Any) -> None:
    model.zero_grad()
    model(x).backward(dy)
    for parameter, own, shard in shares:
        shard.grad = parameter.grad.view(-1)[own]
    optimizer.step()
