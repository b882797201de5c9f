"""The training runs that several tests compare: cases, one process, and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mpidist._types import MEAN, SUM, Array, ReduceOp
from mpidist.arrays.namespaces import like_device, to_host
from mpidist.group import ProcessGroup
from mpidist.nn import (
    GELU,
    Context,
    Dropout,
    LayerNorm,
    Linear,
    Mode,
    Module,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    count_uses,
    cross_entropy,
)
from mpidist.optim import SGD, AdamW
from mpidist.parallel import DDP, BucketSizes, NaiveDataParallel

STEPS = 10
FEATURES = 6
CLASSES = 4
SMALL = BucketSizes(first=100, rest=300)
"""So that small models have several buckets."""


class Routed(Module):
    """Adds `branch(x)` to the samples whose first feature is above a threshold, if any are."""

    def __init__(self, branch: Module, threshold: float) -> None:
        self.branch = branch
        self.threshold = threshold

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        rows = x[:, 0] > self.threshold
        if not rows.any():
            return x, Context((rows, None))
        y, ctx = self.branch.forward(x[rows], mode)
        out = x.copy()
        out[rows] += y
        return out, Context((rows, ctx), count_uses(ctx))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        rows, inner = ctx.saved
        if inner is None:
            return dy, None
        dx = dy.copy()
        part, wctx = self.branch.backward_input(inner, dy[rows])
        dx[rows] += part
        return dx, wctx

    def backward_weight(self, wctx: Any) -> None:
        if wctx is not None:
            self.branch.backward_weight(wctx)


def linear(d_in: int, d_out: int, rng: np.random.Generator) -> Linear:
    return Linear(d_in, d_out, rng=rng, dtype=np.float64)


def plain(rng: np.random.Generator) -> Module:
    return Sequential(
        linear(FEATURES, 9, rng), ReLU(), linear(9, FEATURES, rng), linear(FEATURES, CLASSES, rng)
    )


def branched(rng: np.random.Generator) -> Module:
    # Of the first branch some ranks, and in some steps all, have no sample; of the second all.
    return Sequential(
        Routed(linear(FEATURES, FEATURES, rng), 1.2),
        Routed(linear(FEATURES, FEATURES, rng), np.inf),
        linear(FEATURES, CLASSES, rng),
    )


def tied(rng: np.random.Generator) -> Module:
    first, second = linear(FEATURES, FEATURES, rng), linear(FEATURES, FEATURES, rng)
    second.weight = first.weight
    return Sequential(first, GELU(), second, linear(FEATURES, CLASSES, rng))


def recomputed(rng: np.random.Generator) -> Module:
    block = Sequential(
        LayerNorm(FEATURES, dtype=np.float64),
        linear(FEATURES, 12, rng),
        GELU(),
        Dropout(0.4),
        linear(12, FEATURES, rng),
    )
    return Sequential(Residual(Recompute(block)), Dropout(0.2), linear(FEATURES, CLASSES, rng))


def everything(rng: np.random.Generator) -> Module:
    first, second = linear(FEATURES, FEATURES, rng), linear(FEATURES, FEATURES, rng)
    second.weight = first.weight
    return Sequential(
        first,
        Routed(Sequential(linear(FEATURES, 5, rng), GELU(), linear(5, FEATURES, rng)), 0.8),
        Recompute(Sequential(second, GELU(), Dropout(0.3))),
        linear(FEATURES, CLASSES, rng),
    )


def even(rank: int, size: int, samples: int) -> tuple[int, int]:
    return rank * samples // size, (rank + 1) * samples // size


def uneven(rank: int, size: int, samples: int) -> tuple[int, int]:
    """Give the first rank nothing (if there are others), the last one the most."""
    if size == 1:
        return 0, samples
    start, end = (samples * max(r, 0) ** 2 // (size - 1) ** 2 for r in (rank - 1, rank))
    return start, end


@dataclass(frozen=True)
class Case:
    """A model, and how its batches are cut."""

    build: Callable[[np.random.Generator], Module]
    share: Callable[[int, int, int], tuple[int, int]] = even
    op: ReduceOp = MEAN
    micro_batches: int = 1


CASES = {
    "plain": Case(plain),
    "accumulation": Case(plain, micro_batches=3),
    "unused branch": Case(branched),
    "tied weights": Case(tied),
    "uneven shares": Case(plain, share=uneven, op=SUM),
    "recompute and dropout": Case(recomputed),
    "everything": Case(everything, share=uneven, op=SUM, micro_batches=2),
}

OPTIMIZERS: dict[str, Callable[[Module], Any]] = {
    "sgd": lambda m: SGD(m.named_parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda m: AdamW(m.named_parameters(), lr=0.02, weight_decay=0.1),
}


def batches() -> Iterator[tuple[int, Array, Array]]:
    """Yield (step, x, target) of the joined batch; 12 samples can be cut by 1, 2, 3 and 4."""
    rng = np.random.default_rng(11)
    for step in range(STEPS):
        yield step, rng.normal(size=(12, FEATURES)), rng.integers(0, CLASSES, 12)


def train_alone(case: Case, optimizer: str) -> dict[str, Array]:
    """Train on the joined batches in one process; the truth that all else is compared with."""
    model = case.build(np.random.default_rng(0))
    opt = OPTIMIZERS[optimizer](model)
    for step, x, target in batches():
        y, ctx = model.forward(x, Mode(True, seed=5, step=step))
        _, dy = cross_entropy(y, target)
        opt.zero_grad()
        model.backward(ctx, dy)
        opt.step()
    return {name: array.copy() for name, array in model.state_dict().items()}


@dataclass(frozen=True)
class Trained:
    """What training left on one rank."""

    state: dict[str, Array]
    digests: list[str]  # of parameters and gradients after each step


def train_rank(
    group: ProcessGroup, case: Case, optimizer: str, *, device: str = "cpu", **options: Any
) -> Trained:
    """Train on this rank's shares by DDP, from parameters that differ at first."""
    model = case.build(np.random.default_rng(group.rank))
    model.to(device)
    here = next(model.parameters()).data
    digests = []
    with DDP(model, group, op=case.op, sizes=SMALL, **options) as ddp:
        opt = OPTIMIZERS[optimizer](model)
        for step, x, target in batches():
            start, end = case.share(group.rank, group.size, len(x))
            denominator = len(x) if case.op is SUM else end - start
            opt.zero_grad()
            cuts = np.linspace(start, end, case.micro_batches + 1).astype(int)
            for i, (a, b) in enumerate(pairwise(cuts)):
                last = i == case.micro_batches - 1
                with nullcontext() if last else ddp.no_sync():
                    mode = Mode(True, seed=5, step=step, sample_offset=int(a))
                    y, ctx = ddp.forward(like_device(here, x[a:b]), mode)
                    _, dy = cross_entropy(
                        y, like_device(here, target[a:b]), denominator=denominator
                    )
                    ddp.backward(ctx, dy)
            digests.append(digest(model))
            opt.step()
            digests.append(digest(model))
    return Trained({name: to_host(a).copy() for name, a in model.state_dict().items()}, digests)


