"""The models and runs that the tests of tensor parallelism compare: one process, and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mpidist import checkpoint
from mpidist._types import SUM, Array
from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import ShardedArray
from mpidist.collectives import all_gather_object
from mpidist.group import ProcessGroup
from mpidist.mesh import DeviceMesh
from mpidist.nn import (
    GELU,
    CausalSelfAttention,
    Context,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Mode,
    Module,
    PositionEmbedding,
    Recompute,
    Residual,
    Sequential,
    cross_entropy,
)
from mpidist.nn.module import ParameterFree
from mpidist.optim import AdamW
from mpidist.parallel import (
    DDP,
    Columns,
    Heads,
    Pipeline,
    Rows,
    Split,
    Vocabulary,
    clip_grad_norm,
    parallelize,
    vocabulary_cross_entropy,
)
from mpidist.parallel.data.data_parallel import BUCKET_ORDER

DIM, HEADS, TIME, BATCH, WORDS = 12, 3, 7, 4, 11
WIDTH = 2 * DIM + 1  # a multiple of no number of ranks that is tested


class Gate(ParameterFree):
    """The product of two halves of the features."""

    elementwise_blocks = 2

    def forward(self, x: Array, mode: Mode) -> tuple[Array, Context]:
        a, b = np.split(x, 2, axis=-1)
        return a * b, Context((a, b))

    def backward_input(self, ctx: Context, dy: Array) -> tuple[Array, Any]:
        a, b = ctx.saved
        return np.concatenate([dy * b, dy * a], axis=-1), None


def linear(d_in: int, d_out: int, rng: np.random.Generator, **options: Any) -> Linear:
    return Linear(d_in, d_out, rng=rng, dtype=np.float64, **options)


def block(rng: np.random.Generator, *, gated: bool = False) -> Sequential:
    """Attention, "0.inner.1", and a perceptron, "1.inner.1" and "1.inner.4", each after a norm."""
    attention = CausalSelfAttention(DIM, HEADS, rng=rng, dtype=np.float64)
    up = linear(DIM, 2 * WIDTH if gated else WIDTH, rng)
    down = linear(WIDTH, DIM, rng)
    function = Gate() if gated else GELU()
    return Sequential(
        Residual(Sequential(LayerNorm(DIM, dtype=np.float64), attention, Dropout(0.1))),
        Residual(Sequential(LayerNorm(DIM, dtype=np.float64), up, function, Dropout(0.2), down)),
    )


def transformer(rng: np.random.Generator, *, gated: bool = False, tied: bool = False) -> Sequential:
    model = Sequential(
        Embedding(WORDS, DIM, rng=rng, std=0.5, dtype=np.float64),
        PositionEmbedding(TIME, DIM, rng=rng, dtype=np.float64),
        Dropout(0.1),
        block(rng, gated=gated),
        Recompute(block(rng, gated=gated)),
        LayerNorm(DIM, dtype=np.float64),
        linear(DIM, WORDS, rng, bias=not tied),
    )
    if tied:
        model.layers[-1].weight = model.layers[0].weight
    return model


def plan(*, gated: bool = False) -> dict[str, Split]:
    return {
        "*.0.inner.1": Heads(),
        "*.1.inner.1": Columns(blocks=1 + gated),
        "*.1.inner.4": Rows(),
        "0": Vocabulary(),
        "6": Vocabulary(),
    }


@dataclass(frozen=True)
class Case:
    """A model, how it is cut, and how it is trained."""

    gated: bool = False
    tied: bool = False
    clip: bool = False
    frozen: bool = False
    micro_batches: int = 1

    def build(self, seed: int = 0) -> Sequential:
        model = transformer(np.random.default_rng(seed), gated=self.gated, tied=self.tied)
        if self.frozen:
            for name, parameter in model.named_parameters():
                parameter.trainable = "qkv" not in name and "0.weight" not in name
        return model

    @property
    def plan(self) -> dict[str, Split]:
        return plan(gated=self.gated)


CASES = {
    "plain": Case(),
    "gated": Case(gated=True, micro_batches=2),
    "tied": Case(tied=True, clip=True),
    "frozen": Case(frozen=True),
}


def train(
    model: Module,
    case: Case,
    *,
    group: ProcessGroup | None = None,
    steps: range = range(4),
    optimizer: AdamW | None = None,
) -> list[float]:
    """Train a model, cut over a group or whole, in place; return the losses."""
    # The gradient by the bias of the keys is 0 but for rounding, which AdamW divides by 1e-8.
    optimizer = optimizer or AdamW(model, lr=1e-3, weight_decay=0.1)
    losses = []
    for step in steps:
        x, target = np.random.default_rng(step).integers(0, WORDS, (2, BATCH, TIME))
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, BATCH, BATCH // case.micro_batches):
            rows = slice(start, start + BATCH // case.micro_batches)
            y, ctx = model.forward(x[rows], Mode(True, seed=3, step=step, sample_offset=start))
            if group is None:
                loss, dy = cross_entropy(y, target[rows], denominator=target.size)
            else:
                loss, dy = vocabulary_cross_entropy(
                    y, target[rows], group, classes=WORDS, denominator=target.size
                )
            model.backward(ctx, dy)
            total += float(loss)
        if case.clip:
            clip_grad_norm(model, 0.1, group=group)
        optimizer.step()
        losses.append(total)
    return losses


def whole_state(state: Mapping[str, Any], group: ProcessGroup) -> dict[str, Array]:
    """Put the states of all ranks together, each element at least once.

    What several ranks have must have the same bits.
    """
    whole: dict[str, Array] = {}
    for theirs in all_gather_object(dict(state), group):
        for name, held in theirs.items():
            alone = not isinstance(held, ShardedArray)
            pieces = {Box.whole(held.shape): held} if alone else held.pieces
            array = whole.setdefault(name, np.full(held.shape, np.nan, held.dtype))
            for box, piece in pieces.items():
                seen = array[box.slices]
                assert ((seen == piece) | np.isnan(seen)).all(), f"{name} differs between ranks"
                array[box.slices] = piece
    assert not any(np.isnan(array).any() for array in whole.values())
    return whole


@cache
def trained_alone(name: str) -> tuple[list[float], dict[str, Array]]:
    """Train a case in one process; return the losses, and what the model is then."""
    model = CASES[name].build()
    return train(model, CASES[name]), model.state_dict()


def check_case(group: ProcessGroup, name: str) -> None:
    """Train on the ranks, from parameters that differ at first, and compare with one process."""
    case = CASES[name]
    losses_alone, state_alone = trained_alone(name)
    model = case.build(seed=group.rank)
    names = [name for name, _ in model.named_parameters()]
    before = [id(parameter) for parameter in model.parameters()]
    assert parallelize(model, group, case.plan) is model
    assert [name for name, _ in model.named_parameters()] == names
    assert [id(parameter) for parameter in model.parameters()] == before
    losses = train(model, case, group=group)
    assert all_gather_object(losses, group) == [losses] * group.size
    np.testing.assert_allclose(losses, losses_alone, rtol=1e-11)
    state = whole_state(model.state_dict(), group)
    check_same(state, state_alone)


def check_pipeline(world: ProcessGroup) -> None:
    """Train two stages, each cut over two ranks, with as many replicas as there are ranks for."""
    case = CASES["plain"]
    with DeviceMesh(world, pp=2, dp=-1, tp=2) as mesh:
        data, tp = mesh["dp"].group, mesh["tp"].group
        pipe = Pipeline(
            parallelize(case.build(), tp, case.plan),
            mesh["pp"].group,
            micro_batches=2,
            loss=partial(vocabulary_cross_entropy, group=tp, classes=WORDS),
            cut=[4],
            data_parallel=lambda stage: DDP(stage, data, op=SUM),
        )
        with pipe:
            optimizer = AdamW(pipe.named_parameters(), lr=1e-3, weight_decay=0.1)
            samples = BATCH // data.size
            rows = slice(data.rank * samples, (data.rank + 1) * samples)
            for step in range(4):
                x, target = np.random.default_rng(step).integers(0, WORDS, (2, BATCH, TIME))
                optimizer.zero_grad()
                mode = Mode(True, seed=3, step=step, sample_offset=rows.start)
                pipe.step(x[rows], target[rows], mode, denominator=target.size)
                optimizer.step()
            held = pipe.state_dict()
            arrays = {n: held[n] for n in held if not n.startswith(BUCKET_ORDER)}
            check_same(whole_state(arrays, world), trained_alone("plain")[1])


def save_half_way(group: ProcessGroup, directory: Path) -> None:
    """Make two steps on the ranks, and save."""
    case = CASES["gated"]
    model = parallelize(case.build(), group, case.plan)
    optimizer = AdamW(model, lr=1e-3, weight_decay=0.1)
    train(model, case, group=group, steps=range(2), optimizer=optimizer)
    checkpoint.save(directory, {"model": model, "optimizer": optimizer}, group, step=2)


def check_resumed(group: ProcessGroup, directory: Path, *, cut: bool) -> None:
    """Load that, make two more steps, on the ranks or on each alone, and compare with one run."""
    case = CASES["gated"]
    model: Module = case.build(seed=1)
    if cut:
        parallelize(model, group, case.plan)
    optimizer = AdamW(model, lr=1e-3, weight_decay=0.1)
    checkpoint.load(directory, {"model": model, "optimizer": optimizer}, group)
    ranks = group if cut else None
    train(model, case, group=ranks, steps=range(2, 4), optimizer=optimizer)
    check_same(whole_state(model.state_dict(), group), trained_alone("gated")[1])


def check_same(state: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(state[name], array, rtol=0, atol=1e-11, err_msg=name)
