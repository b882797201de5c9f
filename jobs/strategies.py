"""What `train.py` makes of --strategy, --mesh, --schedule, --units, --optimizer, --compression."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from task import Task

from mpidist import SUM, DeviceMesh
from mpidist.group import ProcessGroup
from mpidist.nn import Module, Parameter, Sequential
from mpidist.optim import SGD, Adam, AdamW, Optimizer, WarmupCosine
from mpidist.parallel import (
    DDP,
    FSDP,
    UNIT_BYTES,
    Compression,
    MemoryLedger,
    Pipeline,
    ShardedOptimizer,
    ShardingStrategy,
    memory_ledger,
    memory_use,
)
from mpidist.train import CountedCrossEntropy, Plan

__all__ = ["make_optimizer", "make_strategy", "measure_memory"]


def make_strategy(
    options: argparse.Namespace, task: Task, world: ProcessGroup
) -> tuple[DDP | FSDP | Pipeline, ProcessGroup]:
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
    model : DDP, FSDP or Pipeline
        Sums the gradients.
    data : ProcessGroup
        The ranks that share each batch.

    Raises
    ------
    InvalidWorldSizeError
        On all ranks, if their number, or that of a node, does not fit the mesh.
    UnsupportedOperationError
        On all ranks, if the strategy does not work where they or the parameters are.
    ValueError
        On all ranks, if the schedule does not fit the numbers of ranks and micro-batches, or there
        are fewer layers than stages.

    Notes
    -----
    Collective over `world`; blocks.
    """
    ranks: ProcessGroup | DeviceMesh = world
    if options.mesh is not None and "pp" in options.mesh:
        return _make_pipeline(options, task, DeviceMesh(world, **options.mesh))
    if options.mesh is not None:
        # FSDP goes by the order of the dimensions, a user by their names.
        ranks = DeviceMesh(world, **options.mesh)["replicate", "shard"]
    return _replicated(options, task.model, ranks), world


def _make_pipeline(
    options: argparse.Namespace, task: Task, mesh: DeviceMesh
) -> tuple[Pipeline, ProcessGroup]:
    """Cut the model along one dimension of a mesh, and replicate its stages along the other."""
    assert isinstance(task.model, Sequential), "both tasks have one"
    pipe, data = mesh["pp"].group, mesh["dp"].group
    model = Pipeline(
        task.model,
        pipe,
        micro_batches=options.micro_batches or 2 * pipe.size,
        schedule=options.schedule or "1f1b",
        loss=CountedCrossEntropy(),
        data_parallel=lambda stage: _replicated(options, stage, data),
    )
    return model, data


def _replicated(
    options: argparse.Namespace, module: Module, ranks: ProcessGroup | DeviceMesh
) -> DDP | FSDP:
    """Make what sums the gradients of a model, or a stage, over these ranks."""
    if isinstance(ranks, ProcessGroup) and options.strategy in ("ddp", "zero"):
        return DDP(module, ranks, op=SUM, compression=_compression(options.compression))
    units = UNIT_BYTES if options.units is None else options.units
    return FSDP(module, ranks, op=SUM, strategy=ShardingStrategy(options.strategy), units=units)


def make_optimizer(
    options: argparse.Namespace,
    task: Task,
    plan: Plan,
    model: DDP | FSDP | Pipeline,
    data: ProcessGroup,
) -> Optimizer | ShardedOptimizer:
    """Make the optimizer, sharded or not, with a warm-up over a tenth of the steps.

    Parameters
    ----------
    options, task, plan : Namespace, Task, Plan
        Of the command line; what to train, and how long.
    model, data : DDP, FSDP or Pipeline, ProcessGroup
        From `make_strategy`.

    Returns
    -------
    Optimizer or ShardedOptimizer
        Of the model's parameters, or of this rank's slices.

    Notes
    -----
    Collective over `data`, unless the strategy is ddp.
    """
    build = _choose_optimizer(options, task, plan)
    if options.strategy == "ddp":
        return build(list(model.named_parameters()))
    if isinstance(model, Pipeline):
        (stage,) = model.replicas.values()  # others are refused with the options
        assert isinstance(stage, (DDP, FSDP)), "made above"
        return ShardedOptimizer(stage, data, optimizer=build)
    return ShardedOptimizer(model, data, optimizer=build)


def measure_memory(
    model: DDP | FSDP | Pipeline, optimizer: Optimizer | ShardedOptimizer, world: ProcessGroup
) -> MemoryLedger:
    """Say what each rank holds for the training.

    Parameters
    ----------
    model : DDP, FSDP or Pipeline
        From `make_strategy`.
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
    return memory_ledger(memory_use(model, optimizer), world)


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
