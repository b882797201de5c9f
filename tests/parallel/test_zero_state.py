from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import SUM
from mpidist.arrays.boxes import Box
from mpidist.arrays.shards import ShardedArray
from mpidist.backends.node.memory import NodeMemory
from mpidist.nn import BatchNorm2d, Linear, Sequential
from mpidist.parallel import ShardedOptimizer, full_state_dict
from mpidist.testing import run_ranks
from tests.parallel.sharded import (
    RULES,
    Given,
    assert_same,
    give,
    joined,
    kept,
    mixture,
    values,
    whole_numbers,
)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_keeps_the_state_of_its_slice(size):
    def body(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=RULES["adam"], op=SUM) as optimizer:
            give(optimizer, whole_numbers(model, group.rank, 0))
            optimizer.step()
            state = optimizer.state_dict()
            return kept(state), sum(getattr(value, "nbytes", 0) for value in state.values())

    states, nbytes = zip(*run_ranks(size, body), strict=True)
    unsharded = RULES["adam"](mixture().named_parameters()).state_dict()
    assert list(states[0]) == list(unsharded)
    for name, array in joined(states).items():
        assert np.shape(array) == np.shape(unsharded[name])
    whole = 2 * sum(p.data.nbytes for p in mixture().parameters())
    assert sum(nbytes) == whole
    # A cache line per bucket, and less than one per parameter, cannot be shared out evenly.
    assert max(nbytes) <= whole / size + 2 * 64 * (2 + 6)


def test_the_state_is_the_living_one():
    def body(group):
        with ShardedOptimizer(Given(w=np.ones(40)), group, optimizer=RULES["adam"]) as optimizer:
            for piece in optimizer.state_dict()["w/mean"].pieces.values():
                piece[...] = group.rank + 1
            return full_state_dict(optimizer)["w/mean"]

    for mean in run_ranks(2, body):  # slices are whole cache lines: 24 and 16 numbers
        np.testing.assert_array_equal(mean, np.repeat([1.0, 2.0], [24, 16]))


def train_and_stop(group, start, stop, given=None):
    """Make some of the steps, from another run's parameters and its whole state."""
    model = mixture(seed=5)
    with ShardedOptimizer(model, group, optimizer=RULES["adamw"], op=SUM) as optimizer:
        if given is not None:
            optimizer.model_state.load_state_dict(given[0])
            optimizer.load_state_dict(given[1])
        for step in range(start, stop):
            # What the ranks are given sums up to the same, however many they are.
            whole = whole_numbers(model, 0, step)
            share = {n: g if group.rank == 0 else np.zeros_like(g) for n, g in whole.items()}
            give(optimizer, share)
            optimizer.step()
        return values(model), full_state_dict(optimizer)


def test_training_goes_on_with_another_number_of_ranks():
    _, expected = run_ranks(1, train_and_stop, 0, 6)[0]
    halfway = run_ranks(3, train_and_stop, 0, 3)[0]
    for _, state in run_ranks(4, train_and_stop, 3, 6, halfway):
        assert_same(state, expected)


