from __future__ import annotations

import math
import threading
from functools import partial

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.boxes import Box
from mpidist.collectives import ireduce_scatter
from mpidist.errors import CollectiveMismatchError, PeerLostError
from mpidist.nn import BatchNorm2d, Linear, Mode, Sequential
from mpidist.optim import SGD, Adam, AdamW, WarmupCosine
from mpidist.parallel import (
    DDP,
    BucketSizes,
    GradScaler,
    ShardedOptimizer,
    clip_grad_norm,
    full_state_dict,
    load_full_state_dict,
    shard_gradients,
)
from mpidist.testing import Death, Faults, run_ranks
from tests.parallel.checks import TINY, TRAINING
from tests.parallel.sharded import (
    FACTORIES,
    WAYS,
    Given,
    digests_after_ddp,
    give,
    train_sharded,
    whole_numbers,
)
from tests.parallel.training import CASES, assert_close, train_alone

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


# -- equal to the unsharded optimizer --------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", FACTORIES)
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process_on_the_joined_batch(case, optimizer, way):
    expected = train_alone(CASES[case], optimizer)
    for size, per_node in [(1, None), (3, None), (4, 2), (4, 3)]:
        args = (train_sharded, CASES[case], optimizer, way)
        for state in run_ranks(size, *args, ranks_per_node=per_node):
            assert_close(state, expected)


@pytest.mark.parametrize("optimizer", FACTORIES)
@pytest.mark.parametrize("case", ["plain", "unused branch", "tied weights"])
def test_after_a_ddp_it_is_the_unsharded_optimizer_bit_by_bit(case, optimizer):
    def body(group):
        args = (group, CASES[case], optimizer)
        assert digests_after_ddp(*args, shard=True) == digests_after_ddp(*args, shard=False)

    run_ranks(3, body)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_scattered_it_is_the_unsharded_optimizer_bit_by_bit(rule, size):
    expected, unsharded = alone(RULES[rule], size, 4)

    def body(group):
        model = mixture(group.rank)
        with ShardedOptimizer(
            model, group, optimizer=RULES[rule], op=SUM, sizes=BucketSizes(400, 400)
        ) as optimizer:
            for step in range(4):
                give(optimizer, whole_numbers(model, group.rank, step))
                optimizer.step()
            return values(model), full_state_dict(optimizer)

    for found, state in run_ranks(size, body):
        assert_same(found, values(expected))
        assert_same(state, unsharded.state_dict())


def test_the_mean_over_ranks_is_the_default():
    def body(group):
        model = Given(w=np.zeros(3))
        with ShardedOptimizer(model, group, optimizer=partial(SGD, lr=1.0)) as optimizer:
            give(optimizer, {"w": np.full(3, 3.0 * group.rank)})
            optimizer.step()
        return model.w.data

    for w in run_ranks(3, body):
        np.testing.assert_array_equal(w, [-3.0, -3.0, -3.0])


@pytest.mark.parametrize("per_node", [None, 1, 2, 3])
def test_there_may_be_fewer_elements_than_ranks(per_node):
    def body(group):
        model = Given(w=np.array(1.0 + group.rank), v=np.arange(2.0))
        rule = partial(SGD, lr=0.5, momentum=0.5)
        with ShardedOptimizer(model, group, optimizer=rule, op=SUM, sizes=TINY) as optimizer:
            for _ in range(2):
                give(optimizer, {"w": np.array(1.0), "v": np.ones(2)})
                optimizer.step()
        return model.w.data, model.v.data

    for w, v in run_ranks(4, body, ranks_per_node=per_node):
        # 0.5 * 4, then 0.5 * (4 + 2): rank 0's value less 5.
        np.testing.assert_array_equal(w, 1.0 - 5.0)
        np.testing.assert_array_equal(v, np.arange(2.0) - 5.0)


