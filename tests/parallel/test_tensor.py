"""Tensor parallelism on simulated ranks: one process, or plain numpy, is the oracle."""

from __future__ import annotations

import copy
import logging
import re
from functools import partial

import numpy as np
import pytest

import mpidist
from mpidist.collectives import barrier
from mpidist.errors import CollectiveMismatchError, UnsupportedOperationError
from mpidist.mesh import DeviceMesh
from mpidist.nn import (
    EVAL,
    GELU,
    CausalSelfAttention,
    Context,
    Dropout,
    Embedding,
    LayerNorm,
    Mode,
    Module,
    ReLU,
    Residual,
    Sequential,
    cross_entropy,
)
from mpidist.optim import SGD, AdamW
from mpidist.parallel import (
    DDP,
    FSDP,
    Columns,
    Heads,
    Pipeline,
    Rows,
    ShardedOptimizer,
    Vocabulary,
    clip_grad_norm,
    cut_table,
    parallelize,
    vocabulary_cross_entropy,
)
from mpidist.parallel.tensor.conjugates import copied, gathered, scattered, summed
from mpidist.testing import run_ranks
from tests.parallel.tensor import (
    BATCH,
    CASES,
    TIME,
    WORDS,
    Gate,
    check_case,
    check_pipeline,
    check_resumed,
    check_same,
    linear,
    plan,
    save_half_way,
    trained_alone,
    transformer,
    whole_state,
)

TRAINING = Mode(training=True, seed=3)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(
            name,
            size,
            marks=() if (name, size) in {("plain", 4), ("gated", 3)} else pytest.mark.full,
        )
        for name in CASES
        for size in (1, 2, 3, 4)
    ],
)
def test_four_steps_are_those_of_one_process(size, name):
    trained_alone(name)  # once, not on each rank
    run_ranks(size, check_case, name)


@pytest.mark.parametrize(("saved", "loaded"), [(3, 2), pytest.param(2, 4, marks=pytest.mark.full)])
def test_a_checkpoint_goes_on_with_other_ranks_and_in_one_process(saved, loaded, tmp_path):
    trained_alone("gated")
    run_ranks(saved, save_half_way, tmp_path)
    run_ranks(loaded, partial(check_resumed, cut=True), tmp_path)
    run_ranks(1, partial(check_resumed, cut=False), tmp_path)


def test_replicas_have_the_same_bits_under_data_and_tensor_parallelism():
    """Two by two: DDP along one dimension of the mesh; one process on the joined batch."""
    case = CASES["plain"]
    x, target = np.random.default_rng(5).integers(0, WORDS, (2, BATCH, TIME))
    mode = Mode(True, seed=3)
    alone = case.build()
    y, ctx = alone.forward(x, mode)
    loss, dy = cross_entropy(y, target)
    alone.backward(ctx, dy)
    expected_norm = clip_grad_norm(alone, 0.1)
    SGD(alone, lr=0.5).step()

    def body(world):
        with DeviceMesh(world, dp=2, tp=2) as mesh:
            model = parallelize(case.build(world.rank), mesh["tp"], case.plan)
            dp, tp = mesh["dp"].group, mesh["tp"].group
            with DDP(model, dp, op=mpidist.SUM) as ddp:
                rows = slice(dp.rank * 2, dp.rank * 2 + 2)
                y, ctx = ddp.forward(x[rows], mode.shifted(dp.rank * 2))
                part, dy = vocabulary_cross_entropy(
                    y, target[rows], tp, classes=WORDS, denominator=target.size
                )
                ddp.backward(ctx, dy)
                norm = clip_grad_norm(model, 0.1, group=tp)
                SGD(model, lr=0.5).step()
            check_same(whole_state(model.state_dict(), world), alone.state_dict())
            return norm, float(part)

    results = run_ranks(4, body)
    assert len({norm for norm, _ in results}) == 1
    assert results[0][0] == pytest.approx(expected_norm, rel=1e-12)
    assert results[0][1] + results[2][1] == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize("size", [4, 8])
def test_the_stages_of_a_pipeline_may_be_cut_and_have_replicas(size):
    trained_alone("plain")
    run_ranks(size, check_pipeline)


# -- conjugates ------------------------------------------------------------------------------------

LEAD, FEATURES = (2, 3), 7