def test_a_slice_comes_out_of_any_pieces():
    model = mixture()
    whole = RULES["adam"](model.named_parameters()).state_dict() | {"step": 3}
    rng = np.random.default_rng(0)
    for value in whole.values():
        if isinstance(value, np.ndarray):
            value[...] = rng.normal(size=value.shape)

    def cut(array):
        """Split every dimension in two."""
        boxes = [Box.whole(array.shape)]
        for axis, length in enumerate(array.shape):
            for box in boxes[:]:
                boxes.remove(box)
                for start, stop in ((0, length // 2), (length // 2, length)):
                    offsets, sizes = list(box.offsets), list(box.sizes)
                    offsets[axis], sizes[axis] = start, stop - start
                    boxes.append(Box(tuple(offsets), tuple(sizes)))
        return ShardedArray(array.shape, array.dtype, {b: array[b.slices].copy() for b in boxes})

    def body(group):
        with ShardedOptimizer(mixture(), group, optimizer=RULES["adam"]) as optimizer:
            optimizer.load_state_dict(
                {k: cut(v) if isinstance(v, np.ndarray) else v for k, v in whole.items()}
            )
            optimizer.load_state_dict(optimizer.state_dict())  # from itself: nothing changes
            return full_state_dict(optimizer)

    for state in run_ranks(3, body):
        assert_same(state, whole)


def test_a_state_that_does_not_fit_changes_nothing():
    def body(group):
        with ShardedOptimizer(mixture(), group, optimizer=RULES["adam"]) as optimizer:
            whole = full_state_dict(optimizer)
            for key, value in whole.items():
                if key.endswith("/mean"):
                    whole[key] = value + 1
            whole["step"] = 7
            corner = ShardedArray((7, 5), np.float64, {Box((0, 0), (1, 5)): np.ones((1, 5))})
            for wrong, match in [
                (whole | {"kind": "SGD"}, "this is Adam, the state is of 'SGD'"),
                (whole | {"a/mean": np.ones(2)}, r"'a/mean' has shape \(2,\), expected \(7, 5\)"),
                (whole | {"a/mean": np.ones((7, 5), "f4")}, "has dtype float32, expected float64"),
                (
                    {k: v for k, v in whole.items() if k != "b/mean"},
                    r"missing .'b/mean'",
                ),
                (whole | {"a/mean": corner}, r"does not hold all.*\n  a/mean: Box\("),
            ]:
                with pytest.raises(ValueError, match=match):
                    optimizer.load_state_dict(wrong)
            state = full_state_dict(optimizer)
            assert state.pop("kind") == "Adam"
            assert not any(np.any(value) for value in state.values())

    run_ranks(2, body)


# -- parameters are read-only ----------------------------------------------------------------------


def two_layers(seed):
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(3, 5, rng=rng, dtype=np.float64),
        BatchNorm2d(2, dtype=np.float64),
        Linear(5, 2, rng=rng, dtype=np.float64),
    )


@pytest.mark.parametrize("memory", ["shared", "refused"])
def test_parameters_can_be_read_only(memory, monkeypatch):
    if memory == "refused":
        monkeypatch.setattr(NodeMemory, "share", lambda *_: None)

    def body(group):
        model = two_layers(group.rank)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            assert optimizer.shared == (memory == "shared")
            weight = model.layers[0].weight
            np.testing.assert_array_equal(weight.data, two_layers(0).layers[0].weight.data)
            with pytest.raises(ValueError, match="read-only"):
                weight.data[0, 0] = 1
        return weight.data

    for data in run_ranks(2, body):
        np.testing.assert_array_equal(data, two_layers(0).layers[0].weight.data)


@pytest.mark.parametrize("per_node", [None, 1, 2, "refused"])
def test_a_model_is_loaded_through_the_optimizer(per_node, monkeypatch):
    if per_node == "refused":
        monkeypatch.setattr(NodeMemory, "share", lambda *_: None)
        per_node = None
    state = two_layers(9).state_dict()
    state["1.running_mean"] = np.array([5.0, 6.0])

    def body(group):
        model = two_layers(0)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            before = {name: array.copy() for name, array in model.state_dict().items()}
            with pytest.raises(ValueError, match=r"read-only.*model_state"):
                model.load_state_dict(state)
            with pytest.raises(ValueError, match="missing"):
                optimizer.model_state.load_state_dict({"0.weight": state["0.weight"]})
            assert_same(model.state_dict(), before)
            optimizer.model_state.load_state_dict(state)
            return {name: array.copy() for name, array in model.state_dict().items()}

    for found in run_ranks(3, body, ranks_per_node=per_node):
        assert_same(found, state)


def test_parameters_outlive_the_optimizer():
    def body(group):
        model = two_layers(0)
        ShardedOptimizer(model, group, optimizer=RULES["sgd"]).close()
        for parameter in model.parameters():
            parameter.data = parameter.data.copy()
        model.load_state_dict(two_layers(4).state_dict())
        ShardedOptimizer(model, group, optimizer=RULES["sgd"]).close()
        return values(model)

    expected = values(two_layers(4))
    for found in run_ranks(2, body):
        assert_same(found, expected)
