"""Models whose units are long enough for sums in the order of the ranks, and how they train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mpidist import checkpoint
from mpidist._types import MEAN, SUM, Array, ReduceOp
from mpidist.group import ProcessGroup
from mpidist.nn import (
    GELU,
    Dropout,
    LayerNorm,
    Linear,
    Mode,
    Module,
    Recompute,
    Residual,
    Sequential,
    cross_entropy,
)
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    BucketSizes,
    NaiveFullShard,
    ShardedOptimizer,
    ShardingStrategy,
)
from tests.parallel.training import Routed, even, uneven

WIDTH = 104
CLASSES = 78
"""A layer of `WIDTH` x `CLASSES` is longer than 32 KiB in float32, and not yet a unit in float64:
small ones stay with it."""
ELEMENTS = 22_500
"""Of a layer of `WIDTH` x 2 `WIDTH`, which is a unit."""
UNIT = 8 * ELEMENTS
"""The same in bytes of float64."""
STEPS = 4
SHORT = 2
"""Ranks that add messages below 32 KiB to the same bits: of two, the order does not matter."""
FACTORY = partial(AdamW, lr=0.02, weight_decay=0.1)
STRATEGIES = list(ShardingStrategy)
OP = {even: MEAN, uneven: SUM}


def linear(d_in: int, d_out: int, rng: np.random.Generator, dtype: Any) -> Linear:
    return Linear(d_in, d_out, rng=rng, dtype=dtype)


def plain(rng: np.random.Generator, dtype: Any) -> Module:
    return Sequential(
        linear(WIDTH, 2 * WIDTH, rng, dtype),
        GELU(),
        linear(2 * WIDTH, WIDTH, rng, dtype),
        LayerNorm(WIDTH, dtype=dtype),
        linear(WIDTH, CLASSES, rng, dtype),
    )


def tied(rng: np.random.Generator, dtype: Any) -> Module:
    """A weight that two units hold, one that a unit and the outermost module hold."""
    first, second = linear(WIDTH, WIDTH, rng, dtype), linear(WIDTH, WIDTH, rng, dtype)
    second.weight = first.weight
    model = Sequential(
        first,
        GELU(),
        linear(WIDTH, 2 * WIDTH, rng, dtype),
        GELU(),
        linear(2 * WIDTH, WIDTH, rng, dtype),
        second,
        LayerNorm(WIDTH, dtype=dtype),
        LayerNorm(WIDTH, dtype=dtype),
        linear(WIDTH, CLASSES, rng, dtype),
    )
    model.layers[7].weight = model.layers[6].weight
    return model


def twice(rng: np.random.Generator, dtype: Any) -> Module:
    """One module in two places, so that its gradients come twice."""
    block = linear(WIDTH, WIDTH, rng, dtype)
    return Sequential(block, GELU(), block, linear(WIDTH, CLASSES, rng, dtype))


def branched(rng: np.random.Generator, dtype: Any) -> Module:
    """Of the first branch some ranks have no sample, of the second all."""
    return Sequential(
        Routed(linear(WIDTH, WIDTH, rng, dtype), 1.2),
        Routed(linear(WIDTH, WIDTH, rng, dtype), np.inf),
        linear(WIDTH, CLASSES + 1, rng, dtype),  # nothing stays with it
    )


def frozen(rng: np.random.Generator, dtype: Any) -> Module:
    """As with adapters: large layers that stay, and small ones beside them that are trained."""
    model = plain(rng, dtype)
    for name, parameter in model.named_parameters():
        parameter.trainable = name.startswith("4.") or name == "0.bias"
    return model


def recomputed(rng: np.random.Generator, dtype: Any) -> Module:
    block = Sequential(
        LayerNorm(WIDTH, dtype=dtype),
        linear(WIDTH, 2 * WIDTH, rng, dtype),
        GELU(),
        Dropout(0.3),
        linear(2 * WIDTH, WIDTH, rng, dtype),
    )
    return Sequential(
        Residual(Recompute(block)),
        Recompute(linear(WIDTH, WIDTH, rng, dtype)),
        Dropout(0.2),
        linear(WIDTH, CLASSES, rng, dtype),
    )


def awkward(rng: np.random.Generator, dtype: Any) -> Module:
    """Fewer rows than ranks, one row above their number, a dtype of its own, a vector."""
    return Sequential(
        linear(WIDTH, 3, rng, dtype),
        linear(3, 5, rng, dtype),
        linear(5, WIDTH, rng, dtype),
        LayerNorm(WIDTH, dtype=np.float64),
        linear(WIDTH, CLASSES, rng, dtype),
    )


@dataclass(frozen=True)
class Case:
    """A model, how its batches are cut, and what differs from the defaults."""

    build: Callable[[np.random.Generator, Any], Module] = plain
    share: Callable[[int, int, int], tuple[int, int]] = even
    micro_batches: int = 1
    accumulate: bool = False  # by reductions, not inside no_sync
    halves: bool = False
    exact: int = 4  # up to so many ranks it has the bits of DDP
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> ReduceOp:
        return OP[self.share]

    @property
    def factory(self) -> Callable[..., Any]:
        """AdamW, if it is to have the same bits.

        It divides a gradient by its size: a rounding where that is nearly zero, as sums in another
        order have it, would be one of a whole step.
        """
        return FACTORY if self.exact > SHORT else partial(SGD, lr=0.1, momentum=0.9)


CASES = {
    "plain": Case(),
    "tied": Case(tied, exact=SHORT),
    "one module twice": Case(twice),
    "unused": Case(branched),
    "frozen": Case(frozen, exact=SHORT),
    "recomputed": Case(recomputed),
    "uneven, one rank empty": Case(share=uneven),
    "no_sync": Case(micro_batches=3),
    "no_sync, tied, uneven": Case(tied, share=uneven, micro_batches=2, exact=SHORT),
    "accumulated": Case(micro_batches=3, accumulate=True, exact=0),
    "halves": Case(halves=True),
    "awkward sizes": Case(awkward, exact=SHORT),
    "by names": Case(options={"units": ["0", "[24]"]}, exact=SHORT),
    "by predicate": Case(options={"units": lambda name, _: name == "2"}),
    "one unit": Case(options={"units": 1 << 30}),
}


def batches(dtype: Any) -> list[tuple[Array, Array]]:
    """Return the joined batches; 12 samples can be cut by 1, 2, 3 and 4."""
    rng = np.random.default_rng(11)
    return [
        (rng.normal(size=(12, WIDTH)).astype(dtype), rng.integers(0, CLASSES, 12))
        for _ in range(STEPS)
    ]


def wrap(
    model: Module, group: ProcessGroup, case: Case, kind: Any, dtype: Any, options: Any
) -> Any:
    """Return (what runs the passes, its optimizer)."""
    unit = ELEMENTS * np.dtype(dtype).itemsize
    if kind == "ddp":
        sizes = BucketSizes(unit, unit)
        return DDP(model, group, op=case.op, sizes=sizes), case.factory(model.named_parameters())
    if kind == "naive":
        naive = NaiveFullShard(model, group, op=case.op, **options)
        return naive, case.factory([(shard.name, shard) for shard in naive.shards])
    options = {"units": unit, "op": case.op} | case.options | options
    fsdp = FSDP(model, group, strategy=kind, **options)
    return fsdp, ShardedOptimizer(fsdp, optimizer=case.factory)


def train(
    group: ProcessGroup, case: Case, kind: Any, dtype: Any = np.float64, **options: Any
) -> dict[str, Array]:
    """Train on this rank's shares, from parameters that differ at first."""
    model = case.build(np.random.default_rng(group.rank), dtype)
    strategy, optimizer = wrap(model, group, case, kind, dtype, options)
    for step, (x, target) in enumerate(batches(dtype)):
        start, stop = case.share(group.rank, group.size, len(x))
        optimizer.zero_grad()
        cuts = np.linspace(start, stop, case.micro_batches + 1).astype(int)
        for i, (a, b) in enumerate(pairwise(cuts.tolist())):
            last = i == case.micro_batches - 1
            adds = case.accumulate and kind != "ddp"
            with nullcontext() if last or adds else strategy.no_sync():
                mode = Mode(True, seed=5, step=step, sample_offset=a)
                y, ctx = strategy.forward(x[a:b], mode)
                denominator = len(x) if case.op is SUM else stop - start
                dy = cross_entropy(y, target[a:b], denominator=denominator)[1]
                if case.halves and kind not in ("ddp", "naive"):
                    _, wctx = strategy.backward_input(ctx, dy)
                    strategy.backward_weight(wctx)
                else:
                    strategy.backward(ctx, dy)
        optimizer.step()
    if kind == "naive":
        strategy.gather()
    with strategy.whole() if isinstance(strategy, FSDP) else nullcontext():
        state = {name: array.copy() for name, array in model.state_dict().items()}
    if kind != "naive":
        strategy.close()
    return state


