"""The loop, against softmax regression written out in numpy, on simulated ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpidist import nn
from mpidist._types import MEAN, SUM, Array
from mpidist.data import ArrayDataset, ShardedSampler
from mpidist.group import ProcessGroup
from mpidist.optim import SGD, AdamW
from mpidist.parallel import DDP, Metrics
from mpidist.testing import run_ranks
from mpidist.train import Plan, Record, evaluate, train, train_step

CLASSES, WIDTH = 3, 5
# 17 samples in batches of 7: the last one of an epoch has 3, so the fourth rank gets none.
PLAN = Plan(steps=8, batch_size=7, seed=2, max_norm=0.5, log_every=3, evaluate_every=4)


def make_data(samples: int, *, seed: int = 0, positions: tuple[int, ...] = ()) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, *positions, WIDTH))
    return ArrayDataset(inputs, inputs[..., :CLASSES].argmax(-1))


def run(
    group: ProcessGroup,
    make_model: Any,
    *,
    plan: Plan = PLAN,
    positions: tuple[int, ...] = (),
) -> tuple[list[Record], dict[str, Array]]:
    module = make_model()
    with DDP(module, group, op=SUM) as model:
        optimizer = SGD(module.named_parameters(), lr=0.5, momentum=0.9)
        train_set, held_out = make_data(17, positions=positions), make_data(5, seed=1)
        if positions:
            held_out = make_data(5, seed=1, positions=positions)
        records = list(train(model, optimizer, train_set, held_out, plan, group))
    return records, {name: p.data.copy() for name, p in module.named_parameters()}


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, CLASSES, rng=0, dtype=np.float64))


def dropping() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 8, rng=0, dtype=np.float64),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(8, CLASSES, rng=1, dtype=np.float64),
    )


class PlainRegression:
    """Softmax regression with clipped gradients and momentum, from the formulas."""

    def __init__(self) -> None:
        layer = nn.Linear(WIDTH, CLASSES, rng=0, dtype=np.float64)
        assert layer.bias is not None
        self.w, self.b = layer.weight.data.copy(), layer.bias.data.copy()
        self.vw, self.vb = np.zeros_like(self.w), np.zeros_like(self.b)

    def judge(self, x: Array, target: Array) -> tuple[float, float, Array]:
        y = x @ self.w.T + self.b
        p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
        loss = -np.log(p[np.arange(len(x)), target]).mean()
        return float(loss), float((y.argmax(1) == target).mean()), p - np.eye(CLASSES)[target]

    def step(self, x: Array, target: Array) -> tuple[float, float, float]:
        loss, accuracy, dy = self.judge(x, target)
        gw, gb = dy.T @ x / len(x), dy.mean(0)
        norm = float(np.sqrt((gw**2).sum() + (gb**2).sum()))
        shrink = min(1.0, PLAN.max_norm / norm)
        self.vw, self.vb = 0.9 * self.vw + shrink * gw, 0.9 * self.vb + shrink * gb
        self.w, self.b = self.w - 0.5 * self.vw, self.b - 0.5 * self.vb
        return loss, accuracy, norm


def expected_records() -> tuple[list[tuple[str, int, float, float]], PlainRegression]:
    data, held_out, model = make_data(17), make_data(5, seed=1), PlainRegression()
    sampler = ShardedSampler(17, rank=0, size=1, batch_size=7, seed=PLAN.seed)
    order = [batch.indices for _ in range(3) for batch in sampler]
    records: list[tuple[str, int, float, float]] = []
    since: list[tuple[float, float, int]] = []
    for done, indices in enumerate(order[: PLAN.steps], start=1):
        loss, accuracy, _ = model.step(data.inputs[indices], data.targets[indices])
        since.append((loss, accuracy, len(indices)))
        if done in (3, 6, 8):
            weights = [n for *_, n in since]
            means = np.average([pair[:2] for pair in since], axis=0, weights=weights)
            records.append(("train", done, float(means[0]), float(means[1])))
            since = []
        if done in (4, 8):
            loss, accuracy, _ = model.judge(held_out.inputs, held_out.targets)
            records.append(("held-out", done, loss, accuracy))
    return records, model


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_regression_on_the_joined_batches(size: int) -> None:
    expected, model = expected_records()
    for records, parameters in run_ranks(size, run, linear):
        assert [(r.kind, r.step) for r in records] == [(kind, step) for kind, step, *_ in expected]
        for record, (_, step, loss, accuracy) in zip(records, expected, strict=True):
            assert record.loss == pytest.approx(loss, rel=1e-12)
            assert record.accuracy == pytest.approx(accuracy, rel=1e-12)
            assert record.epoch == pytest.approx(step / 3)
            assert record.samples_per_second > 0
        np.testing.assert_allclose(parameters["0.weight"], model.w, rtol=1e-12)
        np.testing.assert_allclose(parameters["0.bias"], model.b, rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_curve_with_dropout_does_not_depend_on_the_number_of_ranks(size: int) -> None:
    ((alone, expected),) = run_ranks(1, run, dropping)
    together = run_ranks(size, run, dropping)
    for records, parameters in together:
        for record, one in zip(records, alone, strict=True):
            assert (record.loss, record.accuracy) == pytest.approx((one.loss, one.accuracy))
        for name, value in parameters.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-11, atol=1e-13)
            np.testing.assert_array_equal(value, together[0][1][name])


def test_several_targets_per_sample_count_each() -> None:
    (lone,) = run_ranks(1, lambda group: run(group, linear, positions=(2,)))
    for records, parameters in run_ranks(3, lambda group: run(group, linear, positions=(2,))):
        assert records[-1].loss == pytest.approx(lone[0][-1].loss, rel=1e-12)
        np.testing.assert_allclose(parameters["0.weight"], lone[1]["0.weight"], rtol=1e-12)
    # The mean is per target: an untrained model guesses about log(3), not twice that.
    assert records[0].loss < 1.5


def test_training_goes_on_where_the_optimizer_stands() -> None:
    def in_two_parts(group: ProcessGroup) -> list[Record]:
        records: list[Record] = []
        module, data, held_out = dropping(), make_data(17), make_data(5, seed=1)
        with DDP(module, group, op=SUM) as model:
            first = AdamW(module.named_parameters(), lr=0.1)
            records += train(model, first, data, held_out, Plan(steps=5, batch_size=7), group)
            second = AdamW(module.named_parameters(), lr=0.1)
            second.load_state_dict(first.state_dict())
            records += train(model, second, data, held_out, Plan(steps=8, batch_size=7), group)
        return records

    def at_once(group: ProcessGroup) -> list[Record]:
        module, data, held_out = dropping(), make_data(17), make_data(5, seed=1)
        with DDP(module, group, op=SUM) as model:
            optimizer = AdamW(module.named_parameters(), lr=0.1)
            plan = Plan(steps=8, batch_size=7)
            return list(train(model, optimizer, data, held_out, plan, group))

    (parts,), (whole,) = run_ranks(1, in_two_parts), run_ranks(1, at_once)
    assert (parts[-1].step, parts[-1].loss) == (8, whole[-1].loss)


def test_evaluating_changes_nothing() -> None:
    def body(group: ProcessGroup) -> list[float]:
        with DDP(dropping(), group, op=SUM) as model:
            data = make_data(5)
            return [evaluate(model, data, PLAN, group).loss for _ in range(2)]

    first, second = run_ranks(2, body)[0]
    assert first == second


def test_a_mean_of_gradients_is_refused() -> None:
    def body(group: ProcessGroup) -> None:
        with DDP(linear(), group, op=MEAN) as model:
            optimizer, data = SGD(model.module.named_parameters(), lr=0.5), make_data(5)
            with pytest.raises(ValueError, match=r"train: model was made with op=MEAN.*op=SUM"):
                next(train(model, optimizer, data, data, PLAN, group))
            (batch,) = ShardedSampler(5, rank=group.rank, size=group.size, batch_size=5)
            with pytest.raises(ValueError, match=r"train_step: .*DDP\(\.\.\., op=SUM\)"):
                train_step(model, optimizer, data, batch, PLAN, Metrics(group))

    run_ranks(2, body)


def test_a_gradient_that_is_not_finite_ends_the_run_on_every_rank() -> None:
    # Sample 3 is in the first epoch's second batch, on one rank.
    data = make_data(8)
    order = ShardedSampler(8, rank=0, size=1, batch_size=4, seed=PLAN.seed)
    data.inputs[list(order)[1].indices[0]] = np.nan

    def body(group: ProcessGroup) -> list[float]:
        module = linear()
        with DDP(module, group, op=SUM) as model:
            optimizer = SGD(module.named_parameters(), lr=0.5)
            plan = Plan(steps=4, batch_size=4, seed=PLAN.seed, log_every=1)
            records = train(model, optimizer, data, make_data(5), plan, group)
            assert next(records).step == 1
            with pytest.raises(FloatingPointError, match="gradient's norm is nan after step 1: "):
                next(records)
            assert optimizer.step_count == 1
        return [float(np.abs(p.data).max()) for p in module.parameters()]

    for largest in run_ranks(3, body):
        assert np.isfinite(largest).all()


def test_a_loss_that_is_not_finite_at_the_end_is_an_error_too() -> None:
    def body(group: ProcessGroup) -> None:
        module, held_out = linear(), make_data(5)
        held_out.inputs[-1] = np.inf
        with DDP(module, group, op=SUM) as model, np.errstate(invalid="ignore"):
            optimizer = SGD(module.named_parameters(), lr=0.5)
            plan = Plan(steps=1, batch_size=4)
            records = train(model, optimizer, make_data(8), held_out, plan, group)
            assert [next(records).kind for _ in range(2)] == ["train", "held-out"]
            with pytest.raises(FloatingPointError, match=r"held-out samples is .* after step 1: "):
                next(records)

    run_ranks(2, body)


@pytest.mark.parametrize("name", ["steps", "log_every"])
def test_bad_plans_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Plan: {name} must be at least 1, got 0"):
        Plan(**{"steps": 1, "batch_size": 1, name: 0})
