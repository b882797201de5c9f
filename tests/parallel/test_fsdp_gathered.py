"""FSDP where parameters are gathered: over several nodes, or without memory to share."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest

import mpidist
from mpidist.backends.node.memory import NodeMemory
from mpidist.collectives import all_gather_object
from mpidist.nn import Linear, Mode, Module, Parameter, Recompute, ReLU, Sequential
from mpidist.nn.module import Context, count_uses
from mpidist.optim import AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    Cut,
    MemoryUse,
    Precision,
    ShardedOptimizer,
    ShardingStrategy,
)
from mpidist.parallel.sharded.gathers import UnitGathers
from mpidist.parallel.sharded.unit_store import UnitStore
from mpidist.testing import DeliveryMode, Faults, run_ranks
from tests.parallel.fsdp import CASES, run_with_checkpoint, train
from tests.parallel.sharded import assert_same
from tests.parallel.training import assert_close

FULL = ShardingStrategy.FULL_SHARD
TRAIN = Mode(training=True)
OFTEN = ("tied", "unused", "halves")
UNIT = 4 * 64 * 64


def on_nodes(size, per_node, body, *args, **options):
    return run_ranks(size, body, *args, ranks_per_node=per_node, node_memory=True, **options)


# -- it is DDP -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.full) for c in CASES]
)
def test_it_trains_as_ddp_does(case, full):
    # Two nodes of two ranks, a rank on each of three, and nodes with different numbers of ranks.
    for size, per_node in ((4, 2), (3, 1), (5, 3)) if full else ((3, 2),):
        expected = on_nodes(size, per_node, train, CASES[case], "ddp")[0]
        for prefetch in (0, 1, 2) if full else (1,):
            body = partial(train, case=CASES[case], kind=FULL, prefetch=prefetch)
            ranks = on_nodes(size, per_node, body)
            for got in ranks:
                assert_close(got, expected)
                assert_same(got, ranks[0])


PRECISIONS = {
    "float64": Precision(),
    "float16 beside float64": Precision("float16", "float32", "float64"),
    "float32 that travels as float16": Precision("float32", "float16", "float64"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gathered_it_has_the_bits_of_what_stands_whole_on_each_node(precision):
    options = {"case": CASES["tied"], "precision": PRECISIONS[precision]}
    for size, per_node in ((4, 2), (3, 2)):
        whole = partial(train, kind=ShardingStrategy.SHARD_GRAD_OP, **options)
        expected = on_nodes(size, per_node, whole)[0]
        for got in on_nodes(size, per_node, partial(train, kind=FULL, **options)):
            assert_same(got, expected)


@pytest.mark.parametrize("cut", [Cut.ELEMENTS, Cut.PARAMETERS])
def test_units_may_be_cut_anywhere(cut):
    expected = on_nodes(4, 2, train, CASES["tied"], "ddp")[0]
    for got in on_nodes(4, 2, partial(train, case=CASES["tied"], kind=FULL, cut=cut)):
        assert_close(got, expected)


@pytest.mark.full
@pytest.mark.parametrize("mode", DeliveryMode)
def test_messages_may_come_late(mode):
    late = {"mode": mode, "faults": Faults(delay=0.01)}
    expected = on_nodes(4, 2, train, CASES["plain"], "ddp")[0]
    for got in on_nodes(4, 2, train, CASES["plain"], FULL, **late):
        assert_close(got, expected)


def test_where_no_memory_is_shared_every_rank_gathers(monkeypatch):
    expected = run_ranks(3, train, CASES["plain"], "ddp")[0]
    monkeypatch.setattr(NodeMemory, "share", lambda *_: None)
    for per_node in (None, 2):
        for got in run_ranks(3, train, CASES["plain"], FULL, ranks_per_node=per_node):
            assert_close(got, expected)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "tied" else pytest.mark.full) for c in CASES]
)
def test_on_pretended_nodes_it_trains_as_ddp_does(world, monkeypatch, case):
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", "2")
    with mpidist.init("mpi", timeout=20) as nodes:
        assert nodes.num_nodes == 2
        expected = train(nodes, CASES[case], "ddp")
        got = train(nodes, CASES[case], FULL)
        assert_close(got, expected)
        for theirs in all_gather_object(got, nodes):
            assert_same(theirs, got)


@pytest.mark.parametrize(
    ("saves", "loads"),
    [(FULL, None), *(pytest.param(saves, FULL, marks=pytest.mark.full) for saves in (None, FULL))],
)
def test_a_run_goes_on_from_the_checkpoint_of_another(saves, loads, tmp_path):
    expected = on_nodes(4, 2, run_with_checkpoint, None, range(4), tmp_path / "whole")[0]
    on_nodes(4, 2, run_with_checkpoint, saves, range(2), tmp_path / "half")
    for got in on_nodes(4, 2, run_with_checkpoint, loads, range(2, 4), tmp_path / "half"):
        assert_close(got, expected)


# -- memory ----------------------------------------------------------------------------------------


def layers(count):
    rng = np.random.default_rng(0)
    return Sequential(*(Linear(64, 64, rng=rng, bias=False) for _ in range(count)))


@pytest.mark.parametrize(("per_node", "prefetch"), [(2, 1), (1, 1), (2, 0), (2, 3)])
def test_the_ledger_says_a_share_of_all_and_slots_once_per_node(per_node, prefetch):
    def body(group):
        fsdp = FSDP(layers(8), group, units=UNIT, prefetch=prefetch)
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.1))
        for _ in range(2):
            y, ctx = fsdp.forward(np.ones((1, 64), np.float32), TRAIN)
            optimizer.backward(ctx, np.ones_like(y))
            optimizer.step()
        return optimizer.memory_use()

    share, buffers = 8 * UNIT // 4, 2 * UNIT + (1 + prefetch) * UNIT // per_node
    expected = MemoryUse(share, share, 2 * share, buffers, buffers)
    assert on_nodes(4, per_node, body) == [expected] * 4


# -- what is gathered, and when --------------------------------------------------------------------


def watch(monkeypatch, rank=0):
    """Return the list of what this rank starts to gather and enters, and of all it then holds."""
    events, held = [], []
    start, enter = UnitStore.start, UnitGathers._unshard

    def started(self, stage, keep):
        start(self, stage, keep)
        if self._group.ranks[self._group.rank] == rank:
            events.append(f"gather {stage}")
            held.append(sum(h is not None for h in self._held))

    def entered(self, stage):
        enter(self, stage)
        if self._group.ranks[self._group.rank] == rank:
            events.append(f"enter {stage}")

    monkeypatch.setattr(UnitStore, "start", started)
    monkeypatch.setattr(UnitGathers, "_unshard", entered)
    return events, held


def step(fsdp, optimizer):
    y, ctx = fsdp.forward(np.ones((2, 64), np.float32), TRAIN)
    optimizer.backward(ctx, np.ones_like(y))
    optimizer.step()


def test_the_next_unit_is_gathered_while_one_computes(monkeypatch):
    events, held = watch(monkeypatch)

    def body(group):
        fsdp = FSDP(layers(4), group, units=UNIT)
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.1))
        step(fsdp, optimizer)

    on_nodes(2, 1, body)
    # Before a unit's modules run, the next one is under way; after forward, 2 and 3 are still here.
    forward = "gather 0, gather 1, enter 0, gather 2, enter 1, gather 3, enter 2, enter 3"
    backward = "enter 3, gather 1, enter 2, gather 0, enter 1, enter 0"
    assert max(held) == 2
    assert events == [*forward.split(", "), *backward.split(", ")]


class Routed(Module):
    """Runs those of its blocks that `route(step)` lists, in its order."""

    def __init__(self, blocks, route):
        self.blocks = list(blocks)
        self.route = route

    def forward(self, x, mode):
        contexts = []
        for index in self.route(mode.step):
            x, ctx = self.blocks[index].forward(x, mode)
            contexts.append((index, ctx))
        return x, Context(contexts, count_uses(*(ctx for _, ctx in contexts)))

    def backward(self, ctx, dy):
        for index, inner in reversed(ctx.saved):
            dy = self.blocks[index].backward(inner, dy)
        return dy

    def backward_input(self, ctx, dy):
        inner = []
        for index, context in reversed(ctx.saved):
            dy, wctx = self.blocks[index].backward_input(context, dy)
            inner.append((index, wctx))
        return dy, inner

    def backward_weight(self, wctx):
        for index, inner in wctx:
            self.blocks[index].backward_weight(inner)


def blocks(count, width=24):
    rng = np.random.default_rng(0)
    return [Linear(width, width, rng=rng) for _ in range(count)]


def train_routed(group, route, kind, wrap=lambda block: block, width=24, **options):
    """Train, each rank along its own route in each step; the gradients are a function of those."""
    model = Routed(map(wrap, blocks(5, width)), partial(route, group.rank))
    if kind == "ddp":
        strategy = DDP(model, group)
        optimizer = AdamW(model.named_parameters(), lr=0.01)
    else:
        strategy = FSDP(model, group, units=["blocks.*"], **options)
        optimizer = ShardedOptimizer(strategy, optimizer=partial(AdamW, lr=0.01))
    for step in range(4):
        x = np.random.default_rng([step, group.rank]).normal(size=(3, width)).astype(np.float32)
        y, ctx = strategy.forward(x, Mode(training=True, step=step))
        optimizer.zero_grad()
        strategy.backward(ctx, y)
        optimizer.step()
    with strategy.whole() if kind != "ddp" else nullcontext():
        return {name: p.data.copy() for name, p in model.named_parameters()}


ROUTES = {
    "against the order of definition": lambda rank, step: [4, 3, 2, 1, 0],
    "twice": lambda rank, step: [0, 1, 2, 1, 3, 0, 4],
    "each rank other units": lambda rank, step: np.flatnonzero(
        np.random.default_rng([rank, step]).random(5) < 0.5
    ).tolist(),
    "one rank none": lambda rank, step: [] if rank == 1 else [0, 1, 2, 3, 4],
    "each rank its own order": lambda rank, step: (
        np.random.default_rng([rank, step]).permutation(5).tolist()
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_ranks_may_go_through_units_each_in_its_own_way(route, full):
    for size, per_node in ((4, 2), (3, 1)) if full else ((3, 2),):
        expected = on_nodes(size, per_node, train_routed, ROUTES[route], "ddp")[0]
        for prefetch in (0, 1, 2) if full else (1,):
            body = partial(train_routed, route=ROUTES[route], kind=FULL, prefetch=prefetch)
            for got in on_nodes(size, per_node, body):
                assert_close(got, expected, rtol=1e-5)
        if full or route == "each rank other units":
            # With replays in backward, units are entered forward there, too.
            body = partial(train_routed, route=ROUTES[route], kind=FULL, wrap=Recompute)
            for got in on_nodes(size, per_node, body):
                assert_close(got, expected, rtol=1e-5)


@pytest.mark.parametrize("prefetch", [0, 1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("route", ["twice", "each rank its own order"])
def test_slots_never_exceed_one_and_those_ahead(monkeypatch, prefetch, route):
    _, held = watch(monkeypatch)
    on_nodes(2, 1, partial(train_routed, route=ROUTES[route], kind=FULL, prefetch=prefetch))
    assert max(held) <= 1 + prefetch


def test_the_order_of_the_pass_before_is_that_of_the_gathers_ahead(monkeypatch):
    events, _ = watch(monkeypatch)

    def body(group):
        model = Routed(blocks(4), lambda _: [2, 0, 3, 1])
        fsdp = FSDP(model, group, units=["blocks.*"])
        for _ in range(2):
            if group.rank == 0:
                events.clear()
            fsdp.load_state_dict(fsdp.state_dict())  # what is in the slots is out of date
            fsdp.forward(np.ones((2, 24), np.float32), TRAIN)

    on_nodes(2, 1, body)
    assert ", ".join(events) == (
        "gather 2, gather 0, enter 2, gather 3, enter 0, gather 1, enter 3, enter 1"
    )


# -- what goes wrong -------------------------------------------------------------------------------


def gathered(group, **options):
    model = Sequential(*blocks(3))
    return model, FSDP(model, group, units=["0", "1", "2"], **options)


X = np.ones((2, 24), np.float32)


@pytest.mark.parametrize("halves", [False, True])
def test_after_an_exception_in_forward_all_can_try_again(halves):
    class Fragile(ReLU):
        fails = False

        def forward(self, x, mode):
            if self.fails:
                raise MemoryError("no memory")
            return super().forward(x, mode)

    def body(group, fails):
        model = Sequential(*blocks(2), Fragile(), *blocks(2))
        fsdp = FSDP(model, group, units=["[0134]"])
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.01))
        for step in range(3):
            x = np.random.default_rng([step, group.rank]).normal(size=(4, 24)).astype(np.float32)
            model.layers[2].fails = fails and step == 1 and group.rank == 2
            if model.layers[2].fails:
                with pytest.raises(MemoryError, match="no memory"):
                    fsdp.forward(x, TRAIN)
                assert all(p.is_sealed for p in fsdp.parameters())
                model.layers[2].fails = False
            elif fails and step == 1:
                fsdp.forward(x, TRAIN)  # ends on the other ranks
            y, ctx = fsdp.forward(x, TRAIN)
            if halves:
                _, wctx = fsdp.backward_input(ctx, y)
                fsdp.backward_weight(wctx)
            else:
                optimizer.backward(ctx, y)
            optimizer.step()
        with fsdp.whole():
            return {name: p.data.copy() for name, p in model.named_parameters()}

    expected = on_nodes(4, 2, body, False)[0]
    for got in on_nodes(4, 2, body, True):
        assert_same(got, expected)


def test_a_rank_whose_backward_failed_is_told_so():
    class Failing(ReLU):
        def backward_input(self, ctx, dy):
            raise MemoryError("no memory")

    def body(group):
        model = Sequential(*blocks(2), Failing(), *blocks(2))
        fsdp = FSDP(model, group, units=["[0134]"])
        _, ctx = fsdp.forward(X, TRAIN)
        with pytest.raises(MemoryError, match="no memory"):
            fsdp.backward(ctx, X)
        with pytest.raises(RuntimeError, match=r"pass failed half way \(MemoryError.*end the job"):
            fsdp.forward(X, TRAIN)

    on_nodes(2, 1, body)


def test_a_parameter_is_read_where_it_is_whole():
    def body(group):
        model, fsdp = gathered(group)
        first = model.layers[0]
        expected = first.weight.shape, first.weight.dtype
        with pytest.raises(
            RuntimeError, match=r"'0\.weight' is sharded: its values .*inside fsdp\.whole\(\)"
        ):
            first.forward(X, TRAIN)
        with fsdp.whole():
            y, _ = model.forward(X, TRAIN)
            again, _ = fsdp.forward(X, TRAIN)
            np.testing.assert_array_equal(again, y)
            with fsdp.whole():
                assert not first.weight.data.flags.writeable
            before = first.weight.data
        assert first.weight.is_sealed
        assert (first.weight.shape, first.weight.dtype) == expected
        np.testing.assert_array_equal(fsdp.forward(X, TRAIN)[0], y)
        fsdp.close()
        np.testing.assert_array_equal(before, blocks(3)[0].weight.data)
        with pytest.raises(RuntimeError, match=r"'0\.weight' is sharded"):
            model.state_dict()
        with pytest.raises(ValueError, match=r"'0\.weight' is read-only, as another FSDP"):
            FSDP(model, group)

    on_nodes(4, 2, body)


def test_a_module_that_runs_one_of_another_unit_has_to_hold_it():
    class Borrower(Linear):
        def forward(self, x, mode):
            return self.lend[0]().forward(x, mode)

    def body(group):
        first, second = blocks(2)
        model = Sequential(first, Borrower(24, 24, rng=1))
        model.layers[1].lend = (lambda: second,)
        model.layers = (first, model.layers[1], second)
        model.relabel()
        fsdp = FSDP(model, group, units=["[012]"])
        with pytest.raises(
            RuntimeError,
            match="a module of unit '2' is run by one of unit '1', which does not hold it; hold it",
        ):
            fsdp.forward(X, TRAIN)

    on_nodes(2, 1, body)


@pytest.mark.parametrize(
    ("prefetch", "error", "match"),
    [
        (-1, ValueError, "prefetch must not be negative, got -1"),
        (1.5, TypeError, r"prefetch must be a number of units, got 1\.5"),
    ],
)
def test_prefetch_is_a_number_of_units(prefetch, error, match):
    def body(group):
        with pytest.raises(error, match=match):
            gathered(group, prefetch=prefetch)

    run_ranks(1, body)


def test_a_unit_around_others_is_whole_at_any_time():
    class Around(Module):
        """Has a parameter of its own beside a module with others."""

        def __init__(self, inner):
            self.scale = Parameter(np.full(24, 2, np.float32))
            self.inner = inner

        def forward(self, x, mode):
            y, ctx = self.inner.forward(x * self.scale.data, mode)
            return y, Context((x, ctx), count_uses(self.scale, ctx))

        def backward_input(self, ctx, dy):
            x, inner = ctx.saved
            dx, wctx = self.inner.backward_input(inner, dy)
            return dx * self.scale.data, (x, dx, wctx)

        def backward_weight(self, wctx):
            x, dx, inner = wctx
            self.scale.add_grad((x * dx).sum(0))
            self.inner.backward_weight(inner)

    def body(group, kind):
        model = Sequential(*(Around(block) for block in blocks(3)))
        if kind == "ddp":
            strategy = DDP(model, group)
            optimizer = AdamW(model.named_parameters(), lr=0.01)
        else:
            strategy = FSDP(model, group, units=["?", "?.inner"])
            optimizer = ShardedOptimizer(strategy, optimizer=partial(AdamW, lr=0.01))
            whole = [name for name, p in model.named_parameters() if not p.is_sealed]
            assert whole == ["0.scale", "1.scale", "2.scale"]
        for step in range(3):
            x = np.random.default_rng([step, group.rank]).normal(size=(3, 24)).astype(np.float32)
            y, ctx = strategy.forward(x, TRAIN)
            optimizer.zero_grad()
            strategy.backward(ctx, y)
            optimizer.step()
        with strategy.whole() if kind != "ddp" else nullcontext():
            return {name: p.data.copy() for name, p in model.named_parameters()}

    expected = on_nodes(4, 2, body, "ddp")[0]
    for got in on_nodes(4, 2, body, FULL):
        assert_close(got, expected, rtol=1e-5)


class Keeping(Linear):
    """Wrong: keeps a view of its weight for backward."""

    def forward(self, x, mode):
        y, ctx = super().forward(x, mode)
        return y, Context((ctx, self.weight.data), ctx.uses)

    def backward_input(self, ctx, dy):
        inner, weight = ctx.saved
        _, wctx = super().backward_input(inner, dy)
        return dy @ weight, wctx


@pytest.mark.parametrize("kind", [Linear, Keeping])
def test_in_debug_mode_what_is_not_whole_is_nan(kind, monkeypatch):
    monkeypatch.setenv("MPIDIST_DEBUG", "1")

    def body(group):
        rng = np.random.default_rng(0)
        model = Sequential(*(kind(24, 24, rng=rng) for _ in range(4)))
        fsdp = FSDP(model, group, units=["?"])
        optimizer = ShardedOptimizer(fsdp, optimizer=partial(AdamW, lr=0.1))
        y, ctx = fsdp.forward(X, TRAIN)
        dx = optimizer.backward(ctx, y)
        optimizer.step()
        with fsdp.whole():
            values = [p.data for p in model.parameters()]
            return np.isnan(dx).any(), any(np.isnan(value).any() for value in values)

    wrong = kind is Keeping
    assert on_nodes(4, 2, body) == [(wrong, wrong)] * 4
