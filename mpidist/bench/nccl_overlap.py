"""How much of DDP's reduction of gradients on a device is hidden behind backward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from mpidist._types import MEAN, Array
from mpidist.arrays.namespaces import to_device, to_host
from mpidist.bench.ddp import Shape, make_model, step
from mpidist.bench.nccl_device import DeviceClock
from mpidist.bench.report import Row
from mpidist.bench.times import Effort, Series, Times, measure
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup
from mpidist.nn import Module
from mpidist.parallel import DDP, GradientReducer

__all__ = ["ALONE", "OVERLAPPED", "REDUCTION", "overlap_rows", "overlap_words"]

OVERLAPPED, ALONE, REDUCTION = "DDP", "alone", "reduction"


def overlap_rows(world: ProcessGroup, shape: Shape, batch: int, *, effort: Effort) -> list[Row]:
    """Measure a step with its reduction, without it, and the reduction alone; collective, blocks.

    The row of DDP has the value `overlap`: 1 if the reduction costs nothing, 0 if it costs as much
    as it does alone, below 0 if it costs more.
    """
    alone, wrapped = make_model(shape), make_model(shape)
    for model in (alone, wrapped):
        model.to("gpu")
    rng = np.random.default_rng(world.rank)
    x, dy = map(to_device, rng.standard_normal((2, batch, shape.width), np.float32))
    like = {name: parameter.data for name, parameter in alone.named_parameters()}
    with DDP(wrapped, world) as ddp, GradientReducer(like, world) as reducer:
        for grad in reducer.grads.values():
            grad.fill(0)
        calls = {
            OVERLAPPED: partial(step, [*wrapped.parameters()], ddp.forward, ddp.backward, x, dy),
            ALONE: partial(step, [*alone.parameters()], alone.forward, alone.backward, x, dy),
            REDUCTION: partial(_reduce, reducer),
        }
        for call in calls.values():
            call()
        mean = all_reduce(_gradient(alone), world, op=MEAN)
        # Of the largest element: small ones are what is left of sums of large ones.
        if np.abs(_gradient(wrapped) - mean).max() > 1e-3 * np.abs(mean).max():
            raise RuntimeError("bench nccl: DDP's gradient is not the mean of the ranks' gradients")
        clock = DeviceClock()
        series = [Series(name, call, clock=clock) for name, call in calls.items()]
        return _rows(shape, measure(series, world, effort=effort))


def overlap_words(row: Row) -> str:
    """Say in a sentence what share of the reduction is hidden."""
    return (
        f"{row.values['parameters'] / 1e6:.2f} million parameters: "
        f"{row.values['overlap']:.0%} of the reduction's time is hidden behind backward"
    )


def _rows(shape: Shape, times: Mapping[str, Times]) -> list[Row]:
    added = times[OVERLAPPED].median - times[ALONE].median
    overlap = {"overlap": 1 - added / times[REDUCTION].median}
    values = {"parameters": float(shape.parameters), "layers": float(shape.layers)}
    return [
        Row(
            operation="DDP step",
            series=name,
            nbytes=shape.nbytes,
            times=each,
            values=values | overlap if name == OVERLAPPED else values,
        )
        for name, each in times.items()
    ]


def _reduce(reducer: GradientReducer) -> None:
    """Reduce what a step reduces, in the order of backward."""
    for name in reversed(reducer.grads):
        reducer.ready(name)
    reducer.wait()


def _gradient(model: Module) -> Array:
    """Return the first gradient, on the host."""
    gradient = next(iter(model.parameters())).grad
    assert gradient is not None, "a step has been made"
    return to_host(gradient)