def inner(x, y, *, whole):
    """Return <x, y> of what all ranks have: of what is whole once, of parts and summands all."""
    products = [float((a * b).sum()) for a, b in zip(x, y, strict=True)]
    if whole:
        for values in (x, y):
            assert all(np.array_equal(value, values[0]) for value in values)
        return products[0]
    return sum(products)


@pytest.mark.parametrize("size", [1, 2, 4, 9])  # of nine ranks two have no features
@pytest.mark.parametrize("name", ["copied", "summed", "gathered", "scattered"])
def test_backward_is_the_adjoint_of_forward(name, size):
    whole = np.random.default_rng(0).normal(size=(2, *LEAD, FEATURES))
    each = np.random.default_rng(1).normal(size=(2, size, *LEAD, FEATURES))
    parts = [np.array_split(values, size, axis=-1) for values in whole]
    inputs = {
        "copied": ([whole[0]] * size, each[1]),
        "summed": (each[0], [whole[1]] * size),
        "gathered": (parts[0], [whole[1]] * size),
        "scattered": ([whole[0]] * size, parts[1]),
    }
    forward = {
        "copied": [whole[0]] * size,
        "summed": [each[0].sum(axis=0)] * size,
        "gathered": [whole[0]] * size,
        "scattered": parts[0],
    }

    def body(group):
        pair = {
            "copied": lambda: copied(group),
            "summed": lambda: summed(group),
            "gathered": lambda: gathered(group, FEATURES),
            "scattered": lambda: scattered(group, FEATURES),
        }[name]()
        x, dy = (values[group.rank] for values in inputs[name])
        before = x.copy(), dy.copy()
        y, dx = pair.forward(x), pair.backward(dy)
        np.testing.assert_array_equal((x, dy)[0], before[0])
        np.testing.assert_array_equal((x, dy)[1], before[1])
        return x, y, dx, dy

    x, y, dx, dy = zip(*run_ranks(size, body), strict=True)
    for got, expected in zip(y, forward[name], strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)
    there = inner(y, dy, whole=name in ("summed", "gathered"))
    back = inner(x, dx, whole=name in ("copied", "scattered"))
    assert there == pytest.approx(back, rel=1e-13)


# -- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_a_layer_may_gather_its_outputs_and_take_whole_inputs(size):
    def build():
        rng = np.random.default_rng(0)
        return Sequential(linear(5, 3, rng), LayerNorm(3, dtype=np.float64), linear(3, 6, rng))

    x, dy = (np.random.default_rng(1).normal(size=shape) for shape in ((4, 5), (4, 6)))
    plain = build()
    y, ctx = plain.forward(x, TRAINING)
    dx = plain.backward(ctx, dy)

    def body(group):
        model = parallelize(build(), group, {"0": Columns(gather=True), "2": Rows(scatter=True)})
        for halves in (False, True):
            model.zero_grad()
            mine, ctx = model.forward(x, TRAINING)
            np.testing.assert_allclose(mine, y, rtol=0, atol=1e-14)
            if halves:
                got, wctx = model.backward_input(ctx, dy)
                assert all(parameter.grad is None for parameter in model.parameters())
                model.backward_weight(wctx)
            else:
                got = model.backward(ctx, dy)
            np.testing.assert_allclose(got, dx, rtol=0, atol=1e-14)
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert ctx.uses[ours] == 1
                np.testing.assert_allclose(ours.grad, ours.part.of(theirs.grad), rtol=0, atol=1e-14)

    run_ranks(size, body)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 1e-6)])
@pytest.mark.parametrize(
    ("size", "shape", "classes", "denominator"),
    [(1, (3, 2), 5, None), (2, (3, 2), 5, 17.0), (4, (6,), 3, None), (3, (0, 2), 4, None)],
)
def test_the_loss_is_that_of_all_classes(size, shape, classes, denominator, dtype, tolerance):
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(*shape, classes)) * 30).astype(dtype)
    target = rng.integers(0, classes, shape)
    wide = logits.astype(np.longdouble)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    scale = 1 / (denominator or max(target.size, 1))
    expected = -(np.take_along_axis(logs, target[..., None], -1)).sum() * scale
    gradient = (np.exp(logs) - np.eye(classes)[target]) * scale

    def body(group):
        mine = np.array_split(logits, group.size, axis=-1)[group.rank]
        loss, dy = vocabulary_cross_entropy(
            mine, target, group, classes=classes, denominator=denominator
        )
        assert (loss.shape, loss.dtype, dy.dtype) == ((), np.dtype(dtype), np.dtype(dtype))
        np.testing.assert_allclose(float(loss), float(expected), rtol=tolerance, atol=0)
        part = np.array_split(gradient, group.size, axis=-1)[group.rank]
        np.testing.assert_allclose(dy, part.astype(float), rtol=0, atol=tolerance)
        return float(loss)

    assert len(set(run_ranks(size, body))) == 1