@pytest.mark.parametrize("dtype", [np.float16, np.complex64, np.complex128])
def test_other_dtypes(dtype):
    start = np.arange(37).astype(dtype)

    def body(group):
        model = Given(w=start)
        rule = partial(SGD, lr=0.5, momentum=0.5)
        with ShardedOptimizer(model, group, optimizer=rule, op=SUM) as optimizer:
            give(optimizer, {"w": np.full(37, group.rank, dtype)})
            optimizer.step()
        return model.w.data

    for w in run_ranks(3, body):
        np.testing.assert_array_equal(w, start - dtype(1.5), strict=True)


def test_groups_of_parameters_are_several_optimizers():
    def grouped(named):
        decayed = [(name, p) for name, p in named if name != "e"]
        return [
            AdamW(decayed, lr=0.02, weight_decay=0.1),
            AdamW([(n, p) for n, p in named if n == "e"], lr=0.01, weight_decay=0.0),
        ]

    model = mixture()
    first, second = grouped(list(model.named_parameters()))
    for step in range(3):
        for name, grad in summed(model, 3, step).items():
            getattr(model, name).zero_grad()
            getattr(model, name).add_grad(grad)
        first.step()
        second.step()

    def body(group):
        mine = mixture()
        with ShardedOptimizer(mine, group, optimizer=grouped, op=SUM) as optimizer:
            for step in range(3):
                give(optimizer, whole_numbers(mine, group.rank, step))
                optimizer.step()
            assert optimizer.state_dict()["kind"] == "AdamW+AdamW"
            state = full_state_dict(optimizer)
            load_full_state_dict(optimizer, state)
        return values(mine), state

    for found, state in run_ranks(3, body):
        assert_same(found, values(model))
        np.testing.assert_array_equal(state["e/mean"], second.state_dict()["e/mean"])


def test_the_learning_rate_follows_its_schedule():
    rate = WarmupCosine(0.5, warmup_steps=2, total_steps=6)
    expected, unsharded = alone(partial(AdamW, lr=rate), 2, 5)

    def body(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=partial(AdamW, lr=rate), op=SUM) as optimizer:
            for step in range(5):
                assert optimizer.step_count == step
                assert optimizer.lr == rate(step)
                give(optimizer, whole_numbers(model, group.rank, step))
                optimizer.step()
        return values(model)

    assert unsharded.lr == rate(5)
    for found in run_ranks(2, body):
        assert_same(found, values(expected))


