"""A pipeline has the bits of one process, under every schedule; and refuses what cannot be."""

from __future__ import annotations

import gc
import json
import logging
import random
import weakref
from collections import ChainMap
from functools import partial
from itertools import pairwise
from time import sleep

import numpy as np
import pytest

from mpidist import checkpoint, trace
from mpidist.errors import (
    ScheduleError,
)
from mpidist.nn import (
    EVAL,
    BatchNorm2d,
    Context,
    Conv2d,
    Flatten,
    Linear,
    Mode,
    Module,
    ReLU,
    Sequential,
    cross_entropy,
    mse_loss,
)
from mpidist.optim import AdamW
from mpidist.parallel import (
    Action,
    Costs,
    Metrics,
    Pass,
    Pipeline,
    Schedule,
    Span,
    Timeline,
    clip_grad_norm,
    one_f_one_b,
    simulate,
)
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.parallel.pipeline.stages import starts_of
from mpidist.parallel.pipeline.waits import describe_waits
from mpidist.testing import DeliveryMode, Faults, run_ranks
from tests.parallel.pipeline import (
    CLASSES,
    MODE,
    SAMPLES,
    WORDS,
    alone,
    assert_same_bits,
    batch,
    build,
    build_connected,
    gradients,
    joined,
    step,
)

on_schedules = pytest.mark.parametrize("schedule", SCHEDULES)
FULL = pytest.mark.full


# -- bits ----------------------------------------------------------------------------------------


@on_schedules
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_step_has_the_bits_of_one_process(ranks, schedule, full):
    ran = 0
    for micro in (5, 6, 8, 12, 16) if full else (12,):
        try:
            SCHEDULES[schedule](ranks, micro)
        except ScheduleError:  # of which test_pipeline_schedules knows which numbers it names
            continue
        got = joined(run_ranks(ranks, partial(step, schedule=schedule), micro))
        assert_same_bits(got, alone(micro))
        ran += 1
    assert ran >= 1


@pytest.mark.parametrize("mode", DeliveryMode)
@on_schedules
def test_however_messages_move_bits_are_the_same(schedule, mode):
    faults = Faults(delay=0.002)
    body = partial(step, schedule=schedule)
    got = run_ranks(4, body, 8, mode=mode, faults=faults, seed=1)
    assert_same_bits(joined(got), alone(8))


@pytest.mark.full
@on_schedules
def test_on_eight_ranks(schedule):
    # Twelve layers make no 16 stages, which these would have.
    ranks = 6 if schedule in ("interleaved", "zbv", "dualpipev") else 8
    got = run_ranks(ranks, partial(step, schedule=schedule, cut="layers"), 2 * ranks)
    assert_same_bits(joined(got), alone(2 * ranks))


@on_schedules
@pytest.mark.parametrize("ranks", [4, *(pytest.param(r, marks=FULL) for r in (1, 2, 3))])
def test_connections_and_ties_over_stages_have_the_bits_of_one_process(ranks, schedule, full):
    body = partial(step, schedule=schedule, model=build_connected)
    ran = 0
    for micro in (5, 6, 8, 12, 16) if full else (8,):
        try:
            SCHEDULES[schedule](ranks, micro)
        except ScheduleError:
            continue
        for cut in ("layers", "parameters") if full else ("layers",):
            got = joined(run_ranks(ranks, partial(body, cut=cut), micro))
            assert_same_bits(got, alone(micro, model=build_connected))
            ran += 1
    assert ran >= 1


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_micro_batches_may_be_empty(samples):
    options = {"samples": samples, "model": build_connected}
    got = run_ranks(3, partial(step, schedule="zb-h1", **options), 5)
    assert_same_bits(joined(got), alone(5, **options))


@pytest.mark.parametrize("cut", ["layers", "parameters", (1, 2, 11), (4, 8, 9)], ids=str)
def test_cuts_do_not_change_bits(cut):
    assert_same_bits(joined(run_ranks(4, partial(step, cut=cut), 6)), alone(6))


