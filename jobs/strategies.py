"""What `train.py` makes of --strategy, --mesh, --units, --optimizer and --compression."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from task import Task

from mpidist import SUM, DeviceMesh
from mpidist.group import ProcessGroup
from mpidist.nn import Parameter
from mpidist.optim import SGD, Adam, AdamW, Optimizer, WarmupCosine
from mpidist.parallel import (
    DDP,
    FSDP,
    UNIT_BYTES,
    Compression,
    MemoryLedger,
    ShardedOptimizer,
    ShardingStrategy,
    memory_ledger,
    memory_use,
)
from mpidist.train import Plan

__all__ = ["make_optimizer", "make_strategy", "measure_memory"]


def make_strategy(options: argparse.Namespace, task: Task, world: ProcessGroup) -> DDP | FSDP:
    """Put the model on all ranks.

    Parameters
    ----------
    options : Namespace
        Of the command line.
    task : Task
        Has the model, which the strategy takes over.
    world : ProcessGroup
        The ranks.

    Returns
    -------
    DDP or FSDP
        Sums the gradients.

    Raises
    ------
    InvalidWorldSizeError
        On all ranks, if their number, or that of a node, does not fit the mesh.
    UnsupportedOperationError
        On all ranks, if the strategy does not work where they or the parameters are.

    Notes
    -----
    Collective over `world`; blocks.
    """
    if options.strategy in ("ddp", "zero"):
        return DDP(task.model, world, op=SUM, compression=_compression(options.compression))
    ranks: ProcessGroup | DeviceMesh = world
    if options.mesh is not None:
        # FSDP goes by the order of the dimensions, a user by their names.
        ranks = DeviceMesh(world, **options.mesh)["replicate", "shard"]
    units = UNIT_BYTES if options.units is None else options.units
    strategy = ShardingStrategy(options.strategy)
    return FSDP(task.model, ranks, op=SUM, strategy=strategy, units=units)


def make_optimizer(
    options: argparse.Namespace, task: Task, plan: Plan, model: DDP | FSDP, world: ProcessGroup
) -> Optimizer | ShardedOptimizer:
    """Make the optimizer, sharded or not, with a warm-up over a tenth of the steps.

    Parameters
    ----------
    options, task, plan : Namespace, Task, Plan
        Of the command line; what to train, and how long.
    model : DDP or FSDP
        From `make_strategy`.
    world : ProcessGroup
        The ranks.

    Returns
    -------
    Optimizer or ShardedOptimizer
        Of the model's parameters, or of this rank's slices.

    Notes
    -----
    Collective over `world`, unless the strategy is ddp.
    """
    build = _choose_optimizer(options, task, plan)
    if options.strategy == "ddp":
        return build(list(task.model.named_parameters()))
    return ShardedOptimizer(model, world, optimizer=build)


def measure_memory(
    task: Task, optimizer: Optimizer | ShardedOptimizer, world: ProcessGroup
) -> MemoryLedger:
    """Say what each rank holds for the training.

    Parameters
    ----------
    task : Task
        Has the model.
    optimizer : Optimizer or ShardedOptimizer
        From `make_optimizer`.
    world : ProcessGroup
        The ranks.

    Returns
    -------
    MemoryLedger
        Of this rank and its node.

    Notes
    -----
    Collective over `world`; blocks.
    """
    if isinstance(optimizer, ShardedOptimizer):
        return memory_ledger(optimizer.memory_use(), world)
    return memory_ledger(memory_use(task.model, optimizer), world)


def _compression(name: str) -> Compression | None:
    """Choose how gradients travel."""
    return {"none": None, "fp16": Compression.FP16, "bf16": Compression.BF16}[name]


def _choose_optimizer(
    options: argparse.Namespace, task: Task, plan: Plan
) -> Callable[[list[tuple[str, Parameter]]], Optimizer]:
    """Choose how to make an optimizer."""
    peak = options.lr or task.defaults.lr * (10 if options.optimizer == "sgd" else 1)
    rate = WarmupCosine(peak, warmup_steps=plan.steps // 10, total_steps=plan.steps)
    if options.optimizer == "sgd":
        return partial(SGD, lr=rate, momentum=0.9, nesterov=True)
    return partial({"adam": Adam, "adamw": AdamW}[options.optimizer], lr=rate)
