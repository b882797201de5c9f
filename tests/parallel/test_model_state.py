"""A run goes on from what another kind of run has kept, bit by bit."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist._types import SUM
from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import ShardedArray
from mpidist.errors import CheckpointIncompatibleError
from mpidist.nn import Mode, Sequential
from mpidist.optim import Adam
from mpidist.parallel import DDP, FSDP, BucketSizes, ShardedOptimizer, ShardingStrategy
from mpidist.testing import run_ranks
from tests.parallel.sharded import (
    RULES,
    Given,
    assert_same,
    fill,
    give,
    joined,
    kept,
    mixture,
    values,
    whole_numbers,
)
from tests.parallel.test_zero_state import two_layers

SIZES = BucketSizes(400, 400)
RULE = RULES["adamw"]

KINDS = {
    "module": (1, 1),
    "ddp": (2, 3),
    "scattered": (3, 4),
    "after ddp": (4, 2),
    "fsdp": (4, 3),
    "shard_grad_op": (3, 4),
    "hybrid": (4, 2),
    "no_shard": (2, 3),
}
"""Kinds of runs, and how many ranks save and load them."""
ON_NODES = {**KINDS, "fsdp over nodes": (4, 3)}

FSDP_STRATEGIES = {
    "fsdp": ShardingStrategy.FULL_SHARD,
    "fsdp over nodes": ShardingStrategy.FULL_SHARD,
    "shard_grad_op": ShardingStrategy.SHARD_GRAD_OP,
    "hybrid": ShardingStrategy.HYBRID_SHARD,
    "no_shard": ShardingStrategy.NO_SHARD,
}


def two_parts(seed=0):
    """Build the parameters of `mixture` in two modules, which are units of their own."""
    arrays = values(mixture(seed))
    return Sequential(
        *(Given(**{name: arrays[name] for name in names}) for names in ("abc", "def"))
    )


@cache
def reference(steps):
    """Return the parameters and the optimizer's state after so many steps in one process."""
    model = two_parts()
    optimizer = RULE(model.named_parameters())
    for step in range(steps):
        optimizer.zero_grad()
        grads = whole_numbers(model, 0, step)
        for name, parameter in model.named_parameters():
            parameter.add_grad(grads[name])
        optimizer.step()
    return values(model), kept(optimizer.state_dict())


def train(group, kind, start, stop, saved=None, directory=None):
    """Make some of the steps in one kind of run, and return what it keeps at the end.

    It begins with what was saved by hand, or in a directory; the first half is saved there.
    """
    model = two_parts(seed=5 if start else 0)
    ddp = DDP(model, group, op=SUM, sizes=SIZES) if kind in ("ddp", "after ddp") else None
    if kind in ("module", "ddp"):
        optimizer = RULE(model.named_parameters())
        held = ddp or model
    elif kind in FSDP_STRATEGIES:
        held = FSDP(model, group, strategy=FSDP_STRATEGIES[kind], units=400, op=SUM)
        optimizer = ShardedOptimizer(held, optimizer=RULE)
    else:
        op = None if ddp else SUM
        optimizer = ShardedOptimizer(ddp or model, group, optimizer=RULE, op=op, sizes=SIZES)
        held = optimizer.model_state
    if saved is not None:
        fill(held, saved[0])
        fill(optimizer, saved[1])
    state = {"model": held, "optimizer": optimizer}
    if start and directory is not None:
        checkpoint.load(directory, state, group)
    for step in range(start, stop):
        # What the ranks are given sums up to the same, however many they are.
        grads = {
            name.partition(".")[2]: grad if group.rank == 0 else np.zeros_like(grad)
            for name, grad in whole_numbers(model, 0, step).items()
        }
        optimizer.zero_grad()
        _, ctx = model.forward(grads, Mode(training=True))
        backward = optimizer if isinstance(optimizer, ShardedOptimizer) else ddp or model
        backward.backward(ctx, grads)
        optimizer.step()
    if not start and directory is not None:
        checkpoint.save(directory, state, group, step=stop)
    return kept(held.state_dict()), kept(optimizer.state_dict())


def together(parts, kind, nodes=1):
    """Put together the model's and the optimizer's states of all ranks."""
    copies = {"no_shard": len(parts), "hybrid": nodes}.get(kind, 1)
    return tuple(joined(states, copies) for states in zip(*parts, strict=True))


@cache
def halfway(kind):
    return together(run_ranks(KINDS[kind][0], train, kind, 0, 3), kind)