@on_schedules
def test_a_step_is_that_of_the_joined_batch_in_float64(schedule):
    got = joined(run_ranks(4, partial(step, dtype=np.float64, schedule=schedule), 8))
    expected = alone(1, dtype=np.float64)
    assert got.loss == pytest.approx(expected.loss, rel=1e-12)
    for name, array in expected.grads.items():
        error = np.abs(got.grads[name] - array).max()
        assert error <= 1e-12 * np.abs(array).max(), name


def random_schedule(rng: random.Random) -> Schedule:
    """Draw stages, ranks, micro-batches, halves or whole passes, and an order that can be run."""
    stages, micros = rng.randrange(1, 7), rng.randrange(1, 6)
    ranks = rng.randrange(1, min(stages, 4) + 1)
    rank_of_stage = [*range(ranks), *(rng.randrange(ranks) for _ in range(stages - ranks))]
    rng.shuffle(rank_of_stage)
    halves = {(s, m): rng.random() < 0.5 for s in range(stages) for m in range(micros)}
    order: list[Action] = []
    over: set[tuple[int, str, int]] = (
        set()
    )  # F, gradient (G) or weights (W) of stage and micro-batch

    def can_begin(stage: int, what: str, m: int) -> bool:
        if (stage, what, m) in over or (m and (stage, what, m - 1) not in over):
            return False
        if what == "W":
            return halves[stage, m] and (stage, "G", m) in over
        if what == "F":
            return stage == 0 or (stage - 1, "F", m) in over
        waits = not halves[stage, m] and m > 0 and (stage, "W", m - 1) not in over
        after = stage == stages - 1 or (stage + 1, "G", m) in over
        return (stage, "F", m) in over and after and not waits

    everything = [(s, w, m) for s in range(stages) for w in "FGW" for m in range(micros)]
    while ready := [one for one in everything if can_begin(*one)]:
        stage, what, m = one = rng.choice(ready)
        over.add(one)
        whole = what == "G" and not halves[stage, m]
        if whole:
            over.add((stage, "W", m))
        kind = {"F": "F", "G": "B" if whole else "I", "W": "W"}[what]
        order.append(Action(stage, Pass(kind), m))
    assert len(over) == len(everything)
    own = (tuple(a for a in order if rank_of_stage[a.stage] == r) for r in range(ranks))
    return Schedule("random", tuple(rank_of_stage), micros, tuple(own))


@pytest.mark.timeout(900)  # two thousand of them, in a full run, on a busy machine
def test_random_orders_on_random_ranks_have_the_same_bits(full):
    rng = random.Random(1)
    models = (build, build_connected)
    expected = {(n, model): alone(n, model=model) for n in range(1, 6) for model in models}
    for _ in range(2000 if full else 20):
        schedule = random_schedule(rng)
        mode, model = rng.choice(list(DeliveryMode)), rng.choice(models)
        body = partial(step, schedule=schedule, cut="layers", model=model)
        got = run_ranks(schedule.ranks, body, schedule.micro_batches, mode=mode)
        assert_same_bits(joined(got), expected[schedule.micro_batches, model])


# -- a run of several steps ------------------------------------------------------------------------


def train(group, schedule, steps=3, micro=4):
    """Train with another batch size in each step, clip, and evaluate in between."""
    x, target = batch()
    metrics = Metrics(group)
    with Pipeline(build_connected(), group, micro_batches=micro, schedule=schedule) as pipe:
        optimizer = AdamW(pipe.named_parameters(), lr=0.01)
        norms, means, outputs = [], [], []
        for i in range(steps):
            rows = slice(i, SAMPLES - 7 * i)
            optimizer.zero_grad()
            result = pipe.step(x[rows], target[rows], Mode(True, step=i))
            norms.append(pipe.clip_grad_norm(0.5))
            optimizer.step()
            metrics.add("loss", result.loss, result.samples)
            means.append(metrics.reduce()["loss"])
            outputs.append(pipe.evaluate(x[: 5 - i]).outputs)
        state = {name: array.copy() for name, array in pipe.state_dict().items()}
    return norms, means, outputs, state


