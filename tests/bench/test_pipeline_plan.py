"""A pipeline is chosen from what layers take, as it can be worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from time import sleep

import numpy as np
import pytest

from mpidist import cli
from mpidist.bench.pipeline_plan import PipelineJob, plan_pipelines
from mpidist.nn import ADD, Context, Linear, Mode, Module, Pop, ReLU, Sequential, Stash, mse_loss
from mpidist.parallel import Costs, LayerCosts, Pipeline, Schedule
from mpidist.testing import run_ranks
from tests.parallel.pipeline import gradients

MODE = Mode(training=True)


def equal(layers: int = 8, **changes) -> LayerCosts:
    """Return layers whose passes take 1 s, with 10 bytes of parameters, and contexts of 100."""
    costs = dataclasses.replace(Costs.unit(layers), **changes)
    return LayerCosts(1, costs, (10,) * layers, (100,) * layers, (4,) * layers)


# -- what layers take ------------------------------------------------------------------------------


class Sleeping(Module):
    """Passes arrays on after 2 ms in forward, and after 4 and 6 ms in the halves of backward."""

    def forward(self, x, mode):
        sleep(0.002)
        return x, Context(None)

    def backward_input(self, ctx, dy):
        sleep(0.004)
        return dy, None

    def backward_weight(self, wctx):
        sleep(0.006)


def test_layers_are_measured_and_nothing_is_changed():
    model = Sequential(
        Linear(6, 8, rng=0), Stash("skip"), ReLU(), Sleeping(), Pop("skip", merge=ADD)
    )
    x, target = np.ones((5, 6), np.float32), np.ones((5, 8), np.float32)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    costs = LayerCosts.measure(model, x, target, MODE, mse_loss)
    assert costs.samples == 5
    assert costs.parameters == (4 * (6 * 8 + 8), 0, 0, 0, 0)
    assert costs.contexts == (x.nbytes, 0, 5 * 8, 0, 0)  # the input; of ReLU a bool for each number
    assert costs.outputs == (4 * 5 * 8,) * 5
    assert costs.costs.forward[3] >= 0.002
    assert costs.costs.backward_input[3] >= 0.004
    assert costs.costs.backward_weight[3] >= 0.006
    assert all(seconds >= 0 for seconds in (*costs.costs.forward, *costs.costs.backward_weight))
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_costs_are_saved_and_loaded(tmp_path):
    path = tmp_path / "layers.json"
    equal(3).save(path)
    assert LayerCosts.load(path) == equal(3)
    for change, words in (
        ({"outputs": [1]}, "same number of layers, at least 1, got [3, 3, 3, 3, 3, 1]"),
        ({"costs": {}}, "expected what LayerCosts.save writes: TypeError"),
        ({"samples": None}, "expected what LayerCosts.save writes: KeyError('samples')"),
    ):
        given = json.loads(path.read_text()) | change
        other = tmp_path / "changed.json"
        other.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
        with pytest.raises(ValueError, match=re.escape(words)):
            LayerCosts.load(other)


# -- what is chosen --------------------------------------------------------------------------------


def test_pipelines_are_planned_as_by_hand():
    """4 ranks and 8 micro-batches of 2 samples: a layer's pass takes 2 s, a context has 200 B."""
    plans, notes = plan_pipelines(equal(), PipelineJob(ranks=4, batch=16, memory=1700.0), [8])
    assert notes == []
    by_name = {plan.schedule.name: plan for plan in plans}
    assert by_name["1f1b"].seconds == (8 + 3) * 3 * 4.0  # a stage has two layers
    assert by_name["1f1b"].bubble == pytest.approx(3 / 8)
    assert by_name["1f1b"].messages == 2 * 8 * 3
    assert by_name["1f1b"].starts == (0, 2, 4, 6)
    assert by_name["1f1b"].memory == 4 * 2 * 10 + 4 * 2 * 200  # copies; contexts of rank 0
    assert by_name["gpipe"].memory == 4 * 2 * 10 + 8 * 2 * 200
    assert by_name["zbv"].seconds == pytest.approx(8 * 2 * 3 * 2.0 * (1 + 3 / 48))
    assert by_name["zbv"].memory == 4 * 2 * 10 + 8 * 200
    assert by_name["dualpipev"].memory == 4 * 2 * 10 + 9 * 200
    assert not by_name["dualpipev"].fits  # as the one plan that needs more than 1,700 B of these
    assert by_name["fitted"].fits
    assert plans[0].schedule.name == "zbv"
    assert [plan.fits for plan in plans] == sorted((plan.fits for plan in plans), reverse=True)
    fitting = [plan.seconds for plan in plans if plan.fits]
    assert fitting == sorted(fitting)


