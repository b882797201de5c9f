"""Training by a sharded optimizer, and what is checked alike on simulated and on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from mpidist._types import SUM, Array
from mpidist.arrays.shards import ShardedArray
from mpidist.group import ProcessGroup
from mpidist.nn import Linear, Mode, Module, Parameter, Sequential, cross_entropy
from mpidist.nn.module import Context
from mpidist.optim import SGD, Adam, AdamW
from mpidist.parallel import DDP, ShardedOptimizer
from tests.parallel.training import OPTIMIZERS, SMALL, Case, batches, digest

FACTORIES: dict[str, Callable[..., Any]] = {
    "sgd": partial(SGD, lr=0.2, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}
"""The optimizers of `tests.parallel.training`, for slices."""


def scattered(model: Module, group: ProcessGroup, case: Case, name: str) -> ShardedOptimizer:
    return ShardedOptimizer(model, group, optimizer=FACTORIES[name], op=case.op, sizes=SMALL)


def after_ddp(model: Module, group: ProcessGroup, case: Case, name: str) -> ShardedOptimizer:
    ddp = DDP(model, group, op=case.op, sizes=SMALL)
    return ShardedOptimizer(ddp, group, optimizer=FACTORIES[name], sizes=SMALL)


WAYS = {"scattered": scattered, "after ddp": after_ddp}


def train_sharded(group: ProcessGroup, case: Case, name: str, way: str) -> dict[str, Array]:
    """Train on this rank's shares, from parameters that differ at first."""
    model = case.build(np.random.default_rng(group.rank))
    with WAYS[way](model, group, case, name) as optimizer:
        for step, x, target in batches():
            start, end = case.share(group.rank, group.size, len(x))
            denominator = len(x) if case.op is SUM else end - start
            optimizer.zero_grad()
            cuts = np.linspace(start, end, case.micro_batches + 1).astype(int)
            for i, (a, b) in enumerate(pairwise(cuts)):
                last = i == case.micro_batches - 1
                with nullcontext() if last else optimizer.no_sync():
                    mode = Mode(True, seed=5, step=step, sample_offset=int(a))
                    y, ctx = model.forward(x[a:b], mode)
                    _, dy = cross_entropy(y, target[a:b], denominator=denominator)
                    optimizer.backward(ctx, dy)
            optimizer.step()
    return {name: array.copy() for name, array in model.state_dict().items()}


def digests_after_ddp(group: ProcessGroup, case: Case, name: str, *, shard: bool) -> list[str]:
    """Train by DDP with equal shares, and return the parameters' digest after each step."""
    model = case.build(np.random.default_rng(3))
    ddp = DDP(model, group, sizes=SMALL)
    if shard:
        optimizer = ShardedOptimizer(ddp, group, optimizer=FACTORIES[name])
    else:
        optimizer = OPTIMIZERS[name](model)
    found = []
    for step, x, target in batches():
        start, end = case.share(group.rank, group.size, len(x))
        optimizer.zero_grad()
        y, ctx = ddp.forward(x[start:end], Mode(True, seed=5, step=step, sample_offset=start))
        ddp.backward(ctx, cross_entropy(y, target[start:end])[1])
        optimizer.step()
        found.append(digest(model))
    return found


class Given(Module):
    """Parameters whose gradients are simply given: `dy` is a dict of them, None where unused."""

    def __init__(self, **arrays: Any) -> None:
        self.names = list(arrays)
        for name, array in arrays.items():
            setattr(self, name, Parameter(np.array(array)))

    def forward(self, x: Any, mode: Mode) -> tuple[Any, Context]:
        used = [name for name in self.names if name in x]
        return x, Context(x, {getattr(self, name): 1 for name in used})

    def backward_input(self, ctx: Context, dy: Any) -> tuple[Any, Any]:
        return dy, dy

    def backward_weight(self, wctx: Any) -> None:
        for name in self.names:
            if name in wctx:
                getattr(self, name).add_grad(np.asarray(wctx[name]))


