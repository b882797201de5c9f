from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import SUM
from mpidist.boxes import Box
from mpidist.nn import BatchNorm2d, Linear, Sequential
from mpidist.parallel import ShardedOptimizer, full_state_dict, load_full_state_dict
from mpidist.testing import run_ranks
from tests.parallel.sharded import RULES, Given, assert_same, give, mixture, values, whole_numbers


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_keeps_the_state_of_its_slice(size):
    def body(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=RULES["adam"]) as optimizer:
            state, boxes = optimizer.state_dict(), optimizer.boxes()
            for name in boxes:
                assert state[f"{name}/mean"].shape == boxes[name].sizes
            return boxes, sum(getattr(value, "nbytes", 0) for value in state.values())

    found = run_ranks(size, body)
    for name, parameter in mixture().named_parameters():
        covered = np.zeros(parameter.size, int)
        for boxes, _ in found:
            covered[boxes[name].slices] += 1
        np.testing.assert_array_equal(covered, 1)
    whole = 2 * sum(p.data.nbytes for p in mixture().parameters())
    assert sum(nbytes for _, nbytes in found) == whole
    # A cache line per bucket, and less than one per parameter, cannot be shared out evenly.
    assert max(nbytes for _, nbytes in found) <= whole / size + 2 * 64 * (2 + 6)


def train_and_stop(group, start, stop, given=None):
    """Make some of the steps, from another run's parameters and its state."""
    model = mixture(seed=5)
    with ShardedOptimizer(model, group, optimizer=RULES["adamw"], op=SUM) as optimizer:
        if given is not None:
            optimizer.load_module_state_dict(given[0])
            load_full_state_dict(optimizer, given[1])
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


def test_a_shard_is_found_by_its_boxes():
    """What a checkpoint will do: read parts of the pieces of other ranks."""

    def save(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=RULES["adam"], op=SUM) as optimizer:
            give(optimizer, whole_numbers(model, group.rank, 0))
            optimizer.step()
            state = {k: np.copy(v) for k, v in optimizer.state_dict().items() if k != "kind"}
            return state, optimizer.boxes(), full_state_dict(optimizer)

    saved = run_ranks(3, save)

    def load(group):
        with ShardedOptimizer(mixture(), group, optimizer=RULES["adam"]) as optimizer:
            mine = optimizer.state_dict()
            for name, box in optimizer.boxes().items():
                mine[f"{name}/updates"] = saved[0][0][f"{name}/updates"]
                for slot in ("mean", "mean_square"):
                    piece = mine[f"{name}/{slot}"] = np.full(box.sizes, np.nan)
                    piece = mine[f"{name}/{slot}"] = piece.astype(
                        saved[0][0][f"{name}/{slot}"].dtype
                    )
                    for state, boxes, _ in saved:
                        common = box.intersect(boxes[name])
                        if common is not None:
                            source = common.relative_to(boxes[name]).slices
                            piece[common.relative_to(box).slices] = state[f"{name}/{slot}"][source]
            optimizer.load_state_dict(mine | {"step": 1})
            return full_state_dict(optimizer)

    for state in run_ranks(2, load):
        assert_same(state, saved[0][2])


def test_a_state_that_does_not_fit_changes_nothing():
    def body(group):
        with ShardedOptimizer(mixture(), group, optimizer=RULES["adam"]) as optimizer:
            whole = full_state_dict(optimizer)
            with pytest.raises(ValueError, match="this is Adam, the state is of 'SGD'"):
                load_full_state_dict(optimizer, whole | {"kind": "SGD"})
            with pytest.raises(ValueError, match=r"'a/mean' has shape \(2,\), expected \(7, 5\)"):
                load_full_state_dict(optimizer, whole | {"a/mean": np.ones(2)})
            with pytest.raises(ValueError, match=r"missing .'b/mean'"):
                load_full_state_dict(optimizer, {k: v for k, v in whole.items() if k != "b/mean"})
            assert not any(np.any(v) for k, v in full_state_dict(optimizer).items() if k != "kind")

    run_ranks(2, body)


# -- parameters are read-only ----------------------------------------------------------------------


def two_layers(seed):
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(3, 5, rng=rng, dtype=np.float64),
        BatchNorm2d(2, dtype=np.float64),
        Linear(5, 2, rng=rng, dtype=np.float64),
    )


@pytest.mark.parametrize("per_node", [None, 1])
def test_parameters_can_be_read_only(per_node):
    def body(group):
        model = two_layers(group.rank)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            assert optimizer.shared == (per_node == 1)
            weight = model.layers[0].weight
            np.testing.assert_array_equal(weight.data, two_layers(0).layers[0].weight.data)
            with pytest.raises(ValueError, match="read-only"):
                weight.data[0, 0] = 1
        return weight.data

    for data in run_ranks(2, body, ranks_per_node=per_node):
        np.testing.assert_array_equal(data, two_layers(0).layers[0].weight.data)


@pytest.mark.parametrize("per_node", [None, 1, 2])
def test_a_model_is_loaded_through_the_optimizer(per_node):
    state = two_layers(9).state_dict()
    state["1.running_mean"] = np.array([5.0, 6.0])

    def body(group):
        model = two_layers(0)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]) as optimizer:
            before = {name: array.copy() for name, array in model.state_dict().items()}
            with pytest.raises(ValueError, match=r"read-only.*load_module_state_dict"):
                model.load_state_dict(state)
            with pytest.raises(ValueError, match="missing"):
                optimizer.load_module_state_dict({"0.weight": state["0.weight"]})
            assert_same(model.state_dict(), before)
            optimizer.load_module_state_dict(state)
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
        return ShardedOptimizer(model, group, optimizer=RULES["sgd"]).boxes()

    assert len(run_ranks(2, body)[0]) == 6


def test_an_empty_box_has_one_dimension():
    def body(group):
        with ShardedOptimizer(Given(w=np.ones(1)), group, optimizer=RULES["sgd"]) as optimizer:
            return optimizer.boxes()["w"]

    assert run_ranks(2, body) == [Box((0,), (1,)), Box((0,), (0,))]