def test_what_a_rank_has_and_sends_is_a_table(caplog):
    caplog.set_level(logging.INFO, "mpidist")

    def body(group):
        model = Sequential(
            Embedding(5, 4, rng=0), Sequential(linear(4, 6, 1), GELU(), linear(6, 4, 2))
        )
        parallelize(model, group, {"0": Vocabulary(), "1.0": Columns(), "1.2": Rows()})
        return cut_table(model)

    table = """\
parameter   whole   here    bytes  sent
0.weight    (5, 4)  (3, 4)  48     forward all_reduce (..., 4)
1.0.weight  (6, 4)  (3, 4)  96     backward all_reduce (..., 4)
1.0.bias    (6,)    (3,)    24
1.2.weight  (4, 6)  (4, 3)  96     forward all_reduce (..., 4)
1.2.bias    (4,)    all     32"""
    assert run_ranks(2, body) == [table, table.replace("(3, 4)  48", "(2, 4)  32")]
    assert table in caplog.records[-1].getMessage()


def test_a_rank_without_heads_is_named(caplog):
    def body(group):
        parallelize(Sequential(CausalSelfAttention(4, 2, rng=0)), group, {"0": Heads()})

    run_ranks(3, body)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "'0': 1 of 3 ranks have none of its 2 heads" in record.getMessage()


def test_a_cut_model_can_be_copied():
    def body(group):
        model = parallelize(transformer(np.random.default_rng(0)), group, plan())
        other = copy.deepcopy(model)
        x = np.zeros((1, TIME), int)
        np.testing.assert_array_equal(model.forward(x, EVAL)[0], other.forward(x, EVAL)[0])
        assert not any(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))

    run_ranks(2, body)


# -- mistakes --------------------------------------------------------------------------------------


def raised(size, fn, error=ValueError):
    """Return what rank 0 raises; all do, but for their numbers and parts, and none waits."""

    def body(group):
        with pytest.raises(error) as info:
            fn(group)
        assert info.type is error
        barrier(group)
        return str(info.value)

    messages = run_ranks(size, body)
    own = r"rank \d|world\[\d\]|part \([^)]*\)"
    assert len({re.sub(own, "", message) for message in messages}) == 1
    return messages[0]


def pair(up=6, down=6):
    return Sequential(linear(4, up, 0), ReLU(), linear(down, 4, 1))


class Parallel(Module):
    """A perceptron whose layers are attributes, in an order that only it knows."""

    def __init__(self, p=0.5, *, up=(), drop=None, down=None):
        self.up = Sequential(linear(4, 6, 0), *up) if up else linear(4, 6, 0)
        self.drop = drop or Dropout(p)
        self.down = down or linear(6, 4, 1)

    def forward(self, x, mode):
        x, _ = self.up.forward(x, mode)
        x, _ = self.drop.forward(x, mode)
        return self.down.forward(x, mode)[0], Context(None)

    def backward_input(self, ctx, dy):
        raise NotImplementedError

    def backward_weight(self, wctx):
        raise NotImplementedError


class Within(Parallel):
    """A module in another, of which it is not known what it does with it."""

    def __init__(self, inner):
        self.inner = inner

    def forward(self, x, mode):
        return self.inner.forward(x, mode)


class OwnAttention(CausalSelfAttention):
    """One that is free to reshape by its number of heads."""


def tied():
    model = Sequential(
        Embedding(6, 4, rng=0, dtype=np.float64), LayerNorm(4), linear(4, 6, 0, bias=False)
    )
    model.layers[2].weight = model.layers[0].weight
    return model