def train_alone(steps=3, micro=4):
    x, target = batch()
    model = build_connected()
    optimizer = AdamW(model.named_parameters(), lr=0.01)
    norms, means, outputs = [], [], []
    for i in range(steps):
        rows = np.arange(i, SAMPLES - 7 * i)
        optimizer.zero_grad()
        loss = 0.0
        for part in np.array_split(rows, micro):
            y, ctx = model.forward(x[part], Mode(True, step=i, sample_offset=int(part[0]) - i))
            own, dy = cross_entropy(y, target[part], denominator=target[rows].size)
            model.backward(ctx, dy)
            loss += float(own)
        norms.append(clip_grad_norm(model, 0.5))
        optimizer.step()
        means.append(loss)
        y = [model.forward(p, Mode(False))[0] for p in np.array_split(x[: 5 - i], micro)]
        outputs.append(np.concatenate(y))
    return norms, means, outputs, model.state_dict()


@on_schedules
def test_training_has_the_bits_of_one_process(schedule):
    norms, means, outputs, state = train_alone()
    everyone = run_ranks(2, train, schedule)
    for own_norms, own_means, _, own_state in everyone:
        assert own_norms == norms  # the bits of the norm of the whole model
        assert own_means == pytest.approx(means, rel=1e-15)
        for name, array in own_state.items():
            np.testing.assert_array_equal(array, state[name], err_msg=name, strict=True)
    other, last = sorted((own for _, _, own, _ in everyone), key=lambda own: own[0] is not None)
    assert other == [None] * 3
    for got, expected in zip(last, outputs, strict=True):
        np.testing.assert_array_equal(got, expected, strict=True)
    assert set(state) == set().union(*(own for *_, own in everyone))


def test_steps_add_up_until_gradients_are_forgotten():
    def body(group):
        x, target = batch()
        with Pipeline(build(np.float64), group, micro_batches=3) as pipe:
            pipe.step(x, target, MODE)
            once = gradients(pipe)
            pipe.step(x, target, MODE)
            twice = gradients(pipe)
            pipe.zero_grad()
            assert gradients(pipe) == {}
            pipe.step(x, target, MODE, denominator=2.0 * target.size)
            return [(once[n], twice[n], half) for n, half in gradients(pipe).items()]

    for rank in run_ranks(2, body):
        for once, twice, half in rank:
            np.testing.assert_allclose(twice, 2 * once, rtol=1e-12)
            np.testing.assert_allclose(half, once / 2, rtol=1e-12)


CALLS = (
    ("evaluate", 0, 3),
    ("step", SAMPLES, 3),
    ("evaluate", 5, 4),
    ("step", 2, 5),
    ("evaluate", SAMPLES, 3),
    ("step", 0, 2),
    ("step", 6, 1),
    ("step", 6, 1),
)
"""Steps and evaluations with batches of any samples and words, and no zero_grad in between."""


def sentences(samples, words):
    rng = np.random.default_rng(samples + 100 * words)
    shape = samples, words
    return rng.integers(0, WORDS, shape), rng.integers(0, CLASSES, shape)


