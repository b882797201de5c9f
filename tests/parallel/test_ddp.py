from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.backends.verbs import AllReduce
from mpidist.group.operations import Operations
from mpidist.nn import BatchNorm2d, Linear, Module, ReLU, Sequential
from mpidist.optim import SGD
from mpidist.parallel import DDP, BucketSizes
from mpidist.testing import Faults, run_ranks
from tests.parallel.checks import TINY, TRAINING, Scale, check_running, train_norm
from tests.parallel.training import Routed, digest


def two_layers(seed=0):
    rng = np.random.default_rng(seed)
    return Sequential(
        Linear(3, 2, rng=rng, bias=False, dtype=np.float64),
        Linear(2, 5, rng=rng, bias=False, dtype=np.float64),
    )


def samples(rank, count=4):
    return np.random.default_rng(100 + rank).normal(size=(count, 3))


def test_all_ranks_begin_with_rank_0s_parameters_and_buffers():
    def body(group):
        norm = BatchNorm2d(2, dtype=np.float64)
        norm.running_mean[...] = group.rank + 7
        model = Sequential(two_layers(seed=group.rank), norm)
        DDP(model, group).close()
        return model.state_dict()

    first = two_layers(seed=0)
    for state in run_ranks(3, body):
        np.testing.assert_array_equal(state["0.0.weight"], first.layers[0].weight.data)
        np.testing.assert_array_equal(state["0.1.weight"], first.layers[1].weight.data)
        np.testing.assert_array_equal(state["1.running_mean"], [7.0, 7.0])


def test_gradients_are_the_buckets_own_memory():
    def body(group):
        model = two_layers()
        with DDP(model, group) as ddp:
            _, ctx = ddp.forward(samples(group.rank), TRAINING)
            ddp.backward(ctx, np.ones((4, 5)))
            for name, p in model.named_parameters():
                assert p.grad is ddp._reducer.grads[name]
            (bucket,) = ddp._reducer._buckets
            assert all(np.shares_memory(p.grad, bucket.data) for p in model.parameters())
            # Forgetting gradients is a matter of flags.
            before = bucket.data.copy()
            model.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            np.testing.assert_array_equal(bucket.data, before)

    run_ranks(2, body)


class Marked(Module):
    """Tells when the backward pass of its inner layer begins."""

    def __init__(self, inner, tell):
        self.inner = inner
        self.tell = tell

    def forward(self, x, mode):
        return self.inner.forward(x, mode)

    def backward_input(self, ctx, dy):
        self.tell()
        return self.inner.backward_input(ctx, dy)

    def backward_weight(self, wctx):
        self.inner.backward_weight(wctx)


def test_buckets_travel_while_backward_runs(monkeypatch):
    events: dict[int, list] = {0: [], 1: []}
    lock = threading.Lock()

    def tell(rank, what):
        with lock:
            events[rank].append(what)

    start = Operations.start

    def recorded(operations, call, finish, timeout=None):
        if isinstance(call, AllReduce):
            tell(operations.state.rank, ("all_reduce", call.x.nbytes, call.op))
        return start(operations, call, finish, timeout)

    monkeypatch.setattr(Operations, "start", recorded)

    def body(group):
        sizes = [8, 16, 24, 8]
        layers = [
            Marked(
                Linear(a, b, rng=0, bias=False, dtype=np.float64),
                lambda i=i: tell(group.rank, f"backward {i}"),
            )
            for i, (a, b) in enumerate(pairwise(sizes))
        ]
        with DDP(Sequential(*layers), group, sizes=BucketSizes(first=1, rest=2000)) as ddp:
            with ddp.no_sync():
                y, ctx = ddp.forward(np.ones((2, 8)), TRAINING)
                ddp.backward(ctx, y)
            tell(group.rank, "synchronised")
            _, work = ddp.ibackward(ctx, y)
            tell(group.rank, "returned")
            work.wait()
            assert work.done()

    run_ranks(2, body)
    assert events[0] == events[1]
    assert events[0] == [
        "backward 2",
        "backward 1",
        "backward 0",
        "synchronised",
        "backward 2",
        ("all_reduce", 24 * 8 * 8, MEAN),
        "backward 1",
        ("all_reduce", 16 * 24 * 8, MEAN),
        "backward 0",
        # 3 flags behind the last one: who was used.
        ("all_reduce", 8 * 16 * 8 + 3 * 8, MEAN),
        "returned",
    ]


