from __future__ import annotations

import math
import threading
from functools import partial

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.backends.node.memory import NodeMemory
from mpidist.collectives import ireduce_scatter
from mpidist.errors import PeerLostError
from mpidist.optim import SGD, AdamW, WarmupCosine
from mpidist.parallel import (
    DDP,
    BucketSizes,
    GradScaler,
    ShardedOptimizer,
    clip_grad_norm,
    full_state_dict,
)
from mpidist.parallel.sharded import gradients
from mpidist.testing import Death, Faults, run_ranks
from tests.parallel.checks import TINY
from tests.parallel.sharded import (
    FACTORIES,
    RULES,
    WAYS,
    Given,
    alone,
    assert_same,
    digests_after_ddp,
    give,
    mixture,
    summed,
    train_sharded,
    values,
    whole_numbers,
)
from tests.parallel.training import CASES, assert_close, train_alone

# -- equal to the unsharded optimizer --------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", FACTORIES)
@pytest.mark.parametrize("case", CASES)
def test_training_equals_one_process_on_the_joined_batch(case, optimizer, way, full):
    expected = train_alone(CASES[case], optimizer)
    for size, per_node in [(3, None), (4, 2), *([(1, None), (4, 3)] if full else [])]:
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
@pytest.mark.parametrize(("size", "memory"), [(1, True), (2, True), (3, False), (4, True)])
def test_scattered_it_is_the_unsharded_optimizer_bit_by_bit(rule, size, memory, monkeypatch):
    if not memory:
        monkeypatch.setattr(NodeMemory, "share", lambda *_: None)

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
            optimizer.load_state_dict(state)
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

    monkeypatch.setattr(gradients, "ireduce_scatter", recorded)

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


def test_the_death_of_a_rank_ends_the_step_of_the_others(monkeypatch):
    monkeypatch.setattr("mpidist.group.pending.GRACE", 0.3)
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