MISTAKES = {
    "nothing matches": (pair, {"*.up": Columns()}, r"'\*.up' matches no module; .*'0', '1', '2'"),
    "no heads": (pair, {"0": Heads()}, r"'0': Heads\(\): .*has heads, got a Linear"),
    "no Linear": (pair, {"1": Columns()}, r"expected a Linear, got a ReLU"),
    "no vocabulary": (pair, {"1": Vocabulary()}, r"expected an Embedding or a Linear, got a ReLU"),
    "blocks": (pair, {"0": Columns(blocks=4)}, r"its 6 outputs are not made of 4 equal blocks"),
    "two ways": (pair, {"0": Columns(), "*": Rows()}, r"'0' is cut in two ways: '0': .*'\*'"),
    "no rows": (pair, {"0": Columns()}, r"'2', a Linear, gets this rank's part \(.*needs whole"),
    "no columns": (pair, {"2": Rows()}, r"'2', a RowLinear, gets whole activations and needs"),
    "rows twice": (
        lambda: Sequential(linear(4, 6, 0), linear(6, 6, 1), linear(6, 4, 2)),
        {"0": Columns(), "1": Rows(), "2": Rows()},
        r"'2', a RowLinear, gets whole activations",
    ),
    "other blocks": (
        pair,
        {"0": Columns(blocks=2), "2": Rows()},
        r"'2', a RowLinear, gets .*part \(0..1, 3..4\) of 6 features and needs .*\(0..2\)",
    ),
    "a gate of one block": (
        lambda: Sequential(linear(4, 6, 0), Gate(), linear(3, 4, 1)),
        {"0": Columns(), "2": Rows()},
        r"'1', a Gate, joins 2 blocks .*by Columns\(blocks=2\)",
    ),
    "residual": (
        lambda: Sequential(Residual(Sequential(linear(4, 4, 0))), linear(4, 4, 1)),
        {"0.inner.0": Columns(), "1": Rows()},
        r"'0' adds its input, whole activations, to its output, this rank's part",
    ),
    "a part is returned": (pair, {"2": Columns()}, r"the model returns a part of its outputs"),
    "attention by columns": (
        lambda: Sequential(CausalSelfAttention(4, 2, rng=0)),
        {"0.qkv": Columns(blocks=3), "0.proj": Rows()},
        r"'0': cut an attention by Heads\(\)",
    ),
    "attention twice": (
        lambda: Sequential(CausalSelfAttention(4, 2, rng=0)),
        {"0": Heads(), "0.proj": Rows()},
        r"'0.proj': Rows\(.*a module around it, or inside, is cut",
    ),
    "a tie that is whole": (
        tied,
        {"0": Vocabulary()},
        r"'2' shares parameter '0.weight', which another layer cuts",
    ),
    "a tie cut differently": (
        tied,
        {"0": Vocabulary(), "2": Rows(scatter=True)},
        r"'2': .*'0.weight' is shared with a layer that is cut differently",
    ),
    "dropout in a class of its own": (
        Parallel,
        {"up": Columns(), "down": Rows()},
        r"'drop' draws for each feature .*'up' gives or takes a part .*of a Parallel; put the",
    ),
    "dropout behind a container": (
        lambda: Parallel(up=[GELU()]),
        {"up.0": Columns(), "down": Rows()},
        r"'drop' draws for each feature .*'up' gives or takes a part",
    ),
    "dropout in a container": (
        lambda: Parallel(drop=Sequential(GELU(), Dropout(0.5))),
        {"up": Columns(), "down": Rows()},
        r"'drop.1' draws for each feature .*'up' gives or takes a part",
    ),
    "dropout in a class in another": (
        lambda: Parallel(drop=Within(Dropout(0.5))),
        {"up": Columns(), "down": Rows()},
        r"'drop.inner' draws for each feature .*'up' gives or takes a part",
    ),
    "dropout between classes": (
        lambda: Sequential(Within(linear(4, 6, 0)), Dropout(0.5), Within(linear(6, 4, 1))),
        {"0.inner": Columns(), "2.inner": Rows()},
        r"'1' draws for each feature .*'0.inner' gives or takes a part .*of a Within",
    ),
    "an attention with a way of its own": (
        lambda: Sequential(OwnAttention(4, 2, rng=0)),
        {"0": Heads()},
        r"'0': Heads\(\): expected a CausalSelfAttention.*got a OwnAttention; a subclass may",
    ),
    "cut already": (
        lambda: cut_once(pair()),
        {"0": Columns(), "2": Rows()},
        r"parameter '0.weight' is a part of a whole one already",
    ),
}


def cut_once(model):
    """Cut a model in a job of its own, of one rank."""
    with mpidist.init("simulated") as group:
        return parallelize(model, group, {"0": Columns(), "2": Rows()})