def test_ibackward_returns_the_input_gradient_and_a_work():
    def body(group):
        model, x = two_layers(), samples(group.rank)
        with DDP(model, group, sizes=TINY) as ddp:
            _, ctx = ddp.forward(x, TRAINING)
            dx, work = ddp.ibackward(ctx, np.ones((4, 5)))
            while not work.done():
                pass
            grads = [p.grad.copy() for p in model.parameters()]  # done() is enough
            work.wait()
            work.wait()
            for before, p in zip(grads, model.parameters(), strict=True):
                np.testing.assert_array_equal(before, p.grad)
            return dx, grads

    w0, w1 = (p.data for p in two_layers().parameters())
    dy = np.ones((4, 5))
    results = run_ranks(3, body, faults=Faults(delay=1e-3))
    mean0 = sum((dy @ w1).T @ samples(rank) for rank in range(3)) / 3
    for rank, (dx, grads) in enumerate(results):
        np.testing.assert_allclose(dx, dy @ w1 @ w0, rtol=1e-12)
        np.testing.assert_allclose(grads[0], mean0, rtol=1e-12)
        assert rank < 3


def test_a_parameter_unused_everywhere_has_no_gradient_and_is_not_updated():
    def body(group):
        model = Sequential(
            two_layers(), Routed(Linear(5, 5, rng=1, dtype=np.float64), float(group.rank))
        )
        branch = model.layers[1].branch
        with DDP(model, group, sizes=TINY) as ddp:
            opt = SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            seen = []
            for dy_scale in (0.0, 1.0):
                # On what comes out of the layers, only rank 0 can pass its threshold of 0.
                x = samples(0) * dy_scale
                opt.zero_grad()
                y, ctx = ddp.forward(x, TRAINING)
                before = branch.weight.data.copy()
                ddp.backward(ctx, np.ones_like(y))
                opt.step()
                seen.append((branch.weight.grad is None, (branch.weight.data == before).all()))
        return seen, digest(model)

    results = run_ranks(2, body)
    assert results[0] == results[1]
    assert results[0][0] == [(True, True), (False, False)]


def test_a_branch_used_by_some_ranks_is_averaged_with_zeros():
    def body(group):
        used, unused = Scale(), Scale()
        threshold = 0.0 if group.rank == 1 else np.inf
        model = Sequential(used, Routed(unused, threshold))
        with DDP(model, group, sizes=TINY) as ddp:
            _, ctx = ddp.forward(np.full((1, 1), 6.0), TRAINING)
            ddp.backward(ctx, np.ones((1, 1)))
        return float(used.w.grad), float(unused.w.grad)

    # Rank 1 doubles its input: its gradients are 12 and 6, the others' 6 and none.
    assert run_ranks(3, body) == [(8.0, 2.0)] * 3


def test_no_sync_is_undone_by_an_error_and_can_be_nested():
    def body(group):
        model = Sequential(Scale())
        with DDP(model, group) as ddp:
            with pytest.raises(KeyError), ddp.no_sync():
                raise KeyError
            with ddp.no_sync():
                with ddp.no_sync():
                    pass
                _, ctx = ddp.forward(np.full((1, 1), group.rank + 1.0), TRAINING)
                ddp.backward(ctx, np.ones((1, 1)))
                local = float(model.layers[0].w.grad)
            _, ctx = ddp.forward(np.full((1, 1), group.rank + 1.0), TRAINING)
            ddp.backward(ctx, np.ones((1, 1)))
        return local, float(model.layers[0].w.grad)

    assert run_ranks(2, body) == [(1.0, 3.0), (2.0, 3.0)]


