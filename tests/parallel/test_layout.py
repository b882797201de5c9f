"""The order in which gradients really come decides where they lie, after the first step."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.backends.verbs import AllReduce
from mpidist.collectives import barrier
from mpidist.group import ProcessGroup
from mpidist.group.operations import Operations
from mpidist.nn import Linear, Module, Sequential
from mpidist.nn.module import Context, count_uses
from mpidist.optim import SGD
from mpidist.parallel import DDP, BucketSizes, Compression, GradientReducer, ShardedOptimizer
from mpidist.parallel.data import compression
from mpidist.testing import run_ranks
from tests.parallel.checks import SHAPES, TINY, TRAINING, Scale, gradient, likes, total
from tests.parallel.training import Routed


class Chain(Module):
    """Multiplies by the weights of `order`, whatever the order in which they are defined."""

    def __init__(self, names, order, dtypes=None):
        for name in names:
            setattr(self, name, Scale())
            if dtypes is not None:
                parameter = getattr(self, name).w
                parameter.data = parameter.data.astype(dtypes[name])
        self.order = order

    def forward(self, x, mode):
        contexts = []
        for name in self.order:
            x, ctx = getattr(self, name).forward(x, mode)
            contexts.append(ctx)
        return x, Context(contexts, count_uses(*contexts))

    def backward(self, ctx, dy):
        for name, layer_ctx in zip(reversed(self.order), reversed(ctx.saved), strict=True):
            dy = getattr(self, name).backward(layer_ctx, dy)
        return dy

    def backward_input(self, ctx, dy):
        raise NotImplementedError

    def backward_weight(self, wctx):
        raise NotImplementedError


def step(ddp, x=1.0):
    _, ctx = ddp.forward(np.full((1, 1), x), TRAINING)
    ddp.backward(ctx, np.ones((1, 1)))


def layout(ddp):
    """Return the names in each bucket, without their last letters `.w`."""
    return ["".join(name[0] for name in bucket.grads) for bucket in ddp._reducer._buckets]


def test_buckets_start_early_from_the_second_step_on_where_the_first_guess_was_wrong(monkeypatch):
    events: list = []

    start = Operations.start

    def recorded(operations, call, finish, timeout=None):
        if operations.state.rank == 0 and isinstance(call, AllReduce):
            events.append(call.x.size)
        return start(operations, call, finish, timeout)

    monkeypatch.setattr(Operations, "start", recorded)

    class Told(Scale):
        def backward_weight(self, wctx):
            super().backward_weight(wctx)
            events.append("backward")

    def body(group):
        model = Chain("abc", "cba")
        if group.rank == 0:
            for name in "abc":
                getattr(model, name).__class__ = Told
        with DDP(model, group, sizes=TINY) as ddp:
            step(ddp)
            first = layout(ddp)
            events.append("step") if group.rank == 0 else None
            step(ddp)
            return first, layout(ddp)

    # The guess is that `c`, defined last, has its gradient first; it comes last.
    assert run_ranks(2, body) == [(["a", "b", "c"],) * 2] * 2
    before, after = events[: events.index("step")], events[events.index("step") + 1 :]
    line = 8  # a gradient of one number takes a cache line
    assert before == ["backward", "backward", line, line, line + 3, "backward"]
    assert after == [line, "backward", line, "backward", line + 3, "backward"]


def test_the_order_is_rank_0s_on_all_ranks():
    def body(group):
        orders = ("cabed", "edcba", "abcde")
        with DDP(Chain("abcde", orders[group.rank]), group, sizes=TINY) as ddp:
            results = []
            for x in (group.rank + 1.0, 3.0 - group.rank):
                ddp.module.zero_grad()
                step(ddp, x)
                results.append([float(p.grad) for p in ddp.module.parameters()])
            return layout(ddp), results

    assert run_ranks(3, body) == [(list("debac"), [[2.0] * 5] * 2)] * 3


@pytest.mark.parametrize("how", [None, Compression.FP16])
def test_gradients_move_with_their_buckets(how):
    def body(group):
        model = Chain("abc", "cba")
        with DDP(model, group, sizes=TINY, compression=how) as ddp:
            seen = []
            with ddp.no_sync():
                step(ddp, 1.0)
            for x in (group.rank + 1.0, 1.0, 2.0):  # what is there is added to
                step(ddp, x)
                grads = [p.grad for p in model.parameters()]
                assert all(
                    grad is ddp._reducer.grads[name]
                    for grad, name in zip(grads, ddp._reducer.grads, strict=True)
                )
                seen.append([float(grad) for grad in grads])
            return layout(ddp), seen

    expected = [[2.5] * 3, [3.5] * 3, [5.5] * 3]
    assert run_ranks(2, body) == [(["a", "b", "c"], expected)] * 2


def test_the_same_memory_holds_every_layout(monkeypatch):
    made = []
    empty = ProcessGroup.empty

    def counted(group, shape, dtype=np.float32):
        made.append(shape)
        return empty(group, shape, dtype)

    monkeypatch.setattr(ProcessGroup, "empty", counted)

    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
            memory = ddp._reducer._memory._memory[np]
            for _ in range(3):
                step(ddp)
                arrays = [p.grad for p in ddp.module.parameters()]
                assert all(np.shares_memory(array, memory) for array in arrays)
            assert not any(
                np.shares_memory(one, other)
                for one in arrays
                for other in arrays
                if one is not other
            )

    run_ranks(1, body)
    assert len(made) == 1


def test_gradients_that_did_not_come_in_the_first_step_are_expected_last():
    def body(group):
        routed = {name: Routed(Scale(), np.inf) for name in "bd"}
        model = Chain("abcde", "edcba")
        for name, layer in routed.items():
            setattr(model, name, layer)
        model.relabel()
        with DDP(model, group, sizes=TINY) as ddp:
            step(ddp)
            first = layout(ddp)
            for layer in routed.values():
                layer.threshold = 0.0
            model.zero_grad()
            step(ddp, group.rank + 1.0)
            return first, layout(ddp), {n[0]: float(p.grad) for n, p in model.named_parameters()}

    first = ["a", "c", "e", "d", "b"]
    # Both routed layers double their input.
    grads = {"a": 6.0, "b": 3.0, "c": 6.0, "d": 3.0, "e": 6.0}
    assert run_ranks(2, body) == [(first, first, grads)] * 2


def test_beside_a_hook_the_first_layout_stays():
    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY, compression=compression.plain) as ddp:
            step(ddp)
            step(ddp)
            return layout(ddp)

    assert run_ranks(2, body) == [["c", "b", "a", ""]] * 2  # and the flags


def test_scattered_buckets_start_in_the_order_of_arrival_and_keep_their_gradients():
    def body(group):
        model = Chain("abc", "cba")
        sizes = BucketSizes(first=8, rest=16)
        with ShardedOptimizer(model, group, optimizer=factory, sizes=sizes) as optimizer:
            for _ in range(2):
                _, ctx = model.forward(np.ones(()), TRAINING)
                optimizer.backward(ctx, np.ones(()))
                optimizer.step()
            fsdp = optimizer.model_state._model
            sent = [list(unit.parameters) for unit in fsdp._unit_gradients._plan]
            return sent, fsdp.order, optimizer.model_state.state_dict()["buckets/order"]

    factory = partial(SGD, lr=1.0)
    names = ("a.w", "b.w", "c.w")
    # b and a share a bucket, which is complete before c's.
    assert run_ranks(2, body) == [([["b.w", "a.w"], ["c.w"]], names, list(names))] * 2


def test_each_dtype_keeps_its_buckets():
    dtypes = dict(zip("abcd", ("f4", "f8", "f4", "f8"), strict=True))

    def body(group):
        model = Chain("abcd", "dbca", dtypes)
        with DDP(model, group, sizes=BucketSizes(first=1000, rest=1000)) as ddp:
            results = []
            for _ in range(2):
                model.zero_grad()
                step(ddp, group.rank + 1.0)
                results.append(
                    {n[0]: (float(p.grad), str(p.grad.dtype)) for n, p in model.named_parameters()}
                )
            return layout(ddp), results

    grads = {name: (1.5, np.dtype(dtype).name) for name, dtype in dtypes.items()}
    assert run_ranks(2, body) == [(["ac", "bd"], [grads, grads])] * 2


def test_polling_for_the_first_step_does_not_wait_for_another_rank():
    def body(group):
        with DDP(Chain("abc", "cba"), group, sizes=TINY) as ddp:
            _, ctx = ddp.forward(np.ones((1, 1)), TRAINING)
            _, work = ddp.ibackward(ctx, np.ones((1, 1)))
            if group.rank:
                for _ in range(1000):
                    work.done()
            barrier(group)  # rank 0 comes here before it polls at all
            work.wait()
            return layout(ddp)

    assert run_ranks(2, body) == [["a", "b", "c"]] * 2


# -- the reducer ---------------------------------------------------------------------------------


def test_a_reducer_lays_out_anew_when_told_to():
    def body(group):
        with GradientReducer(likes(), group, op=SUM, sizes=TINY) as reducer:
            for turn, order in enumerate(("cabed", "edcba", "abcde")):
                for name in order:
                    reducer.grads[name][...] = gradient(name, group.rank, turn)
                    reducer.ready(name)
                assert reducer.arrivals() == list(order)
                reducer.wait()
                before = dict(reducer.grads)
                reducer.relayout(list(order))
                assert [*reducer._bucket_of] == list(order)
                for name in SHAPES:
                    np.testing.assert_array_equal(
                        reducer.grads[name], total(name, group.size, turn)
                    )
                reducer.relayout(list(order))
                assert turn == 1 or any(reducer.grads[n] is not before[n] for n in SHAPES)

    run_ranks(2, body)


def test_arrivals_name_what_was_skipped_last():
    def body(group):
        with GradientReducer(likes(), group) as reducer:
            reducer.skip("b")
            reducer.ready("d")
            assert reducer.arrivals() == ["d", "e", "c", "b", "a"]
            for name in "eac":
                reducer.ready(name)
            assert reducer.arrivals() == ["d", "e", "a", "c", "b"]
            reducer.wait()
            assert reducer.arrivals() == ["e", "d", "c", "b", "a"]

    run_ranks(1, body)


def test_a_layout_of_other_names_or_in_the_middle_of_a_step_is_refused():
    def body(group):
        with GradientReducer(likes(), group) as reducer:
            for order in ("abcd", "abcdd", "abcdef"):
                with pytest.raises(ValueError, match="every name once"):
                    reducer.relayout(list(order))
            reducer.ready("a")
            with pytest.raises(RuntimeError, match="1 gradients have come already"):
                reducer.relayout(list("edcba"))
            for name in "bcde":
                reducer.ready(name)
            reducer.wait()

    run_ranks(1, body)


# -- progress ------------------------------------------------------------------------------------


def test_communication_makes_progress_between_layers_without_parameters():
    over: dict[int, list[bool]] = {0: [], 1: []}
    lock = threading.Lock()

    class Probe(Module):
        """Sees how far the first bucket is, without helping it on."""

        def __init__(self, rank):
            self.rank, self.ddp = rank, []

        def forward(self, x, mode):
            return x, Context(None)

        def backward_input(self, ctx, dy):
            time.sleep(2e-3)
            with lock:
                work = self.ddp[0]()._reducer._buckets[0].work
                over[self.rank].append(work._over)
            return dy, None

        def backward_weight(self, wctx):
            pass

    def body(group):
        probes = [Probe(group.rank) for _ in range(50)]
        with DDP(Sequential(Scale(), *probes, Scale()), group, sizes=TINY) as ddp:
            for probe in probes:
                probe.ddp.append(lambda: ddp)
            step(ddp)
            assert not any("_after_backward" in vars(probe) for probe in probes)

    run_ranks(2, body)
    assert all(seen[-1] for seen in over.values())


def test_linear_layers_come_weight_first():
    def body(group):
        model = Sequential(Linear(4, 4, rng=0), Linear(4, 4, rng=1))
        with DDP(model, group, op=MEAN, sizes=TINY) as ddp:
            _, ctx = ddp.forward(np.ones((1, 4), np.float32), TRAINING)
            ddp.backward(ctx, np.ones((1, 4), np.float32))
            return [*ddp._reducer._bucket_of]

    assert run_ranks(1, body) == [["1.weight", "1.bias", "0.weight", "0.bias"]]
