"""`SyncBatchNorm2d`: the numbers of the joined batch, and how norms are exchanged for it."""

from __future__ import annotations

import copy
import re
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

import mpidist
from mpidist._types import MEAN, SUM
from mpidist.collectives import all_reduce, barrier
from mpidist.errors import CollectiveMismatchError, UnsupportedOperationError
from mpidist.nn import (
    EVAL,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    Mode,
    Module,
    Recompute,
    Residual,
    Sequential,
    cross_entropy,
)
from mpidist.optim import SGD
from mpidist.parallel import (
    DDP,
    NaiveDataParallel,
    SyncBatchNorm2d,
    synchronize_batch_norms,
)
from mpidist.testing import run_ranks
from mpidist.testing.gradcheck import numerical_gradient, projection
from tests.parallel.joined_batch import CHANNELS, SHARES, TRAINING, check_joined
from tests.parallel.training import assert_close


@pytest.fixture
def single():
    with mpidist.init("simulated") as group:
        yield group


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_step_is_that_of_the_joined_batch(size, name, dtype):
    run_ranks(size, check_joined, name, dtype)


def test_a_large_mean_cancels_nothing():
    """The mean of the squares less the square of the mean would have no correct digit."""

    def body(group):
        check_joined(group, "one has none", "float64", mean=1e8, tolerance=1e-6)

    run_ranks(4, body)


def test_the_input_s_gradient_is_that_of_the_sum_of_all_losses():
    whole = np.random.default_rng(0).normal(size=(4, 2, 1, 2))
    bounds = [0, 1, 1, 4]

    def body(group):
        mine = slice(*bounds[group.rank : group.rank + 2])
        norm = SyncBatchNorm2d(2, group, dtype=np.float64)
        x, weights = whole.copy(), projection(whole)

        def total():
            y, _ = norm.forward(x[mine], Mode(True, replay=True))
            return float(all_reduce(np.array((y * weights[mine]).sum()), group))

        _, ctx = norm.forward(x[mine], TRAINING)
        dx = norm.backward(ctx, weights[mine])
        numeric = {
            "dx": numerical_gradient(total, x)[mine],
            "weight": numerical_gradient(total, norm.weight.data),
            "bias": numerical_gradient(total, norm.bias.data),
        }
        grads = {name: all_reduce(p.grad, group) for name, p in norm.named_parameters()}
        for name, expected in numeric.items():
            got = dx if name == "dx" else grads[name]
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)

    run_ranks(3, body)


def images(rng, wrap=lambda module: module):
    norm = BatchNorm2d(3, momentum=0.2, dtype=np.float64)
    body = Sequential(Conv2d(1, 3, 3, rng=rng, dtype=np.float64), norm)
    return Sequential(wrap(body), Flatten(), Linear(12, 4, rng=rng, dtype=np.float64))


def image_batches(steps=3, samples=9):
    rng = np.random.default_rng(3)
    for step in range(steps):
        yield step, rng.normal(size=(samples, 1, 4, 4)), rng.integers(0, 4, samples)


def train_alone(divisors):
    """Train on joined batches, each sample's loss over its own divisor."""
    model = images(np.random.default_rng(0))
    optimizer = SGD(model.named_parameters(), lr=0.1)
    for step, x, target in image_batches():
        y, ctx = model.forward(x, Mode(True, step=step))
        _, dy = cross_entropy(y, target, denominator=1)
        optimizer.zero_grad()
        model.backward(ctx, dy / divisors[:, None])
        optimizer.step()
    return {name: array.copy() for name, array in model.state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda module: module, Recompute], ids=["kept", "recomputed"])