def test_what_earlier_micro_batches_gave_is_sent_by_one_that_gives_nothing():
    def body(group):
        scale = Scale()
        model = Sequential(Scale(), Routed(scale, 0.5))
        with DDP(model, group, sizes=TINY) as ddp:
            with ddp.no_sync():
                _, ctx = ddp.forward(np.full((1, 1), 4.0), TRAINING)
                ddp.backward(ctx, np.ones((1, 1)))
            _, ctx = ddp.forward(np.full((1, 1), 0.1), TRAINING)
            assert scale.w not in ctx.uses
            ddp.backward(ctx, np.ones((1, 1)))
        return float(scale.w.grad)

    assert run_ranks(2, body) == [4.0, 4.0]


def test_a_mean_may_be_accumulated_over_synchronised_backwards_too():
    def body(group):
        scale = Scale()
        with DDP(scale, group) as ddp:
            for step in (1, 2):
                _, ctx = ddp.forward(np.full(1, step * (group.rank + 1.0)), TRAINING)
                ddp.backward(ctx, np.ones(1))
        return float(scale.w.grad)

    assert run_ranks(2, body) == [4.5, 4.5]


def test_a_sum_must_be_zeroed_first():
    def body(group):
        scale = Scale()
        with DDP(scale, group, op=SUM) as ddp:
            _, ctx = ddp.forward(np.full(1, group.rank + 1.0), TRAINING)
            ddp.backward(ctx, np.ones(1))
            for where in (nullcontext(), ddp.no_sync()):
                with where, pytest.raises(RuntimeError, match=r"'w' still .* inside no_sync"):
                    ddp.backward(ctx, np.ones(1))
            scale.zero_grad()
            with ddp.no_sync():
                ddp.backward(ctx, np.ones(1))
            ddp.backward(ctx, np.ones(1))
        return float(scale.w.grad)

    assert run_ranks(2, body) == [6.0, 6.0]


def test_several_passes_may_be_forward_before_the_first_goes_backward():
    def body(group):
        scale = Scale(times=2)
        with DDP(scale, group) as ddp:
            contexts = [ddp.forward(np.full(1, float(i)), TRAINING)[1] for i in (1, 2, 3)]
            with ddp.no_sync():
                ddp.backward(contexts[2], np.ones(1))
                ddp.backward(contexts[0], np.ones(1))
            ddp.backward(contexts[1], np.ones(1))
        return float(scale.w.grad)

    assert run_ranks(2, body) == [12.0, 12.0]


# -- buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_running_statistics_are_rank_0s_after_each_step(size):
    check_running(run_ranks(size, train_norm, faults=Faults(delay=1e-3)))


def test_buffers_stay_local_inside_no_sync():
    def body(group):
        norm = BatchNorm2d(2, dtype=np.float64)
        with DDP(Sequential(norm), group) as ddp, ddp.no_sync():
            x = np.random.default_rng(group.rank).normal(size=(3, 2, 2, 2))
            y, ctx = ddp.forward(x, TRAINING)
            ddp.backward(ctx, y)
        return norm.running_mean.tolist()

    first, second = run_ranks(2, body)
    assert first != second


def test_an_optimizer_takes_it_and_it_shows_its_model():
    def body(group):
        model = Sequential(Linear(2, 3, rng=0), ReLU())
        with DDP(model, group) as ddp:
            assert list(ddp.parameters()) == list(model.parameters())
            state = SGD(ddp, lr=0.1).state_dict()
            assert {"0.weight/updates", "0.bias/updates"} <= state.keys()
            shown = repr(ddp).splitlines()
            assert shown[0] == f"DDP over {ddp.group!r}:"
            assert shown[1:] == repr(model).splitlines()
            with pytest.raises(TypeError, match=r"y, ctx = model\.forward\(x, Mode"):
                ddp(np.ones((1, 2)))
        with pytest.raises(TypeError, match=r"expected DDP\(model, group\), got a ProcessGroup"):
            DDP(group, model)

    run_ranks(2, body)
