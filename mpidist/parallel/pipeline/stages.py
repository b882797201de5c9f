"""Stages: where a model is cut, and what each part holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from mpidist.arrays.namespaces import is_device
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.nn.containers import Sequential
from mpidist.nn.normalization import BatchNorm2d
from mpidist.nn.skips import SkipLayer, connections
from mpidist.nn.surround import PASSES
from mpidist.parallel.pipeline.timeline import Costs

__all__ = ["Cuts", "StageLink", "balanced", "check_model", "links_of", "starts_of", "warn_of_norms"]

Cuts: TypeAlias = Sequence[int] | Literal["layers", "parameters"] | Costs
"""Where a model is cut into stages; see `Pipeline`."""


class StageLink(NamedTuple):
    """What one stage gives another: forward an array, backward the gradient by it.

    Attributes
    ----------
    stages : tuple of int
        That which computes the array, and a later one, which takes it.
    name : str
        Of the connection that it is stashed for; empty for the input of the next stage.
    """

    stages: tuple[int, int]
    name: str


def check_model(model: Sequential, operation: str) -> None:
    """Raise unless a model is a chain of layers on the host."""
    if not isinstance(model, Sequential):
        raise TypeError(
            f"{operation}: expected a Sequential, whose layers are cut into stages, got a "
            f"{type(model).__name__}"
        )
    own = [name for name in PASSES if getattr(type(model), name) is not getattr(Sequential, name)]
    if own:
        raise TypeError(
            f"{operation}: {type(model).__name__} has a {own[0]} of its own, which the stages "
            "would not run; give a plain Sequential of its layers"
        )
    connections(model.layers)  # they may be others than when the model was built
    for name, module in model.named_modules():
        for child, layer in module.named_children():
            if isinstance(layer, SkipLayer) and not isinstance(module, Sequential):
                raise TypeError(
                    f"{operation}: {layer}, '{name}.{child}', is in a {type(module).__name__}, "
                    "which does not know what is stashed; make it a layer of a Sequential"
                )
    for name, parameter in model.named_parameters():
        if parameter.is_attached:
            raise UnsupportedOperationError(
                f"{operation}: parameter '{name}' is one of a DDP, an FSDP or a sharded optimizer "
                "already, which would not reduce what stages do; give a model of its own, and "
                "data_parallel=, which makes one of each stage"
            )
        if is_device(parameter.data):
            raise UnsupportedOperationError(
                f"{operation}: parameter '{name}' is on a device, and pipelines carry host arrays "
                "only; model.to('cpu') first"
            )


def warn_of_norms(model: Sequential, micro_batches: int, group: ProcessGroup) -> None:
    """Let one rank say that batch normalisation has the statistics of one micro-batch."""
    norms = [
        f"'{name}'" for name, module in model.named_modules() if isinstance(module, BatchNorm2d)
    ]
    if norms and micro_batches > 1 and group.rank == 0:
        group.log.warning(
            "Pipeline on %s: in training, batch normalisation (%s) has the statistics of one "
            "micro-batch, about 1/%d of the batch, as in one process that runs micro-batches; "
            "fewer micro-batches, or LayerNorm, change that",
            group,
            ", ".join(norms),
            micro_batches,
        )


def starts_of(model: Sequential, cut: Cuts, stages: int) -> tuple[int, ...]:
    """Return the first layer of each stage.

    Parameters
    ----------
    model : Sequential
        What is cut.
    cut : sequence of int, "layers", "parameters" or Costs
        The first layers of all stages but the first, or what is to be equal: the numbers of
        layers or of parameters' elements, or these costs of the layers.
    stages : int
        How many are wanted.

    Raises
    ------
    ValueError
        If there are fewer layers than stages, or `cut` is not ascending, leaves a stage without
        layers, or is of another number of stages.
    """
    layers = len(model.layers)
    if layers < stages:
        raise ValueError(
            f"Pipeline: expected at least as many layers as the {stages} stages, got {layers}; "
            f"take at most {layers} stages, or cut layers into smaller ones"
        )
    if isinstance(cut, Costs):
        costs = [sum(passes) for passes in zip(*cut.passes, strict=True)]
        if len(costs) != layers:
            raise ValueError(
                f"Pipeline: expected as cut costs of the {layers} layers, as Pipeline.costs "
                f"measures them, got costs of {len(costs)}"
            )
        return balanced(costs, stages)
    if not isinstance(cut, str):
        starts = (0, *map(int, cut))
        if len(starts) != stages or any(a >= b for a, b in pairwise((*starts, layers))):
            raise ValueError(
                f"Pipeline: expected as cut {stages - 1} ascending numbers of layers from 1 to "
                f"{layers - 1}, the first layers of all of the {stages} stages but the first, got "
                f"{list(cut)}"
            )
        return starts
    if cut == "layers":
        return tuple(stage * layers // stages for stage in range(stages))
    if cut == "parameters":
        # A layer counts as one element more, so that those without parameters are spread, too.
        return balanced([1 + sum(p.size for p in m.parameters()) for m in model.layers], stages)
    raise ValueError(
        f"Pipeline: expected as cut 'layers', 'parameters', numbers of layers or costs, got {cut!r}"
    )


def balanced(weights: Sequence[float], stages: int) -> tuple[int, ...]:
    """Return where stages begin whose greatest weight is as small as possible.

    The classical recurrence: the best cut of the first n layers into k stages is the best one,
    over the last stage's beginning, of what is before it into k - 1.
    """
    ends = np.concatenate([[0], np.cumsum(weights)])
    best = ends.astype(float)
    begins: list[list[int]] = []
    for stage in range(1, stages):
        new, begin = np.full(len(ends), np.inf), [0] * len(ends)
        for n in range(stage + 1, len(ends)):
            greatest = np.maximum(best[stage:n], ends[n] - ends[stage:n])
            begin[n] = stage + int(np.argmin(greatest))
            new[n] = greatest[begin[n] - stage]
        best = new
        begins.append(begin)
    starts = [len(weights)]
    for begin in reversed(begins):
        starts.append(begin[starts[-1]])
    return (0, *reversed(starts[1:]))


def links_of(model: Sequential, starts: Sequence[int]) -> tuple[StageLink, ...]:
    """Return what stages that begin with these layers give each other.

    What is stashed goes straight to the stage that pops it.
    """
    last = len(starts) - 1
    links = [StageLink((stage, stage + 1), "") for stage in range(last)]
    for name, (stash, pop) in sorted(connections(model.layers).items()):
        first, then = (bisect_right(starts, layer) - 1 for layer in (stash, pop))
        if first != then:
            links.append(StageLink((first, then), name))
    return tuple(links)
