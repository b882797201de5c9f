"""A training step with FSDP, beside DDP and sharded optimizers on the same ranks.

A step is forward, backward and the update by AdamW, of the model of ``bench ddp``; over several
nodes FSDP shards within each and replicates over them (HYBRID_SHARD). Sizes are the bytes of all
parameters. The row of each series has the values `parameters`, `layers`, `width`, and `held`, the
bytes of parameters, gradients, buffers and optimizer state that rank 0 holds, at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from mpidist import env, nn
from mpidist._formatting import format_bytes
from mpidist._types import Array
from mpidist.bench.ddp import Shape, make_model
from mpidist.bench.harness import BenchmarkRun, add_effort, add_number, positive
from mpidist.bench.report import Comparison, Report
from mpidist.bench.times import Series
from mpidist.group import ProcessGroup
from mpidist.mesh import DeviceMesh
from mpidist.optim import AdamW, Optimizer
from mpidist.parallel import DDP, FSDP, MemoryUse, ShardedOptimizer, memory_use

FULL_SHARD, ZERO1, ZERO2, REPLICATED = "FSDP", "DDP+sharded", "sharded", "DDP"
_FACTORY = partial(AdamW, lr=1e-4)

COMPARISONS = (
    Comparison("FSDP/DDP+sharded", FULL_SHARD, ZERO1),
    Comparison("FSDP/DDP", FULL_SHARD, REPLICATED),
)

_LEGEND = {
    FULL_SHARD: "FSDP(model, DeviceMesh.by_node(world), units=...) and a ShardedOptimizer of it",
    ZERO1: "DDP(model, world) and ShardedOptimizer(ddp, world): only the state is sharded",
    ZERO2: "ShardedOptimizer(model, world): gradients, too; buckets instead of units",
    REPLICATED: "DDP(model, world) and AdamW: every rank has all",
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
    add_effort(parser, seconds=10.0)


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the step of each model; collective over `world`."""
    bench = BenchmarkRun("fsdp", world, options)
    bench.notes.append(f"{options.batch} samples on each rank in each step")
    if env.omp_num_threads() != "1":
        bench.notes.append("set OMP_NUM_THREADS=1: numpy's threads take the cores of other ranks")
    for millions in options.millions:
        shape = Shape.of(millions * 1e6)
        units = int(options.units * (1 << 20))
        with _series(world, shape, options.batch, units) as (series, held):
            times = bench.measure("FSDP step", shape.nbytes, series)
            use = {name: bytes_held() for name, bytes_held in held.items()}
        values = {
            name: shape.values() | {"held": float(memory.total)} for name, memory in use.items()
        }
        bench.add("FSDP step", shape.nbytes, times, values)
        bench.notes.append(_verdict(shape, use))
    return bench.report(legend=_LEGEND, comparisons=COMPARISONS)


def _verdict(shape: Shape, held: Mapping[str, MemoryUse]) -> str:
    """Say in a sentence what rank 0 holds."""
    amounts = ", ".join(f"{name} {format_bytes(use.total)}" for name, use in held.items())
    return f"{shape.parameters / 1e6:.2f} million parameters, rank 0 holds: {amounts}"


@contextmanager
def _series(
    world: ProcessGroup, shape: Shape, batch: int, units: int
) -> Iterator[tuple[list[Series], dict[str, Callable[[], MemoryUse]]]]:
    """Give the steps, and what counts the memory of each."""
    rng = np.random.default_rng(world.rank)
    x, dy = rng.standard_normal((2, batch, shape.width), np.float32)
    models = [make_model(shape) for _ in range(4)]
    fsdp = FSDP(models[0], DeviceMesh.by_node(world), units=units)
    zero1, replicated = DDP(models[1], world), DDP(models[3], world)
    optimizers: dict[str, Any] = {
        FULL_SHARD: ShardedOptimizer(fsdp, optimizer=_FACTORY),
        ZERO1: ShardedOptimizer(zero1, world, optimizer=_FACTORY),
        ZERO2: ShardedOptimizer(models[2], world, optimizer=_FACTORY),
        REPLICATED: _FACTORY(list(models[3].named_parameters())),
    }
    held = {name: o.memory_use for name, o in optimizers.items() if name != REPLICATED}
    held[REPLICATED] = partial(memory_use, models[3], optimizers[REPLICATED])
    backward = {name: o.backward for name, o in optimizers.items() if name != REPLICATED}
    backward[REPLICATED] = replicated.backward
    steps = [
        Series(name, partial(_step, model, optimizers[name], backward[name], x, dy))
        for name, model in zip(_LEGEND, models, strict=True)
    ]
    for series in steps:
        series.call()
    yield steps, held
    for closing in (*(optimizers[name] for name in (FULL_SHARD, ZERO1, ZERO2)), fsdp, zero1):
        closing.close()
    replicated.close()


def _step(
    model: nn.Module,
    optimizer: Optimizer | ShardedOptimizer,
    backward: Callable[[nn.Context, Array], object],
    x: Array,
    dy: Array,
) -> None:
    optimizer.zero_grad()
    _, ctx = model.forward(x, nn.Mode(training=True))
    backward(ctx, dy)
    optimizer.step()