@pytest.mark.parametrize(
    "schedule", [pytest.param(s, marks=() if s in ("1f1b", "zbv") else FULL) for s in SCHEDULES]
)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=FULL)])
def test_steps_and_evaluations_in_any_order(ranks, schedule):
    def body(group):
        with Pipeline(build_connected(), group, micro_batches=8, schedule=schedule) as pipe:
            gave = []
            for verb, *shape in CALLS:
                x, target = sentences(*shape)
                options = {"mode": MODE} if verb == "step" else {"outputs": True}
                result = getattr(pipe, verb)(x, target, **options)
                gave.append((result.loss, getattr(result, "outputs", None)))
            return pipe.schedule.rank_of_stage[-1] == group.rank, gave, gradients(pipe)

    model, expected = build_connected(), []
    for verb, *shape in CALLS:
        x, target = sentences(*shape)
        loss, outputs = 0.0, []
        for rows in np.array_split(np.arange(len(x)), 8):
            mode = MODE.shifted(int(rows[0]) if len(rows) else 0) if verb == "step" else EVAL
            y, ctx = model.forward(x[rows], mode)
            part, dy = cross_entropy(y, target[rows], denominator=max(target.size, 1))
            loss += float(part)
            outputs.append(y)
            if verb == "step":
                model.backward(ctx, dy)
        expected.append((loss, None if verb == "step" else np.concatenate(outputs)))
    everyone = run_ranks(ranks, body)
    grads = ChainMap(*(own for *_, own in everyone))
    assert grads.keys() == gradients(model).keys()
    for name, array in gradients(model).items():
        np.testing.assert_array_equal(grads[name], array, err_msg=name, strict=True)
    (gave,) = (gave for last, gave, _ in everyone if last)
    for (loss, outputs), (expected_loss, expected_outputs) in zip(gave, expected, strict=True):
        assert loss == expected_loss
        np.testing.assert_array_equal(outputs, expected_outputs)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zbv"])
def test_one_micro_batch_on_several_ranks(schedule):
    assert_same_bits(joined(run_ranks(4, partial(step, schedule=schedule), 1)), alone(1))


@pytest.mark.parametrize("schedule", ["gpipe", "zbv"])
def test_batch_normalisation_is_that_of_each_micro_batch(schedule, caplog):
    images = np.random.default_rng(0).normal(size=(9, 1, 4, 4)).astype(np.float32)
    target = np.arange(9) % 3

    def model():
        convolutions = (
            layer
            for seed in range(2)
            for layer in (Conv2d(1 + seed, 2, 3, padding=1, rng=seed), BatchNorm2d(2), ReLU())
        )
        return Sequential(*convolutions, Flatten(), Linear(32, 3, rng=2))

    def body(group):
        with Pipeline(model(), group, micro_batches=4, schedule=schedule) as pipe:
            pipe.costs(images, target, MODE)  # changes no statistics
            pipe.step(images, target, MODE)
            state = {name: array.copy() for name, array in pipe.state_dict().items()}
            return gradients(pipe), state

    alone = model()
    for rows in np.array_split(np.arange(9), 4):
        y, ctx = alone.forward(images[rows], MODE)
        alone.backward(ctx, cross_entropy(y, target[rows], denominator=9)[1])
    grads, states = (ChainMap(*parts) for parts in zip(*run_ranks(2, body), strict=True))
    for got, expected in ((grads, gradients(alone)), (states, alone.state_dict())):
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name, strict=True)
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "batch normalisation ('1', '4') has the statistics of one micro-batch, about 1/4" in (
        record.getMessage()
    )


def test_another_loss_and_an_evaluation_with_a_target():
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, 7, 3))

    def model():
        return Sequential(
            Linear(3, 3, rng=0, dtype=np.float64), ReLU(), Linear(3, 3, rng=1, dtype=np.float64)
        )

    def body(group):
        with Pipeline(model(), group, micro_batches=3, loss=mse_loss) as pipe:
            assert pipe.evaluate(x, target).outputs is None
            return pipe.evaluate(x, target, outputs=True), pipe.evaluate(x)

    (_, _), (with_target, without) = run_ranks(2, body)
    y, _ = model().forward(x, Mode(False))
    assert with_target.loss == pytest.approx(((y - target) ** 2).mean(), rel=1e-12)
    assert np.isnan(without.loss)
    for result in (with_target, without):
        assert result.samples == 7
        np.testing.assert_allclose(result.outputs, y, rtol=1e-12)