@pytest.mark.parametrize("strategy", [DDP, NaiveDataParallel])
@pytest.mark.parametrize(("op", "bounds"), [(SUM, [0, 2, 2, 9]), (MEAN, [0, 2, 6, 9])])
def test_training_is_that_of_one_process(op, bounds, strategy, wrap):
    """By SUM and MEAN as for any other layer; with MEAN each rank's loss is a mean of its own."""
    counts = np.diff(bounds)
    own = np.repeat(counts, counts) * len(counts)
    expected = train_alone(own if op is MEAN else np.full(9, 9))

    def body(group):
        mine = slice(*bounds[group.rank : group.rank + 2])
        model = synchronize_batch_norms(images(np.random.default_rng(group.rank), wrap), group)
        model.load_state_dict(images(np.random.default_rng(0)).state_dict())
        trained = strategy(model, group, op=op)
        optimizer = SGD(model.named_parameters(), lr=0.1)
        for step, x, target in image_batches():
            y, ctx = trained.forward(x[mine], Mode(True, step=step))
            denominator = counts[group.rank] if op is MEAN else len(x)
            _, dy = cross_entropy(y, target[mine], denominator=denominator)
            optimizer.zero_grad()
            trained.backward(ctx, dy)
            optimizer.step()
        assert_close(model.state_dict(), expected)

    run_ranks(3, body)


def test_evaluation_is_local_and_that_of_a_plain_norm():
    x = np.random.default_rng(5).normal(size=(4, CHANNELS, 2, 2)).astype(np.float32)

    def body(group):
        plain = BatchNorm2d(CHANNELS)
        plain.forward(x, TRAINING)
        norm = SyncBatchNorm2d.of(plain, group)
        if group.rank == 1:  # the other one does not take part
            y, ctx = norm.forward(x, EVAL)
            expected, plain_ctx = plain.forward(x, EVAL)
            np.testing.assert_array_equal(y, expected)
            np.testing.assert_array_equal(norm.backward(ctx, y), plain.backward(plain_ctx, y))

    run_ranks(2, body)


def raised(size, fn, error, **options):
    """Return the message of every rank."""

    def body(group):
        with pytest.raises(error) as info:
            fn(group)
        return str(info.value)

    return run_ranks(size, body, **options)


@pytest.mark.parametrize("node_memory", [False, True])
def test_a_rank_in_evaluation_is_named_on_all(node_memory):
    def body(group):
        norm = SyncBatchNorm2d(CHANNELS, group)
        x = np.ones((2, CHANNELS, 2, 2), np.float32)
        norm.forward(x, EVAL if group.rank == 2 else TRAINING)
        all_reduce(np.array(0.5, np.float32), group)  # of the loss

    messages = raised(3, body, CollectiveMismatchError, node_memory=node_memory)
    for message in messages:
        for call in (f"rank 0-1 called all_reduce SUM float64[{CHANNELS + 1}]", "float32[]"):
            where = r" at \S*test_sync_batch_norm.py:\d+ in body"  # the user's lines
            assert re.search(re.escape(call) + where, message)


def test_ranks_with_other_numbers_of_channels_are_named():
    def body(group):
        channels = 2 + group.rank
        norm = SyncBatchNorm2d(channels, group)
        norm.forward(np.ones((2, channels, 2, 2), np.float32), TRAINING)

    for message in raised(2, body, CollectiveMismatchError):
        assert "rank 0 called all_reduce SUM float64[3]" in message
        assert "rank 1 called all_reduce SUM float64[4]" in message


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (2, 1, 5, 5), (2, 3, 5)])
def test_a_wrong_input_is_refused_before_anything_is_sent(shape):
    def body(group):
        if group.rank == 0:
            with pytest.raises(ValueError, match=r"SyncBatchNorm2d: expected an input of shape"):
                SyncBatchNorm2d(3, group).forward(np.ones(shape), TRAINING)
        barrier(group)

    run_ranks(2, body)


def test_a_wrong_gradient_is_refused_before_anything_is_sent():
    def body(group):
        norm = SyncBatchNorm2d(3, group)
        _, ctx = norm.forward(np.ones((2, 3, 4, 5)), TRAINING)
        if group.rank == 0:
            with pytest.raises(ValueError, match=r"expected dy of the output's shape, \(2, 3, 4"):
                norm.backward(ctx, np.ones((2, 3, 5, 4)))
        barrier(group)

    run_ranks(2, body)


def test_a_norm_without_a_group_is_refused():
    with pytest.raises(UnsupportedOperationError, match="SyncBatchNorm2d"):
        SyncBatchNorm2d(3, 2)
    with pytest.raises(UnsupportedOperationError, match="synchronize_batch_norms"):
        synchronize_batch_norms(BatchNorm2d(3), None)


