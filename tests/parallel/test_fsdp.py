"""FSDP trains as DDP does, with whatever model, batches and passes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mpidist._types import SUM
from mpidist.backends.node.memory import NodeMemory
from mpidist.collectives import ireduce_scatter
from mpidist.nn import Linear, Mode, Sequential, cross_entropy
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    BucketSizes,
    Cut,
    GradScaler,
    MemoryUse,
    Metrics,
    ShardedOptimizer,
    ShardingStrategy,
    clip_grad_norm,
    full_state_dict,
)
from mpidist.parallel.sharded import gradients
from mpidist.parallel.sharded.units import find_units
from mpidist.testing import run_ranks
from tests.parallel.fsdp import (
    CASES,
    ELEMENTS,
    SHORT,
    STRATEGIES,
    UNIT,
    batches,
    run_with_checkpoint,
    train,
)
from tests.parallel.sharded import (
    RULES,
    alone,
    assert_same,
    give,
    mixture,
    summed,
    values,
    whole_numbers,
)
from tests.parallel.training import assert_close

FULL = ShardingStrategy.FULL_SHARD
OFTEN = ("plain", "tied", "accumulated")
SELDOM = ("recomputed", "no_sync", "by names", "by predicate", "one unit", "awkward sizes")
ROUNDING = {np.float64: 1e-12, np.float32: 1e-6}


def assert_trained_alike(got, expected, *, exact, dtype=np.float64):
    if exact:
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)
    else:
        assert_close(got, expected, rtol=ROUNDING[dtype])


def on_ranks(size, case, kind, dtype=np.float64, **options):
    def body(group):
        return train(group, CASES[case], kind, dtype, **options)

    ranks = run_ranks(size, body, node_memory=True)
    for other in ranks[1:]:
        assert_trained_alike(other, ranks[0], exact=True)
    return ranks[0]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.full if c in SELDOM else ()) for c in CASES]
)
def test_it_trains_as_ddp_does(case, full):
    for size in (1, 2, 3, 4) if full else (3,):
        expected = on_ranks(size, case, "ddp")
        for strategy in STRATEGIES if full else (FULL, ShardingStrategy.NO_SHARD):
            got = on_ranks(size, case, strategy)
            assert_trained_alike(got, expected, exact=size <= CASES[case].exact)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.full) for c in CASES]
)
def test_it_trains_as_ddp_does_in_single_precision(case, full):
    for size in (1, 2, 3, 4) if full else (4,):
        expected = on_ranks(size, case, "ddp", np.float32)
        got = on_ranks(size, case, FULL, np.float32)
        exact = size <= CASES[case].exact
        assert_trained_alike(got, expected, exact=exact, dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_messages_of_cases_with_the_bits_of_ddp_are_long_enough(dtype):
    unit = ELEMENTS * np.dtype(dtype).itemsize
    for name, case in CASES.items():
        if case.exact > SHORT:
            model = case.build(np.random.default_rng(0), dtype)
            for units in (case.options.get("units", unit), BucketSizes(unit, unit)):
                assert min(u.nbytes for u in find_units(model, units)) >= 32 << 10, name


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_it_is_the_slow_form(dtype, full):
    for case in CASES if full else ("plain", "uneven, one rank empty", "recomputed"):
        if CASES[case].micro_batches == 1:
            expected = on_ranks(4, case, "naive", dtype)
            got = on_ranks(4, case, FULL, dtype)
            assert_trained_alike(got, expected, exact=CASES[case].exact >= 4, dtype=dtype)


def test_it_is_one_process_on_the_joined_batch(full):
    for case in CASES if full else ("plain", "uneven, one rank empty", "recomputed"):
        assert_close(on_ranks(4, case, FULL), on_ranks(1, case, "ddp"))


@pytest.mark.parametrize("strategy", [None, *STRATEGIES], ids=str)
def test_a_resumed_run_has_the_bits_of_one_without_a_break(strategy, tmp_path, full):
    """As long as the strategy and the number of ranks are the same; None: a DDP."""
    for size in (1, 2, 3, 4) if full else (4,):
        per_node = 2 if strategy is ShardingStrategy.HYBRID_SHARD and size == 4 else None
        on_nodes = partial(run_ranks, size, ranks_per_node=per_node, node_memory=True)
        whole, half = tmp_path / f"whole-{size}", tmp_path / f"half-{size}"
        expected = on_nodes(run_with_checkpoint, strategy, range(4), whole)
        on_nodes(run_with_checkpoint, strategy, range(2), half)
        for got in on_nodes(run_with_checkpoint, strategy, range(2, 4), half):
            assert_same(got, expected[0])


@pytest.mark.parametrize("cut", Cut)
def test_it_may_be_cut_anywhere(cut):
    expected = on_ranks(3, "no_sync", "ddp")
    got = on_ranks(3, "no_sync", FULL, cut=cut)
    assert_trained_alike(got, expected, exact=True)


class Orthogonalized(SGD):
    """Brings gradients nearer to orthogonal matrices: needs all of one, as Muon does."""

    needs_whole = True

    def step(self):
        for p in self.parameters().values():
            if p.grad is not None and p.grad.size:
                matrix = p.grad.reshape(len(p.grad), -1)
                matrix = matrix / np.linalg.norm(matrix)
                nearer = 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)
                p.data -= 0.05 * nearer.reshape(p.shape)


def test_an_optimizer_of_whole_matrices_has_the_bits_it_has_with_ddp():
    def steps(strategy, backward, optimizer, group):
        for x, target in batches(np.float64):
            rows = slice(4 * group.rank, 4 * group.rank + 4)
            y, ctx = strategy.forward(x[rows], Mode(training=True))
            optimizer.zero_grad()
            backward(ctx, cross_entropy(y, target[rows])[1])
            optimizer.step()
        return {n: p.data.copy() for n, p in strategy.named_parameters()}

    def body(group):
        model = CASES["tied"].build(np.random.default_rng(3), np.float64)
        ddp = DDP(copy.deepcopy(model), group)
        factory = partial(Orthogonalized, lr=0.0)
        expected = steps(ddp, ddp.backward, factory(ddp.named_parameters()), group)
        fsdp = FSDP(model, group, units=UNIT, cut=Cut.PARAMETERS)
        optimizer = ShardedOptimizer(fsdp, optimizer=factory)
        assert_same(steps(fsdp, optimizer.backward, optimizer, group), expected)

    run_ranks(3, body, node_memory=True)


# -- gradients -------------------------------------------------------------------------------------


def given(group, **options):
    """Return a model whose gradients are given, on every rank, and its optimizer."""
    model = mixture(group.rank)
    fsdp = FSDP(model, group, units=400, op=SUM, **options)
    return model, fsdp, ShardedOptimizer(fsdp, optimizer=RULES["momentum"])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_with_whole_numbers_it_is_the_unsharded_optimizer_bit_by_bit(size, cut, strategy):
    expected, unsharded = alone(RULES["momentum"], size, 4)

    def body(group):
        model, fsdp, optimizer = given(group, cut=cut, strategy=strategy)
        for step in range(4):
            give(optimizer, whole_numbers(model, group.rank, step))
            optimizer.step()
        found = values(model), full_state_dict(optimizer)
        fsdp.close()
        return found

    for found, state in run_ranks(size, body, node_memory=True):
        assert_same(found, values(expected))
        assert_same(state, unsharded.state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_norm_scaler_and_metrics(strategy):
    total = summed(mixture(), 3, 0)
    norm = math.sqrt(sum(float((grad.astype(float) ** 2).sum()) for grad in total.values()))

    def body(group):
        model, fsdp, optimizer = given(group, strategy=strategy)
        scaler = GradScaler(group, initial=4)
        numbers = whole_numbers(model, group.rank, 0)
        bad = {name: np.full_like(grad, np.inf) for name, grad in numbers.items()}
        give(optimizer, bad if group.rank == 1 else numbers)
        assert not scaler.unscale(optimizer.shards())
        optimizer.zero_grad()
        give(optimizer, {name: scaler.scale(grad) for name, grad in numbers.items()})
        assert scaler.unscale(fsdp.shards())
        assert fsdp.clip_grad_norm(1e9) == pytest.approx(norm)
        assert clip_grad_norm(iter(optimizer.shards()), 1e9, group=group) == pytest.approx(norm)
        metrics = Metrics(fsdp.group)
        metrics.add("loss", float(group.rank))
        assert metrics.reduce() == {"loss": 1.0}
        return {s.name: (s.part, s.grad.copy()) for s in fsdp.shards()}

    for shards in run_ranks(3, body, node_memory=True):
        for name, (part, grad) in shards.items():
            for box, piece in part.sharded(grad).pieces.items():
                np.testing.assert_array_equal(piece, total[name][box.slices])


def test_gradients_of_several_backwards_add_up_and_unused_ones_stay_none():
    def body(group):
        model, fsdp, optimizer = given(group)
        numbers = [whole_numbers(model, group.rank, step) for step in range(3)]
        for name in ("a", "f"):  # used in the second backward only, and never
            del numbers[0][name], numbers[2][name]
        del numbers[1]["f"], numbers[1]["c"]
        for step in range(3):
            give(optimizer, numbers[step])
            fsdp.shards()
        found = {}
        for shard in fsdp.shards():
            assert (shard.grad is None) == (shard.name == "f")
            if shard.grad is not None:
                found[shard.name] = shard.part, shard.grad.copy()
        optimizer.step()
        assert all(shard.grad is None for shard in fsdp.shards())
        return numbers, found

    ranks = run_ranks(3, body, node_memory=True)
    for _, shards in ranks:
        for name, (part, grad) in shards.items():
            total = sum(step[name] for each, _ in ranks for step in each if name in step)
            for box, piece in part.sharded(grad).pieces.items():
                np.testing.assert_array_equal(piece, total[box.slices], err_msg=name)


def test_ranks_may_pass_over_units_each_in_its_own_way():
    """In every step each rank uses other parameters; with some it differs who is the first."""

    def numbers_of(model, rank, step):
        numbers = whole_numbers(model, rank, step)
        used = np.random.default_rng([7, rank, step]).random(len(numbers)) < 0.5
        return {n: g for use, (n, g) in zip(used, numbers.items(), strict=True) if use}

    def total(model, size, step):
        each = [numbers_of(model, rank, step) for rank in range(size)]
        return {
            name: sum(grads[name] for grads in each if name in grads)
            for name, _ in model.named_parameters()
            if any(name in grads for grads in each)
        }

    expected, _ = alone(RULES["momentum"], 4, 8, gradients=total)

    def body(group):
        model, _, optimizer = given(group)
        for step in range(8):
            numbers = list(numbers_of(model, group.rank, step).items())
            np.random.default_rng([step, group.rank]).shuffle(numbers)
            give(optimizer, dict(numbers))
            optimizer.step()
        return values(model)

    for found in run_ranks(4, body, node_memory=True):
        assert_same(found, values(expected))


def test_a_copied_model_is_independent():
    def body(group):
        model, _, optimizer = given(group)
        give(optimizer, whole_numbers(model, group.rank, 0))
        optimizer.shards()
        copied = copy.deepcopy(model)
        before = values(copied)
        optimizer.step()
        assert_same(values(copied), before)
        copied.a.data[...] = 0
        copied.a.add_grad(np.ones((7, 5)))
        assert copied.a.grad.sum() == 35
        assert model.a.grad is None
        assert model.a.data.any()

    run_ranks(2, body, node_memory=True)


# -- memory ----------------------------------------------------------------------------------------


def layers(count):
    rng = np.random.default_rng(0)
    return Sequential(*(Linear(64, 64, rng=rng, bias=False) for _ in range(count)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ledger_says_a_share_of_all_and_two_units(size):
    unit = 4 * 64 * 64

    def body(group):
        model = layers(8)
        fsdp = FSDP(model, group, units=unit)
        assert [u.nbytes for u in fsdp.units] == [unit] * 8
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.1))
        uses = []
        for backwards in (1, 2):
            for _ in range(backwards):
                y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(training=True))
                optimizer.backward(ctx, np.ones_like(y))
            fsdp.shards()
            uses.append(optimizer.memory_use())
            optimizer.step()
        uses.append(optimizer.memory_use())
        with fsdp.no_sync():
            y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(training=True))
            fsdp.backward(ctx, np.ones_like(y))
        return uses, optimizer.memory_use()

    share, own = 8 * unit // size, unit // size
    for uses, inside in run_ranks(size, body, node_memory=True):
        first, *later = uses
        assert first == MemoryUse(share, share, 2 * share, 2 * unit, 2 * unit)
        # What is added to gradients that are there comes by way of slices of its own.
        peaks = {2 * unit + count * own for count in (1, 2)}
        for use in later:
            assert use == replace(first, peak_buffers=use.peak_buffers)
            assert use.peak_buffers in peaks
        # Whole gradients of this rank beside the buffers.
        assert inside == MemoryUse(share, share, 2 * share, 10 * unit, 10 * unit)


def test_the_memory_of_no_shard_is_that_of_ddp_and_two_units():
    def body(group):
        fsdp = FSDP(layers(4), group, units=4 * 64 * 64, strategy=ShardingStrategy.NO_SHARD)
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.1))
        return optimizer.memory_use()

    whole = 4 * 4 * 64 * 64
    assert (
        run_ranks(2, body, node_memory=True)
        == [MemoryUse(whole, whole, 2 * whole, whole // 2, whole // 2)] * 2
    )


# -- what moves, and when --------------------------------------------------------------------------


def test_a_buffer_is_written_again_when_its_unit_has_been_reduced(monkeypatch):
    events, addresses = [], []

    class Watched(Linear):
        def backward_weight(self, wctx):
            address = self.weight.first_grad().ctypes.data
            addresses.append(address)
            events.append(("written", self.name, address - addresses[0]))
            super().backward_weight(wctx)

    def sent(x, group, **options):
        work = ireduce_scatter(x, group, **options)
        number = sum(event[0] == "sent" for event in events)
        events.append(("sent", number))
        finish = work.wait

        def wait(timeout=None):
            if ("reduced", number) not in events:
                events.append(("reduced", number))
            return finish(timeout)

        work.wait = wait
        work.done = lambda: False
        return work

    monkeypatch.setattr(gradients, "ireduce_scatter", sent)

    def body(group):
        rng = np.random.default_rng(0)
        model = Sequential(*(Watched(64, 64, rng=rng, bias=False) for _ in range(4)))
        for name, layer in zip("dcba", model.layers, strict=True):
            layer.name = name
        fsdp = FSDP(model, group, units=4 * 64 * 64)
        y, ctx = fsdp.forward(np.ones((1, 64), np.float32), Mode(training=True))
        fsdp.backward(ctx, np.ones_like(y))

    run_ranks(1, body)
    second = 4 * 64 * 64
    assert events == [
        *(("written", "a", 0), ("sent", 0)),
        *(("written", "b", second), ("sent", 1)),
        *(("reduced", 0), ("written", "c", 0), ("sent", 2)),
        *(("reduced", 1), ("written", "d", second), ("sent", 3)),
        *(("reduced", 2), ("reduced", 3)),
    ]


@pytest.mark.parametrize(("size", "per_node"), [(4, 2), (3, 2)])
@pytest.mark.parametrize("case", ["plain", "tied", "uneven, one rank empty"])
def test_over_nodes_parameters_stand_once_on_each(case, size, per_node):
    def body(group, kind):
        return train(group, CASES[case], kind)

    expected = run_ranks(size, body, "ddp", ranks_per_node=per_node, node_memory=True)[0]
    for strategy in (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for got in run_ranks(size, body, strategy, ranks_per_node=per_node, node_memory=True):
            assert_close(got, expected)


def test_where_no_memory_is_shared_every_rank_has_the_parameters(monkeypatch):
    monkeypatch.setattr(NodeMemory, "share", lambda *_: None)
    for got in run_ranks(3, train, CASES["plain"], FULL):
        assert_close(got, on_ranks(1, "plain", "ddp"))