@pytest.mark.parametrize(("saves", "loads"), [(2, 1), (2, 4), (4, 3), (1, 2)])
def test_a_checkpoint_of_one_cut_loads_into_another(tmp_path, saves, loads):
    """With the optimizer's state: the next steps are those of one process that has not stopped."""

    def run(group, cut, steps, *, load=False):
        schedule = "zbv" if group.size == 2 else "1f1b"  # a tied one twice on one rank
        options = {"micro_batches": 4, "schedule": schedule, "cut": cut}
        with Pipeline(build_connected(), group, **options) as pipe:
            optimizer = AdamW(pipe.named_parameters(), lr=0.1)
            state = {"model": pipe, "optimizer": optimizer}
            if load:
                for parameter in pipe.parameters():
                    parameter.data += 1
                checkpoint.load(tmp_path, state, group)
            for i in steps:
                optimizer.zero_grad()
                pipe.step(*batch(), Mode(True, step=i))
                optimizer.step()
            if not load:
                checkpoint.save(tmp_path, state, group, step=1)
            return {name: array.copy() for name, array in pipe.state_dict().items()}

    run_ranks(saves, run, "parameters", [0, 1])
    got = ChainMap(*run_ranks(loads, partial(run, load=True), "layers", [2]))
    expected = train_plainly(3)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def train_plainly(steps):
    (x, target), model = batch(), build_connected()
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    for i in range(steps):
        optimizer.zero_grad()
        for rows in np.array_split(np.arange(len(x)), 4):
            y, ctx = model.forward(x[rows], Mode(True, step=i, sample_offset=int(rows[0])))
            model.backward(ctx, cross_entropy(y, target[rows], denominator=target.size)[1])
        optimizer.step()
    return model.state_dict()


# -- what is alive --------------------------------------------------------------------------------


class Token:
    """Something that a context holds."""


class Probe(Module):
    """Passes arrays on, and counts contexts that are alive on its rank."""

    def __init__(self, tokens: weakref.WeakSet, peaks: list[int], arrays: list) -> None:
        vars(self).update(tokens=tokens, peaks=peaks, arrays=arrays)

    def forward(self, x, mode):
        token, y = Token(), x + 0
        self.tokens.add(token)
        self.peaks.append(len(self.tokens))
        self.arrays.append(weakref.ref(y))
        return y, Context(token)

    def backward_input(self, ctx, dy):
        dx = dy + 0
        self.arrays.append(weakref.ref(dx))
        return dx, ctx.saved

    def backward_weight(self, wctx):
        pass


@pytest.mark.parametrize("ranks", [2, 4])
@on_schedules
def test_contexts_are_alive_as_long_as_the_schedule_says(ranks, schedule):
    micro = 2 * ranks

    def body(group):
        tokens, peaks, arrays = weakref.WeakSet(), [], []
        stages = SCHEDULES[schedule](ranks, micro).stages
        model = Sequential(*(Probe(tokens, peaks, arrays) for _ in range(stages)))
        x = np.ones((micro, 2))
        with Pipeline(model, group, micro_batches=micro, schedule=schedule, loss=mse_loss) as pipe:
            for _ in range(2):  # the second time without envelopes
                pipe.step(x, x, MODE)
                assert not tokens
                assert [array() for array in arrays if array() is not None] == []
            assert len(arrays) == 2 * 2 * micro * stages // ranks
            return max(peaks), pipe.schedule.peaks[group.rank]

    gc.disable()  # references in a circle would be found by it
    try:
        results = run_ranks(ranks, body)
    finally:
        gc.enable()
    assert [peak for peak, _ in results] == [peak for _, peak in results]


# -- what a step has cost --------------------------------------------------------------------------