def test_what_is_no_model_or_no_norm_is_refused(single):
    ddp = DDP(Sequential(BatchNorm2d(2)), single)
    for wrong in (3, None, BatchNorm2d, ddp):
        words = rf"\(model, group\), got a {type(wrong).__name__} first; exchange the norms"
        with pytest.raises(TypeError, match=words):
            synchronize_batch_norms(wrong, single)
    with pytest.raises(TypeError, match=r"expected a BatchNorm2d, got a Linear; synchronize_"):
        SyncBatchNorm2d.of(Linear(2, 2, rng=0), single)
    ddp.close()


class Pair(NamedTuple):
    left: Module
    right: Module


class Holder(Module):
    """Holds norms in every way in which a module may be held."""

    def __init__(self):
        self.attribute = BatchNorm2d(1)
        self.list = [BatchNorm2d(2), [Linear(1, 1, rng=0), BatchNorm2d(3)]]
        self.dict = {"a": BatchNorm2d(4)}
        self.pair = Pair(BatchNorm2d(5), Linear(1, 1, rng=0))
        self.frozen = MappingProxyType({"b": (BatchNorm2d(6),)})
        self.wrapped = Recompute(Residual(BatchNorm2d(7)))
        self.again = self.attribute
        self.layers = Sequential(BatchNorm2d(8), Flatten())

    def forward(self, x, mode):
        raise NotImplementedError

    def backward_input(self, ctx, dy):
        raise NotImplementedError

    def backward_weight(self, wctx):
        raise NotImplementedError


def test_every_norm_of_a_model_is_exchanged_and_nothing_else(single):
    model = Holder()
    before = dict(model.named_modules())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    inner_list = model.list[1]
    assert synchronize_batch_norms(model, single) is model
    after = dict(model.named_modules())
    assert list(after) == list(before)
    for name, module in before.items():
        if isinstance(module, BatchNorm2d):
            assert type(after[name]) is SyncBatchNorm2d, name
            assert after[name].layer_index == module.layer_index, name
        else:
            assert after[name] is module, name
    assert sum(isinstance(module, SyncBatchNorm2d) for module in after.values()) == 8
    assert model.again is model.attribute
    assert model.list[1] is inner_list
    assert type(model.pair) is Pair
    for held, now in (
        (parameters, dict(model.named_parameters())),
        (buffers, dict(model.named_buffers())),
    ):
        assert list(now) == list(held)
        assert all(now[name] is array for name, array in held.items())


def test_a_model_that_is_one_norm_is_returned_anew(single):
    norm = BatchNorm2d(2, eps=0.5, momentum=0.25)
    sync = synchronize_batch_norms(norm, single)
    assert type(sync) is SyncBatchNorm2d
    assert (sync.eps, sync.momentum, sync.weight) == (0.5, 0.25, norm.weight)
    assert sync.running_mean is norm.running_mean


def test_a_norm_gets_another_group(single):
    part = single.duplicate("part")
    model = synchronize_batch_norms(Sequential(BatchNorm2d(2)), single)
    assert synchronize_batch_norms(model, part).layers[0].group is part


def test_a_class_derived_from_a_norm_is_refused_and_nothing_is_exchanged(single):
    class Special(BatchNorm2d):
        pass

    model = Sequential(BatchNorm2d(2), Sequential(Special(2)))
    with pytest.raises(TypeError, match=r"'1.0' is a Special.*derive it from SyncBatchNorm2d"):
        synchronize_batch_norms(model, single)
    assert type(model.layers[0]) is BatchNorm2d


def test_a_copied_norm_is_independent_and_has_the_same_group(single):
    model = synchronize_batch_norms(Sequential(BatchNorm2d(2)), single)
    norm, other = model.layers[0], copy.deepcopy(model).layers[0]
    assert other.group is single
    assert other.weight is not norm.weight
    other.forward(np.ones((1, 2, 2, 2), np.float32), TRAINING)
    assert norm.running_mean.tolist() == [0, 0]
    assert other.running_mean.tolist() == pytest.approx([0.1, 0.1])