def test_messages_take_their_time():
    """The last halves of backward run while the gradient is on its way: 5 passes in a row."""
    layers, ranks = equal(2), 2
    alone, slow = (
        plan_pipelines(layers, PipelineJob(ranks, 1, latency=s, bandwidth=8.0), [1])[0][0].seconds
        for s in (0.0, 0.25)
    )
    assert alone == 5 + 2 * 4 / 8
    assert slow == alone + 2 * 0.25


def test_a_slow_layer_is_a_stage_by_itself():
    layers = equal(5, forward=(1.0, 1.0, 9.0, 1.0, 1.0))
    plans, notes = plan_pipelines(layers, PipelineJob(ranks=3, batch=4), [4])
    assert {plan.starts for plan in plans if len(plan.starts) == 3} == {(0, 2, 3)}
    assert any("zbv has 6 stages, and the model 5 layers" in note for note in notes)


# -- the command ---------------------------------------------------------------------------------


def test_what_the_command_chooses_can_be_run(tmp_path, capsys):
    model = Sequential(*(Linear(4, 4, rng=i) for i in range(5)))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    costs = LayerCosts.measure(model, x[:2], x[:2], MODE, mse_loss)
    paths = {name: tmp_path / name for name in ("layers.json", "schedule.txt", "plan.json")}
    costs.save(paths["layers.json"])
    words = (
        f"plan --pipeline {paths['layers.json']} --ranks 2 --batch 8 --micro-batches 2 4".split()
    )
    words += ["--schedule", str(paths["schedule.txt"]), "--json", str(paths["plan.json"])]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    rows = json.loads(paths["plan.json"].read_text())["pipelines"]
    schedule = Schedule.parse(paths["schedule.txt"].read_text())
    assert Schedule.parse(rows[0]["schedule"]) == schedule
    cut = rows[0]["starts"][1:]
    assert f"micro_batches={schedule.micro_batches}, " in text
    assert f"cut={cut})" in text
    assert min(row["seconds"] for row in rows) == rows[0]["seconds"]

    def body(group):
        options = {"schedule": schedule, "cut": cut, "loss": mse_loss}
        layers = Sequential(*(Linear(4, 4, rng=i) for i in range(5)))
        with Pipeline(layers, group, micro_batches=schedule.micro_batches, **options) as pipe:
            pipe.step(x, x, MODE)
            return gradients(pipe)

    got = {name: grad for rank in run_ranks(2, body) for name, grad in rank.items()}
    y, ctx = model.forward(x, MODE)
    model.backward(ctx, mse_loss(y, x)[1])
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_where_none_fits_the_least_is_named(tmp_path, capsys):
    equal().save(tmp_path / "layers.json")
    words = ["plan", "--pipeline", str(tmp_path / "layers.json"), "--ranks", "4"]
    assert cli.main([*words, "--memory", "100"]) == 1
    assert "None fits into 100 B: the least needs 280 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "takes one number of --ranks"),
        (["--ranks", "2", "3"], "takes one number of --ranks"),
        (["--ranks", "9"], "no pipeline to choose\n9 micro-batches, left out: gpipe has 9 stages"),
        (["missing.json", "--ranks", "2"], "takes one file, got 2"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, capsys, words, problem):
    equal().save(tmp_path / "layers.json")
    assert cli.main(["plan", "--pipeline", str(tmp_path / "layers.json"), *words]) == 2
    assert problem in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_text("[1]")
    assert cli.main(["plan", "--pipeline", str(path), "--ranks", "2"]) == 2
    assert f"{path}: expected what LayerCosts.save writes" in capsys.readouterr().err
