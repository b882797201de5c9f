from __future__ import annotations

import argparse
import json
from importlib.util import find_spec

import numpy as np
import pytest

from mpidist import nn
from mpidist.bench import fsdp
from mpidist.bench.ddp import Shape, make_model
from mpidist.bench.report import Report
from mpidist.bench.strategies import plan_strategies
from mpidist.group import ProcessGroup
from mpidist.optim import AdamW
from mpidist.testing import run_ranks
from tests.bench.running import bench

STRATEGIES = ["DDP+sharded", "sharded", "DDP"]


@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.timeout(120)
@pytest.mark.parametrize("peer", [True, False], ids=["torch", "no torch"])
def test_the_command_measures_a_small_model_and_says_what_is_held(mpirun, tmp_path, peer):
    if peer and find_spec("torch") is None:
        pytest.skip("torch is missing")
    words = ["fsdp", "--millions", "0.1", "--units", "0.1", "--repeats", "5"]
    words += [] if peer else ["--no-torch"]
    job = bench(mpirun, tmp_path / "r", *words)
    rows = {row["series"]: row for row in json.loads((tmp_path / "r").read_text())["rows"]}
    theirs = ["torch FSDP2", "torch alone"] * peer
    assert list(rows) == ["sum", "FULL_SHARD", *STRATEGIES, "alone", "AdamW alone", *theirs]
    held = {name: rows[name]["values"]["held"] for name in ["FULL_SHARD", *STRATEGIES]}
    layer = 4 * 160 * 161
    whole = 4 * layer
    assert rows["DDP"]["nbytes"] == whole
    # Half of parameters, gradients and two arrays of state, and two units of a layer.
    assert held["FULL_SHARD"] == pytest.approx(2 * whole + 2 * layer, rel=0.01)
    assert held["DDP+sharded"] == pytest.approx(2.5 * whole, rel=0.01)
    assert held["DDP"] == pytest.approx(4 * whole, rel=0.01)
    planned = plan_strategies(Report.load(tmp_path / "r"), [])
    assert {step.strategy: step.counted for step in planned} == held
    for step in planned:
        assert step.held == pytest.approx(step.counted, rel=0.01)
        assert step.strategy in job.stdout.partition("What the formulae")[2]
    assert "0.10 million, FULL_SHARD over DDP+sharded" in job.stdout
    assert ("0.10 million, added over FSDP2's" in job.stdout) == peer
    assert ("torch was left out" in job.stdout) != peer


@pytest.mark.hosts(2)
@pytest.mark.timeout(120)
def test_over_two_hosts_fsdp_is_compared_with_ddp(
    world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsdp, "_SIZES_BETWEEN", (1 << 20, 2 << 20))  # 16 MiB take seconds
    report = fsdp.run(world, _options("--millions", "0.1", "--units", "0.1", "--no-torch"))
    names = ["HYBRID_SHARD", "FULL_SHARD"]
    rows = {row.series: row for row in report.rows if row.operation == "FSDP step"}
    assert list(rows) == [*names[::-1], *STRATEGIES, "alone", "AdamW alone"]
    whole, layer = 16 * 160 * 161, 4 * 160 * 161
    held = [rows[name].values["held"] for name in names]
    assert held[0] == pytest.approx(2 * whole + 2 * layer, rel=0.01)
    # Slots, of two units per host, are beside two message buffers; shares differ by a row.
    assert held[1] == pytest.approx(whole + 2 * layer + layer, rel=0.02)
    for name, target in zip(names, report.targets, strict=True):
        assert target.what == f"0.10 million, {name} over DDP"
        assert target.value == rows[name].times.median / rows["DDP"].times.median
    for step in plan_strategies(report, []):
        assert step.held == pytest.approx(step.counted, rel=0.02)


def test_the_shares_that_ranks_update_alone_are_the_whole_update() -> None:
    x, dy = np.random.default_rng(0).standard_normal((2, 4, 32), np.float32)

    def shares(world: ProcessGroup) -> list[np.ndarray]:
        model = make_model(Shape(32, 2))
        fsdp.make_step(model.forward, fsdp.Alone(model, world), x, dy)
        return [p.data.reshape(-1)[fsdp.share(p.size, world)] for p in model.parameters()]

    model = make_model(Shape(32, 2))
    optimizer = AdamW(model.named_parameters(), lr=1e-4)
    _, ctx = model.forward(x, nn.Mode(training=True))
    model.backward(ctx, dy)
    optimizer.step()
    parts = zip(*run_ranks(3, shares), strict=True)
    for parameter, parts_of_one in zip(model.parameters(), parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts_of_one), parameter.data.reshape(-1))


def _options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    fsdp.configure(parser)
    return parser.parse_args([*words, "--repeats", "5"])
