"""What communication adds to a training step, beside torch's DDP over Gloo.

A step is forward, backward and the wait for the gradients of all ranks; no optimizer. The model
is a stack of `Linear` layers with `ReLU` between them, the batch a small one, so that the gradients
weigh much beside the computation. Sizes are the bytes of all gradients. The row of each series has
the values `parameters`, `layers` and `width`; that of DDP also `added`, the seconds over the step
alone, that of torch DDP too, and `ratio`, our added time over torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import numpy as np

from mpidist import env, nn
from mpidist._types import MEAN, Array
from mpidist.arrays.namespaces import to_device, to_host
from mpidist.bench.harness import BenchmarkRun, add_effort, add_number
from mpidist.bench.peers import Gloo, open_gloo
from mpidist.bench.report import Comparison, Measure, Report, Row
from mpidist.bench.times import Series, Times
from mpidist.collectives import all_reduce
from mpidist.group import ProcessGroup
from mpidist.parallel import DDP, GradientReducer
from mpidist.usage import positive

DDP_STEP, ALONE, REDUCTION = "DDP", "alone", "reduction"
_SUM = "one all_reduce"
_TORCH_DDP, _TORCH = "torch DDP", "torch alone"

COMPARISONS = (
    Comparison("added", DDP_STEP, ALONE, Measure.ADDED),
    Comparison("torch added", _TORCH_DDP, _TORCH, Measure.ADDED),
)

_LEGEND = {
    DDP_STEP: "a step with mpidist.parallel.DDP",
    ALONE: "the same step without communication, by all ranks at once; gradients written in place",
    _SUM: "mpidist.all_reduce of as many bytes of registered memory in one call, and nothing else",
    _TORCH_DDP: "the same model with torch's DistributedDataParallel over Gloo",
    _TORCH: "the same without it, by all ranks at once",
}

_WIDEST = 1024
"""Layers are at most so wide: wider ones would make a model of two or three gradients."""

_STEP = 32
"""Widths are multiples of this."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model: at least two square layers of `width` inputs, each with a bias."""

    width: int
    layers: int

    @classmethod
    def of(cls, parameters: float) -> Shape:
        """Return a shape of about so many parameters, with at least four layers."""
        width = min(max(round(isqrt(int(parameters / 4)) / _STEP), 1) * _STEP, _WIDEST)
        return cls(width, max(round(parameters / (width * (width + 1))), 4))

    @property
    def parameters(self) -> int:
        """Number of parameters, biases included."""
        return self.layers * self.width * (self.width + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients, in float32."""
        return 4 * self.parameters

    def values(self) -> dict[str, float]:
        """Return what rows say of the model: `parameters`, `layers` and `width`."""
        names = ("parameters", "layers", "width")
        return {name: float(getattr(self, name)) for name in names}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--millions",
        type=positive(float),
        nargs="+",
        default=[1.0, 10.0, 50.0],
        metavar="N",
        help="about how many million parameters the models have (default: 1 10 50)",
    )
    add_number(parser, "--batch", 16, "samples of each rank")
    parser.add_argument("--no-torch", action="store_true", help="leave out the peer torch")
    add_effort(parser, seconds=10.0)


def add_model(parser: argparse.ArgumentParser, *, millions: float, batch: int) -> None:
    """Add the options of a single model, ``--millions`` and ``--batch``."""
    text = "about how many million parameters the model of DDP's step has"
    add_number(parser, "--millions", millions, text)
    add_number(parser, "--batch", batch, "samples of each rank in DDP's step")


def run(world: ProcessGroup, options: argparse.Namespace) -> Report:
    """Measure the step of each model; collective over `world`."""
    bench = BenchmarkRun("ddp", world, options)
    bench.notes.append(f"{options.batch} samples on each rank in each step")
    if env.omp_num_threads() != "1":
        bench.notes.append("set OMP_NUM_THREADS=1: numpy's threads take the cores of other ranks")
    peer = nullcontext("torch was left out") if options.no_torch else open_gloo(world)
    with peer as gloo:
        bench.notes.append(gloo if isinstance(gloo, str) else f"torch {gloo.version}, 1 thread")
        for millions in options.millions:
            shape = Shape.of(millions * 1e6)
            ours = our_series(world, shape, options.batch)
            with ours as series, _theirs(gloo, shape, options) as theirs:
                times = bench.measure("DDP step", shape.nbytes, [*series, *theirs])
            bench.add("DDP step", shape.nbytes, times, _values(shape, times))
    bench.notes += [_verdict(row) for row in bench.rows if "added" in row.values]
    return bench.report(legend=_LEGEND, comparisons=COMPARISONS)


def _values(shape: Shape, times: Mapping[str, Times]) -> dict[str, dict[str, float]]:
    """Return what the rows of the series say beside their times."""
    values = {name: shape.values() for name in times}
    for comparison in COMPARISONS:
        if comparison.series in times:
            added = comparison.of(times[comparison.series], times[comparison.reference])
            values[comparison.series]["added"] = added
    if _TORCH_DDP in times:
        ratio = values[DDP_STEP]["added"] / values[_TORCH_DDP]["added"]
        values[DDP_STEP]["ratio"] = ratio
    return values


def _verdict(row: Row) -> str:
    """Say in a sentence what the series adds."""
    millions = row.values["parameters"] / 1e6
    sentence = (
        f"{millions:.2f} million parameters in {row.values['layers']:.0f} layers: {row.series} "
        f"adds {row.values['added'] * 1e3:.2f} ms"
    )
    ratio = row.values.get("ratio")
    return sentence if ratio is None else f"{sentence}, {ratio:.3f} of what torch DDP adds"


@contextmanager
def our_series(
    world: ProcessGroup, shape: Shape, batch: int, *, device: bool = False
) -> Iterator[list[Series]]:
    """Give the series of mpidist, DDP first, whose gradients have been compared once.

    The last one is the communication alone: on the host one all_reduce of as many bytes, on a
    device, where it is what DDP's step is compared with, the same buckets by a reducer.
    """
    rng = np.random.default_rng(world.rank)
    x, dy = rng.standard_normal((2, batch, shape.width), np.float32)
    alone, wrapped = make_model(shape), make_model(shape)
    if device:
        x, dy = map(to_device, (x, dy))
        for model in (alone, wrapped):
            model.to("gpu")
    with DDP(wrapped, world) as ddp, _communication(alone, world, device=device) as communicate:
        steps = {
            DDP_STEP: partial(step, [*wrapped.parameters()], ddp.forward, ddp.backward, x, dy),
            ALONE: partial(step, [*alone.parameters()], alone.forward, alone.backward, x, dy),
        }
        for call in steps.values():
            call()
        mean = all_reduce(_gradient(alone), world, op=MEAN)
        # Of the largest element: small ones are what is left of sums of large ones.
        if np.abs(_gradient(wrapped) - mean).max() > 1e-3 * np.abs(mean).max():
            raise RuntimeError("bench: DDP's gradient is not the mean of the ranks' gradients")
        communicate()
        yield [
            *(Series(name, call) for name, call in steps.items()),
            Series(REDUCTION if device else _SUM, communicate),
        ]


@contextmanager
def _communication(
    model: nn.Module, world: ProcessGroup, *, device: bool
) -> Iterator[Callable[[], object]]:
    """Give a call that moves as many bytes as the gradients of a model have."""
    if not device:
        buffer = world.empty(sum(parameter.size for parameter in model.parameters()))
        buffer.fill(0)
        yield partial(all_reduce, buffer, world, out=buffer)
        return
    like = {name: parameter.data for name, parameter in model.named_parameters()}
    with GradientReducer(like, world) as reducer:
        for grad in reducer.grads.values():
            grad.fill(0)

        def reduce() -> None:
            for name in reversed(reducer.grads):  # in the order of backward
                reducer.ready(name)
            reducer.wait()

        yield reduce


def make_model(shape: Shape) -> nn.Sequential:
    """Return the model of a shape, the same on all ranks."""
    layers: list[nn.Module] = []
    for seed in range(shape.layers):
        layers += [nn.Linear(shape.width, shape.width, rng=seed), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _gradient(model: nn.Module) -> Array:
    """Return the first gradient, on the host."""
    gradient = next(iter(model.parameters())).grad
    assert gradient is not None, "a step has been made"
    return to_host(gradient)


def step(
    parameters: Sequence[nn.Parameter],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    x: Array,
    dy: Array,
) -> None:
    """Make a step: no optimizer."""
    for parameter in parameters:
        parameter.zero_grad()
    _, ctx = forward(x, nn.Mode(training=True))
    backward(ctx, dy)


@contextmanager
def _theirs(
    gloo: Gloo | str, shape: Shape, options: argparse.Namespace
) -> Iterator[Sequence[Series]]:
    """Give the series of torch, if there is one."""
    if isinstance(gloo, str):
        yield []
        return
    torch = gloo.torch
    with gloo.one_thread():
        x, dy = torch.randn(2, options.batch, shape.width)
        wrapped = torch.nn.parallel.DistributedDataParallel(torch_model(torch, shape))
        yield [
            Series(_TORCH_DDP, partial(_torch_step, wrapped, x, dy)),
            Series(_TORCH, partial(_torch_step, torch_model(torch, shape), x, dy)),
        ]


def torch_model(torch: Any, shape: Shape) -> Any:
    """Return the model of a shape in torch."""
    layers: list[Any] = []
    for _ in range(shape.layers):
        layers += [torch.nn.Linear(shape.width, shape.width), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def _torch_step(model: Any, x: Any, dy: Any) -> None:
    model.zero_grad()
    model(x).backward(dy)