class Sleeping(Module):
    """Passes arrays on after some milliseconds: of a forward pass and of each half of backward."""

    def __init__(self, forward, backward_input, backward_weight):
        vars(self).update(ms=(forward, backward_input, backward_weight))

    def forward(self, x, mode):
        sleep(self.ms[0] / 1e3)
        return x, Context(None)

    def backward_input(self, ctx, dy):
        sleep(self.ms[1] / 1e3)
        return dy, None

    def backward_weight(self, wctx):
        sleep(self.ms[2] / 1e3)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zbv"])
def test_a_timeline_has_what_each_rank_did(schedule):
    """Stages sleep at least as long as asked, whatever the machine does; no less is measured."""
    x = np.ones((4, 2))

    def body(group):
        model = Sequential(*(Sleeping(2, 4, 6) for _ in range(4)))
        options = {"schedule": schedule, "cut": "layers", "loss": mse_loss}
        with Pipeline(model, group, micro_batches=4, **options) as pipe:
            return pipe.schedule, pipe.timeline(pipe.step(x, x, MODE))

    (schedule, timeline), (_, other) = run_ranks(2, body)
    assert timeline == other
    layers = 4 // schedule.stages  # of each stage
    for actions, spans in zip(schedule.actions, timeline.spans, strict=True):
        assert tuple(span.action for span in spans) == actions
        assert all(a.ended <= b.began for a, b in pairwise(spans))
    costs = timeline.costs()
    assert min(costs.forward) >= 0.002 * layers
    if schedule.name == "1f1b":  # which runs halves together
        assert min(costs.backward_input) >= 0.005 * layers
    else:
        assert min(costs.backward_input) >= 0.004 * layers
        assert min(costs.backward_weight) >= 0.006 * layers
    least = simulate(schedule, Costs(*((ms * layers / 1e3,) * schedule.stages for ms in (2, 4, 6))))
    assert timeline.span >= least.span
    began = {span.action: span.began for spans in timeline.spans for span in spans}
    ended = {span.action: span.ended for spans in timeline.spans for span in spans}
    starts = 0.05  # the ranks begin to count within so many seconds
    for action in schedule.order:
        for need in schedule.needs(action):
            assert ended[need] <= began[action] + starts


def test_a_trace_has_a_region_for_each_action(tmp_path):
    def body(group):
        with Pipeline(build(), group, micro_batches=4, schedule="zb-h1") as pipe:
            with trace(tmp_path / "trace.json", group):
                pipe.step(*batch(), MODE)
            return [str(action) for action in pipe.schedule.actions[group.rank]]

    actions = run_ranks(2, body)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank, expected in enumerate(actions):
        regions = [e for e in events if e["pid"] == rank and e.get("name") in expected]
        assert [e["name"] for e in sorted(regions, key=lambda e: e["ts"])] == expected
        assert all(e["dur"] > 0 for e in regions)


def test_the_costs_of_a_timeline_are_medians():
    schedule = one_f_one_b(1, 3)
    forward, backward = (1, 5, 2), (8, 2, 4)
    spans, now = [], 0.0
    for action in schedule.actions[0]:
        cost = (forward if action.kind is Pass.FORWARD else backward)[action.micro_batch]
        spans.append(Span(action, now, now + cost))
        now += cost
    assert Timeline((tuple(spans),)).costs() == Costs((2,), (2,), (2,))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (0, "21.0 ms; rank 0 waited 71%, 71% for stage 1; rank 1 waited 14%, 5% for stage 0"),
        (2, "25.0 ms; rank 0 waited 76%, 76% for stage 1; rank 1 waited 28%, 12% for stage 0"),
    ],
)
def test_waits_are_told_with_the_layer_to_move(message, expected):
    """By hand: F0 F1 B0 B1 on rank 0, F0 B0 F1 B1 on rank 1, which has three layers of four."""
    schedule, costs = one_f_one_b(2, 2), Costs(*((1e-3, 3e-3) for _ in range(3)))
    told = describe_waits(
        schedule, simulate(schedule, costs, message=message * 1e-3), starts=(0, 1, 4)
    )
    step, *ranks, move = told.split("\n")
    assert step == f"1f1b: {expected.split(';')[0]}, without messages 21.0 ms"
    assert [line.replace(" of the step", "") for line in ranks] == expected.split("; ")[1:]
    assert move == (
        "move one layer from stage 1 to stage 0: about 18.0 ms without messages, if its layers "
        "take equally long"
    )


