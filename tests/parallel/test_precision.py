"""FSDP with parameters, reductions and outputs of other dtypes than that of the model."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist._types import SUM
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.collectives import ireduce_scatter
from mpidist.errors import CollectiveMismatchError
from mpidist.nn import Linear, Mode, cross_entropy
from mpidist.optim import SGD
from mpidist.parallel import (
    DDP,
    FSDP,
    GradScaler,
    MemoryUse,
    Precision,
    ShardedOptimizer,
    ShardingStrategy,
)
from mpidist.parallel.sharded import gradients
from mpidist.testing import run_ranks
from tests.parallel.fsdp import CASES, FACTORY, UNIT, batches, train
from tests.parallel.sharded import (
    RULES,
    Given,
    alone,
    assert_same,
    give,
    joined,
    kept,
    mixture,
    values,
    whole_numbers,
)

FULL = ShardingStrategy.FULL_SHARD
HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
MIXED = Precision(parameters=HALF, reduction=SINGLE, output=SINGLE)


def on_ranks(size, body, *args, per_node=None, **options):
    return run_ranks(size, body, *args, node_memory=True, ranks_per_node=per_node, **options)


# -- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [HALF, BFLOAT16, SINGLE])
@pytest.mark.parametrize("reduction", [HALF, BFLOAT16, SINGLE, None])
def test_every_rounding_is_that_of_the_same_steps_in_plain_numpy(parameters, reduction):
    size, lr = 2, np.float32(0.3)
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(size, 3, 8, 6)).astype(SINGLE), rng.integers(0, 5, (size, 3, 8))
    travels = parameters if reduction is None else reduction

    def body(group):
        model = Linear(6, 5, rng=1)
        precision = Precision(parameters, reduction, SINGLE)
        fsdp = FSDP(model, group, precision=precision)
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(SGD, lr=float(lr)))
        for step in range(3):
            y, ctx = fsdp.forward(x[group.rank, step], Mode(training=True))
            assert y.dtype == SINGLE
            dx = fsdp.backward(ctx, cross_entropy(y, target[group.rank, step])[1])
            assert dx.dtype == SINGLE
            optimizer.step()
        return {n: p.data.copy() for n, p in model.named_parameters()}, kept(fsdp.state_dict())

    ranks = on_ranks(size, body)

    model = Linear(6, 5, rng=1)
    w, b = model.weight.data.copy(), model.bias.data.copy()
    for step in range(3):
        small_w, small_b = w.astype(parameters), b.astype(parameters)
        dw, db = np.zeros(w.shape, SINGLE), np.zeros(b.shape, SINGLE)
        for rank in range(size):
            small_x = x[rank, step].astype(parameters)
            y = small_x @ small_w.T
            y += small_b
            dy = cross_entropy(y.astype(SINGLE), target[rank, step])[1].astype(y.dtype)
            dw += (dy.T @ small_x).astype(travels)  # numpy's product of bfloat16 is float32
            db += dy.sum(axis=0, dtype=float).astype(travels)  # layers add rows in float64
        w -= lr * (dw / np.float32(size)).astype(travels).astype(SINGLE)
        b -= lr * (db / np.float32(size)).astype(travels).astype(SINGLE)
    for seen, _ in ranks:
        assert_same(seen, {"weight": w.astype(parameters), "bias": b.astype(parameters)})
    states = joined([state for _, state in ranks])
    assert_same({name: states[name] for name in ("weight", "bias")}, {"weight": w, "bias": b})


@pytest.mark.parametrize("how", ["no_sync", "reductions"])
def test_micro_batches_are_added_in_the_dtype_of_the_reduction(how):
    """In float16 2048 + 1 is 2048."""

    def body(group):
        model = Given(w=np.zeros(64, SINGLE))
        fsdp = FSDP(model, group, precision=Precision(HALF, SINGLE))
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(SGD, lr=1.0))
        for i, value in enumerate((2048.0, 1.0, 1.0)):
            grads = {"w": np.full(64, value, HALF)}
            if how == "no_sync" and i < 2:
                with fsdp.no_sync():
                    give(optimizer, grads)
            else:
                give(optimizer, grads)
        return np.unique(np.concatenate([shard.grad for shard in fsdp.shards()]))

    assert np.concatenate(on_ranks(2, body)).tolist() == [2050.0] * 2


# -- under each strategy ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision",
    [
        MIXED,
        pytest.param(Precision(BFLOAT16), marks=pytest.mark.full),
        pytest.param(Precision(None, HALF, HALF), marks=pytest.mark.full),
    ],
)
def test_it_has_the_bits_of_the_slow_form(precision):
    trained = partial(train, case=CASES["plain"], dtype=SINGLE, precision=precision)
    expected = on_ranks(3, partial(trained, kind="naive"))[0]  # three ranks add in their order
    for kind in (FULL, ShardingStrategy.NO_SHARD):
        for got in on_ranks(3, partial(trained, kind=kind)):
            assert_same(got, expected)


@pytest.mark.parametrize("strategy", ShardingStrategy)
def test_shards_are_updated_as_an_unsharded_optimizer_does_it(strategy):
    """With whole numbers, which halves hold, and whose sums have one value in any order."""
    expected, _ = alone(RULES["adamw"], 4, 3)

    def body(group):
        model = mixture(group.rank)
        fsdp = FSDP(model, group, units=400, op=SUM, strategy=strategy, precision=Precision(HALF))
        optimizer = ShardedOptimizer(fsdp, optimizer=RULES["adamw"])
        for step in range(3):
            give(optimizer, whole_numbers(model, group.rank, step))
            optimizer.step()
        return values(model), kept(fsdp.state_dict())

    per_node = None if strategy is FULL else 2
    copies = {ShardingStrategy.NO_SHARD: 4, ShardingStrategy.HYBRID_SHARD: 2}.get(strategy, 1)
    ranks = on_ranks(4, body, per_node=per_node)
    whole = joined([state for _, state in ranks], copies)
    del whole["buckets/order"]
    assert_same(whole, values(expected))
    for seen, _ in ranks:
        assert_same(seen, {name: array.astype(HALF) for name, array in whole.items()})


# -- what stands and travels -----------------------------------------------------------------------


def test_the_node_has_halves_and_each_rank_single_precision_of_its_slice(monkeypatch):
    sent = []

    def recorded(x, group, **options):
        sent.append(x.dtype)
        return ireduce_scatter(x, group, **options)

    monkeypatch.setattr(gradients, "ireduce_scatter", recorded)

    def body(group):
        model = Linear(64, 64, rng=0, bias=False)
        fsdp = FSDP(model, group, precision=Precision(BFLOAT16, HALF))
        optimizer = ShardedOptimizer(fsdp, optimizer=FACTORY)
        y, ctx = fsdp.forward(np.ones((1, 64), SINGLE), Mode(training=True))
        optimizer.backward(ctx, np.ones_like(y))
        (shard,) = fsdp.shards()
        assert (shard.dtype, shard.grad.dtype) == (SINGLE, SINGLE)
        optimizer.step()
        assert "8 KiB  bfloat16" in repr(fsdp)
        # The reduction arrives beside the slices, since it has another dtype.
        return optimizer.memory_use()

    n, half = 64 * 64, 64 * 64 // 2
    expected = MemoryUse(2 * half + 4 * half, 4 * half, 2 * 4 * half, 2 * n, 2 * n + 2 * half)
    assert on_ranks(2, body) == [expected] * 2
    assert sent == [HALF] * 2


def test_a_checkpoint_has_what_the_optimizer_updates_and_loads_anywhere(tmp_path):
    def steps(group, kind, steps, *, load=False, save=False):
        model = CASES["plain"].build(np.random.default_rng(group.rank), SINGLE)
        if kind == "ddp":
            strategy, optimizer = DDP(model, group), FACTORY(model.named_parameters())
        else:
            strategy = FSDP(model, group, units=UNIT, precision=MIXED)
            optimizer = ShardedOptimizer(strategy, optimizer=FACTORY)
        state = {"model": strategy, "optimizer": optimizer}
        if load:
            checkpoint.load(tmp_path, state, group)
            loaded = {n: p.data.astype(SINGLE) for n, p in model.named_parameters()}
        for x, target in batches(SINGLE)[steps]:
            y, ctx = strategy.forward(x[group.rank :: group.size], Mode(training=True))
            optimizer.zero_grad()
            strategy.backward(ctx, cross_entropy(y, target[group.rank :: group.size])[1])
            optimizer.step()
        if save:
            checkpoint.save(tmp_path, state, group, step=2)
        return loaded if load and kind == "ddp" else kept(strategy.state_dict())

    through = joined(on_ranks(3, steps, "fsdp", slice(4)))
    halfway = joined(on_ranks(3, partial(steps, save=True), "fsdp", slice(2)))
    resumed = joined(on_ranks(3, partial(steps, load=True), "fsdp", slice(2, 4)))
    for state in (through, halfway, resumed):
        del state["buckets/order"]
    assert_same(resumed, through)
    assert {array.dtype for array in through.values()} == {SINGLE}
    for loaded in on_ranks(2, partial(steps, load=True), "ddp", slice(0)):
        assert_same(loaded, halfway)


def test_a_step_with_overflows_is_left_out_and_the_factor_shrinks():
    def body(group):
        model = Linear(4, 3, rng=0)
        fsdp = FSDP(model, group, precision=Precision(HALF))
        optimizer = ShardedOptimizer(fsdp, optimizer=FACTORY)
        scaler = GradScaler(group, initial=2.0**20)
        made = []
        for _ in range(12):
            before = {n: p.data.copy() for n, p in model.named_parameters()}
            y, ctx = fsdp.forward(np.full((2, 4), 1 + group.rank, SINGLE), Mode(training=True))
            with np.errstate(all="ignore"):  # layers compute with infinities
                optimizer.backward(ctx, scaler.scale(np.full(y.shape, 0.5, SINGLE)))
            made.append(scaler.unscale(optimizer.shards()))
            if made[-1]:
                optimizer.step()
            else:
                optimizer.zero_grad()
                assert_same({n: p.data for n, p in model.named_parameters()}, before)
        return made, scaler.factor

    # 0.5 * factor times two samples of 2 has to be below 65504.
    for made, factor in on_ranks(2, body):
        assert made == [False] * 6 + [True] * 6
        assert factor == 2.0**14


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [np.int32, np.complex64, "half", "float8", "single precision"])
def test_what_is_no_float_is_refused(wrong):
    if wrong == "half":
        assert Precision("half").parameters == HALF
        return
    with pytest.raises(ValueError, match="Precision: reduction must be float16, bfloat16, float"):
        Precision(reduction=wrong)


def test_ranks_with_other_dtypes_are_told_so():
    def body(group):
        with pytest.raises(
            CollectiveMismatchError,
            match=r"argument 'precision' is Precision\(parameters=float16, reduction=None, output="
            r"None\) on rank 1 and Precision\(parameters=None",
        ):
            FSDP(Linear(4, 3, rng=0), group, precision=Precision(HALF if group.rank else None))
        with pytest.raises(TypeError, match="such as Precision\\(parameters='float16'\\)"):
            FSDP(Linear(4, 3, rng=0), group, precision="float16")

    on_ranks(2, body)