@pytest.mark.parametrize("name", MISTAKES)
def test_a_plan_that_does_not_fit_is_refused_on_all_ranks(name):
    build, wrong, message = MISTAKES[name]
    models = [build(), build()]
    before = [[p.data.copy() for p in model.parameters()] for model in models]
    text = raised(2, lambda group: parallelize(models[group.rank], group, wrong))
    assert re.search(message, text), text
    for model, values in zip(models, before, strict=True):
        for parameter, value in zip(model.parameters(), values, strict=True):
            np.testing.assert_array_equal(parameter.data, value)


def whole_and_cut(build, group, chosen):
    """Return what a model gives, and then what it gives cut."""
    model, x = build(), np.random.default_rng(0).normal(size=(8, 4))
    whole, _ = model.forward(x, TRAINING)
    return whole, parallelize(model, group, chosen).forward(x, TRAINING)[0]


@pytest.mark.parametrize(
    ("build", "chosen"),
    [
        (lambda: Parallel(up=[GELU(), Dropout(0.5)], p=0.0), {"up.0": Columns(), "down": Rows()}),
        (
            lambda: Parallel(p=0.0, down=Sequential(Dropout(0.5), linear(6, 4, 1), Dropout(0.5))),
            {"up": Columns(), "down.1": Rows()},
        ),
        (lambda: Parallel(up=[linear(6, 6, 2)]), {"up.0": Columns(), "up.1": Rows()}),
    ],
    ids=["behind", "before", "whole"],
)
def test_dropout_whose_input_a_layer_fixes_draws_as_one_process(build, chosen):
    def body(group):
        whole, cut = whole_and_cut(build, group, chosen)
        np.testing.assert_allclose(cut, whole, rtol=0, atol=1e-14)

    run_ranks(2, body)


def test_all_that_is_wrong_is_listed():
    text = raised(2, lambda group: parallelize(pair(), group, {"x": Rows(), "0": Heads()}))
    assert text.count("\n") == 2


@pytest.mark.parametrize(
    ("build", "chosen", "message"),
    [
        (
            lambda rank: pair(6 + rank, 6 + rank),
            lambda _: {"0": Columns(gather=True)},
            "'0.weight' is",
        ),
        (lambda _: pair(), lambda rank: {"0": Columns(gather=not rank)}, "the plan of '0' is"),
        (
            lambda _: pair(),
            lambda rank: {"02"[rank]: Columns(gather=True)},
            "rank 1 lacks the plan",
        ),
    ],
    ids=["shapes", "splits", "names"],
)
def test_ranks_that_differ_are_named_on_all(build, chosen, message):
    text = raised(
        3,
        lambda group: parallelize(build(group.rank == 1), group, chosen(group.rank == 1)),
        CollectiveMismatchError,
    )
    assert message in text


def test_arguments_of_other_kinds_are_refused():
    def body(group):
        with pytest.raises(
            TypeError, match=r"expected parallelize\(model, ranks, plan\), got a int"
        ):
            parallelize(3, group, {})
        with pytest.raises(TypeError, match="expected a Split for '0', got 'columns'"):
            parallelize(pair(), group, {"0": "columns"})
        with pytest.raises(UnsupportedOperationError, match="parallelize"):
            parallelize(pair(), 2, {})

    run_ranks(1, body)
    with pytest.raises(ValueError, match="Columns: outputs of 2 blocks cannot be gathered"):
        Columns(blocks=2, gather=True)


def cut_pair(group):
    return parallelize(pair(), group, {"0": Columns(), "2": Rows()})


def test_strategies_are_made_of_a_model_that_is_cut():
    """Not the other way round; and those that would cut it further refuse."""

    def before(group):
        model = pair()
        with DDP(model, group.new_group([group.rank])):
            parallelize(model, group, {"0": Columns(), "2": Rows()})

    assert "parameter '0.weight' belongs to a DDP" in raised(2, before)
    for made in (FSDP, partial(ShardedOptimizer, optimizer=partial(AdamW, lr=0.1))):
        text = raised(
            2,
            lambda group, m=made: m(cut_pair(group), group.new_group([group.rank])),
            UnsupportedOperationError,
        )
        assert "parameter '0.weight' is a part of a whole one, as parallelize leaves it" in text

    def late(group):
        model = pair()
        optimizer = AdamW(model, lr=0.1)
        parallelize(model, group, {"0": Columns(), "2": Rows()})
        _, ctx = model.forward(np.ones((2, 4)), TRAINING)
        model.backward(ctx, np.ones((2, 4)))
        optimizer.step()

    assert "make the optimizer after the model has its final shapes" in raised(2, late)