def run_with_checkpoint(
    group: ProcessGroup, strategy: ShardingStrategy | None, steps: range, directory: Path
) -> dict[str, Array]:
    """Make some steps with clipping; the first ones are saved, later ones go on from there.

    `strategy` None: with a `DDP`.
    """
    model = plain(np.random.default_rng(group.rank), np.float64)
    held: DDP | FSDP
    optimizer: Any
    if strategy is None:
        held = DDP(model, group)
        optimizer = FACTORY(model.named_parameters())
    else:
        held = FSDP(model, group, units=UNIT, strategy=strategy)
        optimizer = ShardedOptimizer(held, optimizer=FACTORY)
    state = {"model": held, "optimizer": optimizer}
    if steps.start:
        checkpoint.load(directory, state, group)
    for step in steps:
        rng = np.random.default_rng([step, group.rank])
        y, ctx = held.forward(rng.normal(size=(4, WIDTH)), Mode(training=True, step=step))
        optimizer.zero_grad()
        held.backward(ctx, cross_entropy(y, rng.integers(0, 9, 4))[1])
        held.clip_grad_norm(0.1)
        optimizer.step()
    if not steps.start:
        checkpoint.save(directory, state, group, step=steps.stop)
    with held.whole() if isinstance(held, FSDP) else nullcontext():
        found = {name: p.data.copy() for name, p in model.named_parameters()}
    held.close()
    return found