def test_a_parameter_is_skipped_where_no_rank_used_it_only():
    def body(group):
        model = Given(w=np.ones(20), v=np.ones(20), u=np.ones(20))
        rule = partial(AdamW, lr=0.5, weight_decay=0.5)
        with ShardedOptimizer(model, group, optimizer=rule, op=SUM) as optimizer:
            # w by all, v by rank 1 alone, u by none: neither decayed nor counted.
            give(optimizer, {"w": np.ones(20)} | ({"v": np.ones(20)} if group.rank == 1 else {}))
            assert [shard.grad is None for shard in optimizer.shards()] == [False, False, True]
            optimizer.step()
            state = optimizer.state_dict()
        return model.w.data, model.v.data, model.u.data, state

    for w, v, u, state in run_ranks(3, body):
        np.testing.assert_allclose(w, 1 - 0.25 - 0.5, rtol=1e-7)
        np.testing.assert_allclose(v, 1 - 0.25 - 0.5, rtol=1e-7)
        np.testing.assert_array_equal(u, np.ones(20))
        assert [state[f"{name}/updates"] for name in "wvu"] == [1, 1, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("per_node", [None, 2])
def test_clipping_is_by_the_norm_of_whole_gradients(way, per_node):
    model = mixture()
    total = summed(model, 3, 0)
    norm = math.sqrt(sum(float((grad.astype(float) ** 2).sum()) for grad in total.values()))

    def clipped(model, size, step):
        return {n: g * (2.0 / norm) for n, g in summed(model, size, step).items()}

    expected, _ = alone(RULES["momentum"], 3, 1, gradients=clipped)

    def body(group):
        mine = mixture()
        source = mine if way == "scattered" else DDP(mine, group, op=SUM)
        op = SUM if way == "scattered" else None
        with ShardedOptimizer(source, group, optimizer=RULES["momentum"], op=op) as optimizer:
            give(optimizer, whole_numbers(mine, group.rank, 0))
            assert clip_grad_norm(optimizer.shards(), 2.0, group=group) == pytest.approx(norm)
            optimizer.step()
        return values(mine)

    for found in run_ranks(3, body, ranks_per_node=per_node):
        for name, array in values(expected).items():
            eps = np.finfo(array.dtype).eps
            np.testing.assert_allclose(found[name], array, rtol=8 * eps, atol=8 * eps)


def test_a_loss_scaler_looks_at_the_slices_of_all():
    def body(group):
        model = Given(w=np.zeros(64, np.float32))
        scaler = GradScaler(group, initial=8)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"], op=SUM) as optimizer:
            # The last rank's slice alone holds the infinity.
            bad = np.ones(64, np.float32)
            bad[-1] = np.inf
            give(optimizer, {"w": scaler.scale(bad)})
            assert not scaler.unscale(optimizer.shards())
            optimizer.zero_grad()
            give(optimizer, {"w": scaler.scale(np.ones(64, np.float32))})
            assert scaler.unscale(optimizer.shards())
            optimizer.step()
        return model.w.data

    for w in run_ranks(3, body):
        np.testing.assert_array_equal(w, np.full(64, -0.75, np.float32))


# -- what moves, and when --------------------------------------------------------------------------


class Telling(Given):
    """Says when its gradients enter, one after the other from the last."""

    def backward_weight(self, wctx):
        for name in reversed(list(wctx)):
            self.tell(name)
            getattr(self, name).add_grad(wctx[name])


def test_buckets_are_reduce_scattered_while_backward_runs(monkeypatch):
    events = {0: [], 1: []}
    lock = threading.Lock()

    def tell(rank, what):
        with lock:
            events[rank].append(what)

    def recorded(x, group, *, op, out, counts):
        tell(group.rank, (x.nbytes, out.nbytes, op))
        return ireduce_scatter(x, group, op=op, out=out, counts=counts)

    monkeypatch.setattr(shard_gradients, "ireduce_scatter", recorded)

    def body(group):
        model = Telling(w=np.ones(64), v=np.ones(32), u=np.ones(128))
        model.tell = partial(tell, group.rank)
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"], sizes=TINY) as optimizer:
            with optimizer.no_sync():
                give(optimizer, whole_numbers(model, group.rank, 0))
            tell(group.rank, "synchronised")
            give(optimizer, whole_numbers(model, group.rank, 1))
            optimizer.step()

    run_ranks(2, body)
    for rank in range(2):
        assert events[rank] == [
            *("u", "v", "w", "synchronised"),
            *("u", (1024, 512, MEAN), "v", (256, 128, MEAN), "w", (512, 256, MEAN)),
        ]


def test_it_waits_for_slow_messages():
    expected = train_alone(CASES["everything"], "adamw")
    args = (train_sharded, CASES["everything"], "adamw", "scattered")
    for state in run_ranks(3, *args, faults=Faults(delay=2e-3), seed=4):
        assert_close(state, expected)


def test_the_death_of_a_rank_ends_the_step_of_the_others():
    seen = []

    def body(group):
        model = mixture()
        optimizer = ShardedOptimizer(model, group, optimizer=RULES["adam"])
        try:
            for step in range(50):
                give(optimizer, whole_numbers(model, group.rank, step))
                optimizer.step()
        except PeerLostError as error:
            seen.append(error)

    run_ranks(3, body, faults=Faults(deaths=(Death(rank=1, call=150),)), timeout=10)
    assert len(seen) == 2


# -- state -----------------------------------------------------------------------------------------


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


# -- misuse ----------------------------------------------------------------------------------------


def refused(error, match, act, size=2):
    """Let every rank of a group do what must raise, and check the words."""

    def body(group):
        with pytest.raises(error, match=match):
            act(group)

    run_ranks(size, body)


def test_gradients_are_closed_until_the_step():
    def body(group):
        model = mixture()
        with ShardedOptimizer(model, group, optimizer=RULES["adam"]) as optimizer:
            give(optimizer, whole_numbers(model, group.rank, 0))
            optimizer.shards()
            with pytest.raises(RuntimeError, match=r"'a'.*in communication"):
                model.a.grad  # noqa: B018
            with pytest.raises(RuntimeError, match=r"step\(\) or zero_grad\(\) first"):
                give(optimizer, whole_numbers(model, group.rank, 0))
            optimizer.step()
            assert model.a.grad is None
            before = values(model)
            give(optimizer, whole_numbers(model, group.rank, 1))
            optimizer.zero_grad()
            optimizer.step()
            assert_same(values(model), before)

    run_ranks(2, body)


def test_local_gradients_are_not_stepped_with():
    def act(group):
        model = mixture()
        optimizer = ShardedOptimizer(model, group, optimizer=RULES["adam"])
        with optimizer.no_sync():
            give(optimizer, whole_numbers(model, group.rank, 0))
        optimizer.step()

    refused(RuntimeError, "'a' holds a gradient of this rank alone", act)


def test_a_module_has_one_sharded_optimizer():
    def act(group):
        model = mixture()
        for _ in range(2):
            ShardedOptimizer(model, group, optimizer=RULES["adam"])

    refused(ValueError, "'a' is read-only, as another ShardedOptimizer leaves it", act)


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda named: [SGD(named, lr=1), SGD(named[:1], lr=1)], r"made an optimizer of \['a'\]"),
        (lambda named: SGD([("x", named[0][1])], lr=1), r"made an optimizer of \['x'\]"),
        (lambda _: [], "made no optimizer"),
    ],
)
def test_a_factory_uses_what_it_is_given_once(factory, match):
    refused(ValueError, match, lambda g: ShardedOptimizer(mixture(), g, optimizer=factory))