def train_naively(group: ProcessGroup, case: Case, optimizer: str) -> Trained:
    """Train as `train_rank`, by the oracle."""
    model = case.build(np.random.default_rng(group.rank))
    ddp = NaiveDataParallel(model, group, op=case.op)
    opt = OPTIMIZERS[optimizer](model)
    for step, x, target in batches():
        start, end = case.share(group.rank, group.size, len(x))
        opt.zero_grad()
        y, ctx = ddp.forward(x[start:end], Mode(True, seed=5, step=step, sample_offset=start))
        _, dy = cross_entropy(
            y, target[start:end], denominator=len(x) if case.op is SUM else end - start
        )
        ddp.backward(ctx, dy)
        opt.step()
    return Trained({name: a.copy() for name, a in model.state_dict().items()}, [])


def digest(model: Module) -> str:
    """Hash every bit of parameters, buffers and gradients."""
    total = hashlib.sha256()
    for name, array in model.state_dict().items():
        total.update(name.encode() + to_host(array).tobytes())
    for name, p in model.named_parameters():
        total.update(name.encode() + (b"none" if p.grad is None else to_host(p.grad).tobytes()))
    return total.hexdigest()


def assert_close(got: dict[str, Array], expected: dict[str, Array], *, rtol: float = 1e-12) -> None:
    """Compare each array by its largest error, relative to its largest element."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        scale = np.abs(array).max()
        assert np.abs(got[name] - array).max() <= rtol * scale, name
