"""The cost model: numbers that are known are found again, and measurements are foretold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mpidist import cli
from mpidist.bench import strategies
from mpidist.bench.harness import BenchmarkError
from mpidist.bench.model import (
    CostModel,
    Errors,
    JobLayout,
    NetworkModel,
    NodeFit,
    NodeModel,
    Point,
    leave_one_out,
)
from mpidist.bench.predictions import make_plan
from mpidist.bench.report import ORDINARY, REGISTERED, Report
from tests.bench.reports import MACHINE, row

MEASURED = Path(__file__).parent / "measured"
SIZES = [4 << (2 * step) for step in range(13)]
KNEE = 4 << 20
TRUTH = NodeFit(ranks=4, meetings=5e-6, near=0.1e-9, far=0.4e-9, knee=KNEE)
NETWORK = NetworkModel(latency=3e-6, bandwidth=10e9)


def points(fit, *, noise=0.0):
    rng = np.random.default_rng(0)
    return [Point(n, fit.time(n) * np.exp(noise * rng.standard_normal())) for n in SIZES]


def report(benchmark="all_reduce", *, rows=None, **machine):
    if rows is None:
        rows = [row(REGISTERED, point.nbytes, point.seconds) for point in points(TRUTH)]
    where = dataclasses.replace(MACHINE, **machine)
    return Report(benchmark=benchmark, machine=where, rows=tuple(rows))


def test_a_network_is_found_again():
    found = NetworkModel.fit(points(NETWORK))
    assert found.latency == pytest.approx(3e-6)
    assert found.bandwidth == pytest.approx(10e9)


def test_meetings_bandwidths_and_knee_are_found_again():
    found = NodeFit.fit(4, points(TRUTH))
    assert found.knee == KNEE
    assert found.meetings == pytest.approx(5e-6)
    assert (found.near, found.far) == (pytest.approx(0.1e-9), pytest.approx(0.4e-9))
    assert Errors.of(found, points(TRUTH)).worst < 1e-9


def test_they_are_found_about_right_in_noise():
    found = NodeFit.fit(4, points(TRUTH, noise=0.05))
    assert found.meetings == pytest.approx(5e-6, rel=0.1)
    assert found.near == pytest.approx(0.1e-9, rel=0.25)
    assert found.far == pytest.approx(0.4e-9, rel=0.25)


def test_no_number_is_negative():
    falling = [Point(4, 9e-6), Point(4096, 6e-6), Point(65536, 5e-6), Point(1 << 20, 5e-6)]
    found = NodeFit.fit(2, falling)
    assert min(found.meetings, found.near, found.far) >= 0


def test_each_size_is_foretold_without_it():
    assert leave_one_out(lambda some: NodeFit.fit(4, some), points(TRUTH)).count == 11
    straight = dataclasses.replace(TRUTH, far=TRUTH.near)
    assert leave_one_out(lambda some: NodeFit.fit(4, some), points(straight)).worst < 1e-9
    assert leave_one_out(lambda some: NodeFit.fit(4, some), points(straight)[:3]).count == 0


def test_a_measured_run_is_foretold_without_each_of_its_sizes():
    """Recorded on a busy machine of 2 cores, where medians of neighbours differ by a third."""
    rows = Report.load(MEASURED / "all_reduce.json").rows
    real = [Point(r.nbytes, r.times.median) for r in rows if r.series == REGISTERED]
    errors = leave_one_out(lambda some: NodeFit.fit(2, some), real)
    assert errors.count == len(real) - 2
    assert errors.median < 0.2


def test_ranks_between_below_and_above_those_measured():
    two = dataclasses.replace(TRUTH, ranks=2, meetings=3e-6, near=0.06e-9, knee=2 * KNEE)
    node = NodeModel((two, TRUTH))
    assert node.time(1000, 1) == 0
    assert node.time(1000, 2) == two.time(1000)
    assert node.time(1000, 3) == pytest.approx((two.time(1000) + TRUTH.time(1000)) / 2)
    assert node.time(1000, 8) == pytest.approx(2 * TRUTH.time(1000))
    assert NodeModel((TRUTH,)).time(1000, 2) == TRUTH.time(1000)
    assert TRUTH.scaled(8).knee == KNEE / 2


@pytest.mark.parametrize(
    ("nodes", "nbytes", "messages", "sent", "combined"),
    [
        (1, 1000, 0, 0, 0),
        (8, 1000, 3, 3000, 3000),  # recursive doubling
        (6, 1000, 4, 4000, 3000),  # two more messages for those beyond a power of two
        (8, 8000, 14, 14000, 7000),  # the ring: 2 (p - 1) messages, 2 (p - 1) / p of the bytes
        (5, 5000, 8, 8000, 4000),
    ],
)
def test_messages_are_counted_as_the_algorithms_send_them(nodes, nbytes, messages, sent, combined):
    time = NETWORK.all_reduce(nbytes, nodes, sharing=4, combine=1e-9)
    assert time == pytest.approx(messages * 3e-6 + sent * 4 / 10e9 + combined * 1e-9)


def test_a_job_of_several_nodes_is_its_nodes_and_their_slices():
    model = CostModel(NodeModel((TRUTH,)), NETWORK)
    inside = model.all_reduce(1 << 20, ranks=4)
    assert inside == TRUTH.time(1 << 20)
    together = model.all_reduce(1 << 20, ranks=4, nodes=3)
    combine = 1.5 * TRUTH.near
    slices = NETWORK.all_reduce(1 << 18, 3, sharing=4, combine=combine)
    agree = NETWORK.all_reduce(96, 3, sharing=4, combine=0)
    assert together == pytest.approx(inside + slices + agree)
    with pytest.raises(ValueError, match="network"):
        CostModel(NodeModel((TRUTH,))).all_reduce(8, ranks=4, nodes=2)


def test_a_plan_tells_apart_what_was_measured():
    layouts = [JobLayout(1, 4), JobLayout(2, 4)]
    plan = make_plan({"four": report()}, layouts, series=REGISTERED, network=NETWORK)
    assert [f.fit.ranks for f in plan.fitted] == [4]
    measured = [p for p in plan.predictions if p.measured is not None]
    assert {p.layout for p in measured} == {JobLayout(1, 4)}
    assert [p.nbytes for p in measured] == SIZES
    assert all(p.seconds == pytest.approx(p.measured) for p in measured)
    others = [p for p in plan.predictions if p.measured is None]
    assert {p.layout for p in others} == {JobLayout(2, 4)}


def test_ranks_that_took_turns_are_left_out_if_others_did_not():
    both = {"four": report(), "twenty": report(ranks=20)}
    plan = make_plan(both, [], series=REGISTERED)
    assert [f.fit.ranks for f in plan.fitted] == [4]
    assert "twenty: 20 ranks took turns on 8 cores" in plan.notes[0]
    alone = make_plan({"twenty": report(ranks=20)}, [], series=REGISTERED)
    assert [f.fit.ranks for f in alone.fitted] == [20]


def test_a_network_is_fitted_to_messages_between_nodes():
    messages = [row(ORDINARY, p.nbytes, p.seconds, operation="ping-pong") for p in points(NETWORK)]
    p2p = report("p2p", rows=messages, ranks=2, nodes=2)
    plan = make_plan({"four": report(), "p2p": p2p}, [JobLayout(2, 4)], series=REGISTERED)
    assert plan.model.network.latency == pytest.approx(3e-6)
    assert plan.network_source == "fitted to p2p"
    inside = {"four": report(), "p2p": dataclasses.replace(p2p, machine=MACHINE)}
    with pytest.raises(BenchmarkError, match="inside one node"):
        make_plan(inside, [JobLayout(2, 4)], series=REGISTERED)


def ddp_report():
    nbytes = 1 << 22
    times = {"DDP": 30e-3, "alone": 20e-3, "one all_reduce": 5e-3}
    rows = [row(name, nbytes, seconds, operation="step") for name, seconds in times.items()]
    return report("ddp", rows=rows)


def test_steps_take_what_was_added_and_the_network():
    layouts = [JobLayout(1, 4), JobLayout(4, 4)]
    both = {"sums": report(), "steps": ddp_report()}
    plan = make_plan(both, layouts, series=REGISTERED, network=NETWORK)
    here, apart = plan.steps
    assert (here.measured, apart.measured) == (30e-3, None)
    inside = 2 * TRUTH.time(1 << 22)
    assert here.seconds == here.hidden == pytest.approx(20e-3 + inside)
    across = plan.model.across(1 << 22, ranks=4, nodes=4)
    assert apart.seconds == pytest.approx(20e-3 + inside + across)
    assert apart.hidden == pytest.approx(20e-3 + inside)


@pytest.mark.parametrize(
    ("reports", "layouts", "words"),
    [
        ({}, [], "nothing to fit"),
        ({"apart": report(nodes=2)}, [], "nothing to fit"),
        ({"four": report()}, [JobLayout(2, 4)], "--latency SECONDS and --bandwidth"),
        ({"apart": report("fsdp", ranks=4, nodes=4)}, [JobLayout(4, 4)], "one rank on each node"),
    ],
)
def test_what_cannot_be_planned_is_refused(reports, layouts, words):
    with pytest.raises(BenchmarkError, match=words):
        make_plan(reports, layouts, series=REGISTERED)


FILES = [str(MEASURED / name) for name in ("all_reduce.json", "ddp.json")]
WIDE = ["--nodes", "1", "4", "--ranks", "2", "8", "--latency", "2e-6", "--bandwidth", "12.5e9"]


def test_the_command_prints_writes_and_draws(tmp_path, capsys):
    document, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", *FILES, *WIDE, "--json", str(document), "--plot", str(picture)]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    for told in ("Measured, all_reduce", "Extrapolated, all_reduce", "off by", "4 x 8", "DDP step"):
        assert told in text
    written = json.loads(document.read_text())
    assert {p["extrapolated"] for p in written["predictions"]} == {True, False}
    assert {s["extrapolated"] for s in written["steps"]} == {True, False}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/nowhere.json"], "nowhere.json"),
        ([*FILES, "--latency", "1e-6"], "only together"),
        ([*FILES, "--nodes", "2"], "need a network"),
        ([*FILES, "--json", "/nowhere/plan.json"], "cannot write"),
        ([str(MEASURED / "ddp.json")], "nothing to fit"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(words, told, capsys):
    assert cli.main(["plan", *words]) == 2
    assert told in capsys.readouterr().err


NODE = {
    strategies.ALL_REDUCE: NodeFit(2, 1e-4, 0.2e-9, 0.2e-9, float("inf")),
    strategies.REDUCE_SCATTER: NodeFit(2, 1e-4, 0.1e-9, 0.1e-9, float("inf")),
}
BETWEEN = dict.fromkeys((strategies.SUM, strategies.GATHER, strategies.SCATTER), NETWORK)


def fsdp_report(nodes=1):
    """Return a report of 4 units of 1 MB on nodes of 2 ranks, with a step of 12 ms alone."""
    rows = []
    for nbytes in (1 << 18, 1 << 22, 1 << 25):
        inside = {name: fit.time(nbytes) for name, fit in NODE.items()}
        rows += [row("sum", nbytes, time, operation=name) for name, time in inside.items()]
        if nodes > 1:
            message = NETWORK.time(nbytes / nodes)
            seconds = {
                strategies.SUM: 2 * (nodes - 1) * message,
                strategies.GATHER: (nodes - 1) * message,
                strategies.SCATTER: inside[strategies.REDUCE_SCATTER] + (nodes - 1) * message,
            }
            rows += [row("sum", nbytes, time, operation=name) for name, time in seconds.items()]
    values = {"parameters": 1e6, "messages": 4, "largest": 1e6, "held": 5e6}
    medians = {"FULL_SHARD": 15e-3, "alone": 12e-3, "AdamW alone": 3e-3}
    medians |= dict.fromkeys(("DDP", "DDP+sharded", "sharded"), 20e-3)
    steps = [row(name, 4_000_000, time, operation="FSDP step") for name, time in medians.items()]
    rows += [dataclasses.replace(step, values=values) for step in steps]
    return report("fsdp", rows=rows, ranks=2 * nodes, nodes=nodes)


def planned(steps, layout):
    return {step.strategy: step for step in steps if step.layout == layout}


def test_a_step_on_a_node_is_the_computation_and_what_its_ranks_reduce():
    steps = planned(strategies.plan_strategies(fsdp_report(), []), JobLayout(1, 2))
    assert "HYBRID_SHARD" not in steps  # there it is FULL_SHARD
    update = 3e-3  # of half of the parameters
    added = {name: step.seconds - 12e-3 for name, step in steps.items()}
    assert added["FULL_SHARD"] == pytest.approx(4 * (1e-4 + 1e-4))
    assert added["sharded"] == pytest.approx(added["FULL_SHARD"])
    assert added["DDP+sharded"] == pytest.approx(4 * (1e-4 + 2e-4))
    assert added["DDP"] == pytest.approx(4 * (1e-4 + 2e-4) + update)
    assert (steps["FULL_SHARD"].measured, steps["FULL_SHARD"].counted) == (15e-3, 5e6)


def test_what_is_sent_between_nodes_is_added_and_may_be_hidden_by_the_passes():
    wide = NetworkModel(latency=1e-3, bandwidth=1e9)
    steps = strategies.plan_strategies(fsdp_report(), [JobLayout(3, 2)], wide)
    steps = planned(steps, JobLayout(3, 2))
    passes, update = 9e-3, 1e-3  # of a sixth of the parameters
    one = 4 * 2 * (1e-3 + 1e6 / 3 / 1e9)  # of 4 units 2 messages of a third
    forward, backward, several = passes / 3, 2 * passes / 3, 3 / 4
    reduced = 4 * (1e-4 + 1e-4)
    expected = {
        "FULL_SHARD": (update + reduced + 3 * one, forward + backward),
        "HYBRID_SHARD": (3 * update + reduced + 2 * one, backward),
        "sharded": (update + reduced + 2 * one, backward),
        "DDP+sharded": (update + 4 * 3e-4 + 3 * one, backward),
        "DDP": (6 * update + 4 * 3e-4 + 2 * one, backward),
    }
    for name, (seconds, most) in expected.items():
        assert steps[name].seconds == pytest.approx(passes + seconds), name
        assert steps[name].hidden == pytest.approx(passes + seconds - several * most), name
        assert steps[name].measured is None


def test_a_network_is_fitted_to_what_was_measured_between_nodes():
    cluster = strategies.ClusterModel.of(fsdp_report(nodes=3))
    for operation, network in cluster.network.items():
        assert network.latency == pytest.approx(3e-6, rel=1e-3), operation
        assert network.bandwidth == pytest.approx(10e9, rel=1e-3), operation


def test_memory_is_what_is_split_and_two_messages():
    steps = strategies.plan_strategies(fsdp_report(), [JobLayout(3, 2)], NETWORK)
    here, apart = planned(steps, JobLayout(1, 2)), planned(steps, JobLayout(3, 2))
    whole, unit = 4e6, 1e6
    assert here["FULL_SHARD"].held == here["sharded"].held == 4 * whole / 2 + 2 * unit
    assert here["DDP"].held == apart["DDP"].held == 4 * whole
    assert here["DDP+sharded"].held == whole / 2 + whole + 2 * whole / 2
    assert apart["DDP+sharded"].held == pytest.approx(whole / 2 + whole + 2 * whole / 6)
    assert apart["HYBRID_SHARD"].held == 4 * whole / 2 + 2 * unit
    assert apart["FULL_SHARD"].held == pytest.approx(4 * whole / 6 + 2 * unit + 2 * unit / 2)
    assert apart["sharded"].held == pytest.approx(whole / 2 + 3 * whole / 6 + 2 * unit)


def test_messages_between_nodes_carry_a_plan_of_strategies_to_several_nodes():
    messages = [row(ORDINARY, p.nbytes, p.seconds, operation="ping-pong") for p in points(NETWORK)]
    p2p = report("p2p", rows=messages, ranks=2, nodes=2)
    plan = make_plan({"one": fsdp_report(), "p2p": p2p}, [JobLayout(3, 2)], series=REGISTERED)
    assert plan.network_source == "fitted to p2p"
    here = planned(plan.strategies, JobLayout(3, 2))
    given = planned(
        strategies.plan_strategies(fsdp_report(), [JobLayout(3, 2)], NETWORK), JobLayout(3, 2)
    )
    for name, step in given.items():
        assert here[name].seconds == pytest.approx(step.seconds, rel=1e-3), name


def test_the_command_plans_strategies_from_a_report_of_fsdp_alone(tmp_path, capsys):
    fsdp_report().save(tmp_path / "fsdp.json")
    words = ["plan", str(tmp_path / "fsdp.json")]
    assert cli.main([*words, *WIDE, "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "A step and the memory of a rank, by strategy" in text
    assert "Fitted" not in text
    written = json.loads((tmp_path / "plan.json").read_text())["strategies"]
    assert {(step["layout"]["nodes"], step["layout"]["ranks"]) for step in written} == {
        (1, 2),
        (1, 8),
        (4, 2),
        (4, 8),
    }
    assert [step["strategy"] for step in written if not step["extrapolated"]] == [
        "FULL_SHARD",
        "DDP+sharded",
        "sharded",
        "DDP",
    ]
    assert cli.main([*words, "--plot", str(tmp_path / "plan.png")]) == 2
    assert "--plot draws all_reduce" in capsys.readouterr().err
    assert cli.main([*words, "--nodes", "2"]) == 2
    assert "several nodes need a network" in capsys.readouterr().err