def whole_numbers(model: Module, rank: int, step: int) -> dict[str, Array]:
    """Return a gradient per parameter whose sums over ranks are exact in any order."""
    rng = np.random.default_rng([rank, step])
    return {
        name: rng.integers(-8, 9, size=p.shape).astype(p.dtype)
        for name, p in model.named_parameters()
    }


def give(optimizer: ShardedOptimizer, grads: dict[str, Array]) -> None:
    """Run a backward that makes these gradients."""
    _, ctx = optimizer.module.forward(grads, Mode(training=True))
    optimizer.backward(ctx, grads)


def large(seed: int = 0) -> Module:
    """Build a model of 8 MiB in float32, with a length that no number of ranks divides."""
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(1021, 1024, rng=rng, dtype=np.float32),
        Linear(1024, 1027, rng=rng, dtype=np.float32),
    )


RULES = {
    "sgd": partial(SGD, lr=0.25),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": partial(Adam, lr=0.02, weight_decay=1e-2),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
}


def mixture(seed=0):
    """Build parameters of several dtypes, and of sizes that no number of ranks divides."""
    rng = np.random.default_rng(seed)
    return Given(
        a=rng.normal(size=(7, 5)),
        b=rng.normal(size=()),
        c=rng.normal(size=(3, 41)).astype(np.float32),
        d=np.empty((0, 4)),
        e=rng.normal(size=13),
        f=rng.normal(size=(50, 3)).astype(np.float32),
    )


def summed(model, size, step):
    """Return the sum over the ranks of what they are given."""
    each = [whole_numbers(model, rank, step) for rank in range(size)]
    return {name: sum(grads[name] for grads in each) for name in each[0]}


def alone(rule, size, steps, *, model=None, gradients=summed):
    """Train in one process on the summed gradients."""
    model = model or mixture()
    optimizer = rule(model.named_parameters())
    for step in range(steps):
        optimizer.zero_grad()
        for name, grad in gradients(model, size, step).items():
            getattr(model, name).add_grad(grad)
        optimizer.step()
    return model, optimizer


def values(model):
    return {name: p.data.copy() for name, p in model.named_parameters()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)


# -- a checkpoint by hand, in plain numpy ----------------------------------------------------------


def kept(state):
    """Copy a state, as a file does."""
    copies = {}
    for name, value in state.items():
        if isinstance(value, ShardedArray):
            pieces = {box: piece.copy() for box, piece in value.pieces.items()}
            copies[name] = ShardedArray(value.shape, value.dtype, pieces)
        else:
            copies[name] = value.copy() if isinstance(value, np.ndarray) else value
    return copies


def joined(states, copies=1):
    """Put together what each rank has kept; so often each element of a split array stands."""
    whole = dict(states[0])
    for name, first in whole.items():
        if not isinstance(first, ShardedArray):
            assert all(np.array_equal(state[name], first) for state in states), name
            continue
        times = np.zeros(first.shape, int)
        whole[name] = np.empty(first.shape, first.dtype)
        for state in states:
            for box, piece in state[name].pieces.items():
                times[box.slices] += 1
                whole[name][box.slices] = piece
        np.testing.assert_array_equal(times, copies, err_msg=name)
    return whole


def fill(target, saved):
    """Load as a checkpoint does: in place where that is allowed, what is not known left out."""
    state = {name: value for name, value in target.state_dict().items() if name in saved}
    for name, value in state.items():
        if isinstance(value, ShardedArray):
            pieces = {
                box: taken(piece, saved[name][box.slices]) for box, piece in value.pieces.items()
            }
            state[name] = ShardedArray(value.shape, value.dtype, pieces)
        else:
            array = isinstance(value, np.ndarray)
            state[name] = taken(value, saved[name]) if array else saved[name]
    target.load_state_dict(state)


def taken(array, values):
    """Write values into an array, or, if it is read-only, into one that takes its place."""
    array = array if array.flags.writeable else np.empty_like(array)
    array[...] = values
    return array