def test_adam_refuses_halves_here_too():
    model = {"w": np.ones(3, np.float16)}
    refused(
        ValueError,
        "too coarse",
        lambda g: ShardedOptimizer(Given(**model), g, optimizer=RULES["adam"]),
    )


def test_the_op_of_a_ddp_is_its_own():
    def act(group):
        ShardedOptimizer(DDP(mixture(), group), group, optimizer=RULES["adam"], op=SUM)

    refused(ValueError, "op belongs to the DDP", act)


def test_a_ddp_has_the_same_ranks():
    def act(group):
        part = group.split(group.rank)
        ShardedOptimizer(DDP(mixture(), group), part, optimizer=RULES["adam"])

    refused(ValueError, "give the group that the DDP was made over", act)


def test_ranks_with_different_models_are_told():
    def act(group):
        model = Given(w=np.ones(3 + group.rank))
        ShardedOptimizer(model, group, optimizer=RULES["adam"])

    refused(CollectiveMismatchError, r"parameter 'w' is \(4,\)", act)


def test_the_modes_of_a_layer_pass_through():
    """Nothing between the module and the optimizer changes what forward returns."""

    def body(group):
        model = two_layers(0).layers[0]
        x = np.ones((2, 3))
        before, _ = model.forward(x, Mode(training=False))
        with ShardedOptimizer(model, group, optimizer=RULES["sgd"]):
            after, _ = model.forward(x, TRAINING)
        np.testing.assert_array_equal(before, after)

    run_ranks(1, body)


def test_an_empty_box_has_one_dimension():
    def body(group):
        with ShardedOptimizer(Given(w=np.ones(1)), group, optimizer=RULES["sgd"]) as optimizer:
            return optimizer.boxes()["w"]

    assert run_ranks(2, body) == [Box((0,), (1,)), Box((0,), (0,))]