def test_what_needs_all_elements_of_a_parameter_is_refused():
    class Whole(SGD):
        needs_whole = True

    text = raised(2, lambda group: Whole(cut_pair(group), lr=0.1))
    assert "Whole needs whole parameters, and '0.weight' is a part, (3, 4), of one of" in text

    def clip(group):
        clip_grad_norm(cut_pair(group), 1.0)

    assert "'0.weight' is this rank's part of a parameter of shape (6, 4)" in raised(2, clip)

    def pipeline(group):
        with Pipeline(cut_pair(group), group.new_group([group.rank]), micro_batches=1) as pipe:
            pipe.clip_grad_norm(1.0)

    assert "'0.weight' is this rank's part" in raised(2, pipeline)

    def stages(group):
        model = Sequential(linear(4, 4, 2), linear(4, 6, 0), ReLU(), linear(6, 4, 1))
        with DeviceMesh(group, pp=2, tp=2) as mesh:
            parallelize(model, mesh["tp"], {"1": Columns(), "3": Rows()})
            with Pipeline(model, mesh["pp"].group, micro_batches=1, cut=[1]) as pipe:
                pipe.clip_grad_norm(1.0)

    assert "rank 1 refuses: clip_grad_norm: '1.weight' is this rank's part" in raised(4, stages)


def test_activations_of_another_width_are_refused():
    def body(group):
        model = parallelize(Parallel(p=0.0), group, {"down": Rows()})
        model.forward(np.ones((2, 4)), TRAINING)

    text = raised(2, body)
    assert "RowLinear: expected an input of shape (..., 3), this rank's part of 6 features" in text
    assert "the layer before has to be cut by Columns()" in text


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ((2, 3), [0, 6], "expected targets in 0..5, got 0..6"),
        ((2, 3), [-1, 0], "expected targets in 0..5, got -1..0"),
        ((2, 3), [0.0, 1.0], "expected integer targets, got float64"),
        ((2, 3), [0], "expected a target of shape (2,) for logits of shape (2, 6), got (1,)"),
        ((2, 6), [0, 5], "expected logits of shape (..., 3), this rank's part of 6 classes"),
    ],
)
def test_a_wrong_target_is_refused_on_all_ranks_before_anything_is_sent(logits, target, message):
    def body(group):
        vocabulary_cross_entropy(np.zeros(logits), np.array(target), group, classes=6)

    assert message in raised(2, body)


def test_an_integer_outside_the_whole_vocabulary_is_refused_on_all_ranks():
    def body(group):
        model = parallelize(Sequential(Embedding(6, 4, rng=0)), group, {"0": Vocabulary()})
        y, _ = model.forward(np.array([[0, 3, 5]], np.uint8), EVAL)
        np.testing.assert_array_equal(y, Embedding(6, 4, rng=0).weight.data[[[0, 3, 5]]])
        model.forward(np.array([[0, 6]]), EVAL)

    assert "expected integers in 0..5, got 0..6" in raised(3, body)


def test_arrays_on_a_device_are_refused(xp):
    def body(group):
        model = pair()
        model.to("gpu")
        with pytest.raises(UnsupportedOperationError, match=r"'0.weight' lies on a device"):
            parallelize(model, group, {"0": Columns(), "2": Rows()})
        model = parallelize(tied(), group, {"0": Vocabulary(), "2": Vocabulary()})
        for layer, x in ((0, xp.zeros(2, np.int64)), (2, xp.zeros((2, 4)))):
            with pytest.raises(UnsupportedOperationError, match="arrays on a device"):
                model.layers[layer].forward(x, EVAL)
        with pytest.raises(UnsupportedOperationError, match="arrays on a device"):
            vocabulary_cross_entropy(xp.zeros((2, 6)), np.zeros(2, int), group, classes=6)
        rows = parallelize(pair(), group, {"2": Rows(scatter=True)})
        with pytest.raises(UnsupportedOperationError, match=r"RowLinear.*arrays on a device"):
            rows.layers[2].forward(xp.zeros((2, 6)), EVAL)

    run_ranks(1, body)