@pytest.mark.parametrize(
    ("saves", "loads", "per_node"),
    [
        pytest.param(
            *(saves, loads, per_node),
            marks=() if per_node is None or (saves, per_node) == ("ddp", 1) else pytest.mark.full,
        )
        for saves, loads, per_node in product(KINDS, KINDS, (None, 1, 2))
    ],
)
def test_any_run_goes_on_from_any_other(saves, loads, per_node):
    expected, state = reference(6)
    size = KINDS[loads][1]
    parts = run_ranks(size, train, loads, 3, 6, halfway(saves), ranks_per_node=per_node)
    model, optimizer = together(parts, loads, nodes=-(-size // (per_node or size)))
    model.pop("buckets/order", None)
    assert_same(model, expected)
    assert_same(optimizer, state)


def run(kind, size, *args):
    """Run steps, some kinds on several nodes; return the states of all ranks together."""
    per_node = max(size // 2, 1) if kind in ("hybrid", "fsdp over nodes") else size
    parts = run_ranks(size, train, kind, *args, ranks_per_node=per_node, node_memory=True)
    return together(parts, kind, nodes=-(-size // per_node))


def assert_goes_on(kind, size, directory):
    """Check that a run loads what was saved after 3 steps, and ends as one without a break."""
    for stop in (3, 6):
        expected, state = reference(stop)
        model, optimizer = run(kind, size, 3, stop, None, directory)
        model.pop("buckets/order", None)
        assert_same(model, expected)
        assert_same(optimizer, state)


@pytest.mark.parametrize(
    ("saves", "loads"),
    [
        ("module", "ddp"),
        ("ddp", "module"),
        ("module", "scattered"),
        ("scattered", "module"),
        ("ddp", "scattered"),
        ("scattered", "after ddp"),
        ("fsdp", "module"),
        ("fsdp over nodes", "hybrid"),
        ("scattered", "fsdp over nodes"),
        ("ddp", "fsdp"),
        ("fsdp", "no_shard"),
        ("no_shard", "shard_grad_op"),
        ("shard_grad_op", "ddp"),
        ("hybrid", "module"),
        ("hybrid", "fsdp"),
    ],
)
def test_any_run_goes_on_from_the_checkpoint_of_any_other(saves, loads, tmp_path):
    run(saves, ON_NODES[saves][0], 0, 3, None, tmp_path)
    assert_goes_on(loads, ON_NODES[loads][1], tmp_path)


RUNS = [(kind, size) for kind in ON_NODES for size in (1, 2, 3, 4) if kind != "module" or size == 1]


@pytest.mark.full
@pytest.mark.parametrize("saves", RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def test_what_any_run_saves_every_other_loads(saves, tmp_path):
    run(*saves, 0, 3, None, tmp_path)
    for loads in RUNS:
        assert_goes_on(*loads, tmp_path)


def test_what_an_object_cannot_go_on_without_is_missed(tmp_path):
    """An order of buckets, which a module's checkpoint has not, is found; a count is not."""

    class Forgetful(Adam):
        def state_dict(self):
            state = super().state_dict() | {"kind": "Adam"}
            del state["w/updates"]
            return state

    def body(group):
        named = list(Given(w=np.ones(3)).named_parameters())
        checkpoint.save(tmp_path, {"optimizer": Forgetful(named)}, group, step=1)
        with pytest.raises(CheckpointIncompatibleError, match=r"missing \['w/updates'\]"):
            checkpoint.load(tmp_path, {"optimizer": Adam(named)}, group)

    run_ranks(2, body)


def test_slices_cannot_be_written_where_others_read_them():
    def body(group):
        model = two_layers(0)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            state = optimizer.model_state.state_dict()
            assert state["1.running_mean"] is model.state_dict()["1.running_mean"]
            pieces = [
                p for x in state.values() if isinstance(x, ShardedArray) for p in x.pieces.values()
            ]
            for piece in pieces:
                with pytest.raises(ValueError, match="read-only"):
                    piece[...] = 1
            return len(pieces)

    assert all(run_ranks(2, body))


@pytest.mark.parametrize("per_node", [None, 1, 2])
def test_slices_and_buffers_are_loaded(per_node):
    saved = two_layers(9).state_dict() | {"1.running_mean": np.array([5.0, 6.0])}

    def body(group):
        model = two_layers(0)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            fill(optimizer.model_state, saved)
            optimizer.model_state.load_state_dict(optimizer.model_state.state_dict())
            return kept(model.state_dict())

    for found in run_ranks(3, body, ranks_per_node=per_node):
        assert_same(found, saved)


def test_the_order_of_a_ddps_buckets_is_taken_too():
    def body(group):
        order = []
        for wrap in (DDP, lambda model, _: model):
            model = Given(w=np.ones(5), v=np.ones(3))
            source = wrap(model, group)
            with ShardedOptimizer(source, group, optimizer=RULES["sgd"]) as optimizer:
                state = optimizer.model_state.state_dict()
                optimizer.model_state.load_state_dict(state | {"buckets/order": ["w", "v"]})
                order.append(optimizer.model_state.state_dict()["buckets/order"])
        return order

    assert run_ranks(2, body) == [[["w", "v"]] * 2] * 2


def test_a_state_that_does_not_fit_changes_nothing():
    def body(group):
        model = Given(w=np.ones((8, 8)), v=np.ones(3))
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            row = ShardedArray((8, 8), np.float64, {Box((0, 0), (1, 8)): np.zeros((1, 8))})
            for w, match in [
                (np.zeros((8, 7)), r"w: expected \(8, 8\) float64, got \(8, 7\)"),
                (ShardedArray((8, 8), np.float32, {}), "got .* float32"),
                (row, r"ModelState.load_state_dict: .* does not hold all.*\n  w: Box\("),
            ]:
                with pytest.raises(ValueError, match=match):
                    optimizer.model_state.load_state_dict({"w": w, "v": np.zeros(3)})
            state = optimizer.model_state.state_dict()
            with pytest.raises(ValueError, match="every parameter once"):
                optimizer.model_state.load_state_dict(state | {"buckets/order": ["w"]})
            return values(model)

    for found in run_ranks(2, body):
        assert_same(found, {"w": np.ones((8, 8)), "v": np.ones(3)})


def test_not_while_gradients_are_under_way():
    def body(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            state = kept(model.state_dict())
            give(optimizer, whole_numbers(model, group.rank, 0))
            with pytest.raises(RuntimeError, match="still under way"):
                optimizer.model_state.load_state_dict(state)
            optimizer.zero_grad()
            optimizer.model_state.load_state_dict(state)

    run_ranks(2, body)