@pytest.mark.parametrize("starts", [(0, 1, 2), (0, 20, 40)])
def test_no_layer_is_to_move_where_that_helps_little(starts):
    def body(group):
        model = Sequential(*(ReLU() for _ in range(starts[-1])))
        with Pipeline(model, group, micro_batches=2, cut=starts[1:-1]) as pipe:
            return pipe.describe(simulate(pipe.schedule))

    for told in run_ranks(2, body):
        assert told.count("\n") == 2
        assert "move" not in told


def test_costs_of_layers_are_measured_and_cut_by():
    x = np.ones((4, 2))

    def model():
        return Sequential(
            Sleeping(0, 0, 0), Sleeping(3, 5, 7), Sleeping(0, 0, 0), Sleeping(9, 1, 1)
        )

    def body(group):
        options = {"micro_batches": 2, "loss": mse_loss}
        with Pipeline(model(), group, cut="layers", schedule="zbv", **options) as pipe:
            costs = pipe.costs(x, x, MODE)
        with Pipeline(model(), group, cut=costs, **options) as pipe:
            return costs, costs.joined(pipe.starts), pipe.starts

    (costs, joined_costs, starts), other = run_ranks(2, body)
    assert (costs, joined_costs, starts) == other
    for times, least in zip(vars(costs).values(), ((3, 9), (5, 1), (7, 1)), strict=True):
        assert len(times) == 4
        assert times[1] >= least[0] / 1e3
        assert times[3] >= least[1] / 1e3
    assert starts == starts_of(model(), costs, 2)
    for times, whole in zip(vars(costs).values(), vars(joined_costs).values(), strict=True):
        assert whole == (sum(times[: starts[1]]), sum(times[starts[1] :]))


def test_a_layer_in_two_places_costs_its_mean_at_each():
    x, twice = np.ones((4, 2)), Sleeping(20, 20, 20)
    model = Sequential(twice, Sleeping(20, 20, 20), twice)

    def body(group):
        with Pipeline(model, group, micro_batches=2, loss=mse_loss) as pipe:
            return pipe.costs(x, x, MODE)

    (costs,) = run_ranks(1, body)
    for times in vars(costs).values():
        assert times[0] == times[2]
        assert times[0] < 1.5 * times[1]


@pytest.mark.parametrize(
    ("costs", "stages", "starts"),
    [
        ((1, 1, 1, 1, 4), 2, (0, 4)),
        ((2, 1, 1, 1, 1), 3, (0, 1, 3)),
        ((1, 1, 1, 1), 4, (0, 1, 2, 3)),
        ((0.5, 2, 2, 0.5), 2, (0, 2)),
        ((1, 5, 1, 1, 1), 1, (0,)),
    ],
)
def test_the_slowest_stage_is_as_fast_as_it_can_be(costs, stages, starts):
    third = tuple(cost / 3 for cost in costs)
    model = Sequential(*(ReLU() for _ in costs))
    assert starts_of(model, Costs(third, third, third), stages) == starts


def test_measuring_changes_nothing():
    def body(group):
        with Pipeline(build_connected(), group, micro_batches=4) as pipe:
            costs = pipe.costs(*batch(9), MODE)
            assert gradients(pipe) == {}
            assert min(map(min, vars(costs).values())) >= 0
            result = pipe.step(*batch(), MODE)
            pipe.costs(*batch(1), MODE)
            return result, gradients(pipe)

    assert_same_bits(joined(run_ranks(3, body)), alone(4, model=build_connected))
