"""Models, units, cuts and batches drawn at random: FSDP trains each as DDP does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpidist.nn import GELU, Dropout, LayerNorm, Linear, Module, Recompute, Residual, Sequential
from mpidist.parallel import BucketSizes, Cut, ShardingStrategy
from mpidist.testing import run_ranks
from tests.parallel.fsdp import CLASSES, SHORT, STRATEGIES, UNIT, WIDTH, Case, linear, train
from tests.parallel.sharded import assert_same
from tests.parallel.training import Routed, assert_close, even, uneven

UNITS = (1, 300, 5_000, 20_000, 60_000, UNIT, 1 << 20, ["*"], ["0", "*[13]"], BucketSizes(1000))


class Drawn:
    """Draws a model: blocks in blocks, some tied, some used twice, some frozen."""

    def __init__(self, draw: random.Random, rng: np.random.Generator, dtype: Any) -> None:
        self.draw, self.rng, self.dtype = draw, rng, dtype
        self.width = draw.choice([4, 8, WIDTH, WIDTH])
        self.layers: list[Linear] = []

    def model(self) -> Module:
        blocks = [self.block(2) for _ in range(self.draw.randint(1, 5))]
        first = linear(WIDTH, self.width, self.rng, self.dtype)
        model = Sequential(first, *blocks, linear(self.width, CLASSES, self.rng, self.dtype))
        if self.draw.random() < 0.4:
            for parameter in [*model.parameters()][:-1]:
                parameter.trainable = self.draw.random() < 0.6
        return model

    def layer(self) -> Linear:
        layer = linear(self.width, self.width, self.rng, self.dtype)
        if self.layers and self.draw.random() < 0.25:
            layer.weight = self.draw.choice(self.layers).weight
        if self.layers and self.draw.random() < 0.1:
            layer = self.draw.choice(self.layers)
        self.layers.append(layer)
        return layer

    def blocks(self, depth: int, most: int) -> Sequential:
        return Sequential(*(self.block(depth - 1) for _ in range(self.draw.randint(1, most))))

    def block(self, depth: int) -> Module:
        norm = LayerNorm(self.width, dtype=self.dtype)
        kinds: list[Callable[[], Module]] = [
            self.layer,
            lambda: Sequential(norm, self.layer(), GELU()),
            lambda: Sequential(self.layer(), Dropout(0.2)),
            lambda: Residual(self.blocks(depth, 3)),
            lambda: Recompute(self.block(depth - 1)),
            lambda: Routed(self.block(depth - 1), self.draw.choice([0.5, 1.2, np.inf])),
            lambda: self.blocks(depth, 4),
        ]
        return self.draw.choice(kinds if depth else kinds[:1])()


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=pytest.mark.full if s >= 12 else ()) for s in range(200)]
)
def test_it_trains_as_ddp_does(seed: int) -> None:
    draw = random.Random(seed)
    case = Case(
        lambda rng, dtype: Drawn(random.Random(seed), rng, dtype).model(),
        share=draw.choice([even, uneven]),
        micro_batches=draw.choice([1, 1, 2, 3]),
        accumulate=draw.random() < 0.5,
        halves=draw.random() < 0.3,
        exact=SHORT,
        options={"units": draw.choice(UNITS), "cut": draw.choice(list(Cut))},
    )
    strategy = draw.choice(STRATEGIES)
    nodes = {"node_memory": draw.random() < 0.7, "ranks_per_node": None}
    if strategy is not ShardingStrategy.FULL_SHARD:
        nodes["ranks_per_node"] = draw.choice([None, 2])
    size = draw.choice([1, 2, 3, 4])
    if strategy is ShardingStrategy.HYBRID_SHARD and size == 3:
        nodes["ranks_per_node"] = None  # it refuses nodes with different numbers of ranks
    expected = run_ranks(size, train, case, "ddp", **nodes)[0]
    first, *others = run_ranks(size, train, case, strategy, **nodes)
    assert_close(first, expected)
    for other in others:
        assert_same(other, first)
