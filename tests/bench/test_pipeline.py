from __future__ import annotations

import argparse
import json
from importlib.util import find_spec

import pytest

from mpidist.bench import pipeline
from mpidist.bench.report import Report
from mpidist.testing import run_ranks
from tests.bench.running import bench

WORDS = ["--sleep", "2", "--micro-batches", "4", "--millions", "0.1", "--batch", "4"]
SLEEPING = {"gpipe": 15, "1f1b": 15, "interleaved": 27, "zb-h1": 13, "zbv": 25, "dualpipev": 25}
"""Spans of 4 micro-batches on 2 ranks: 3 * 4 passes of each stage, and the bubble of the table."""
OURS = ["gpipe", "1f1b", "alone"]
THEIRS = ["torch GPipe", "torch 1F1B", "torch alone"]


def check(report: Report, *, peer: bool) -> None:
    rows = {(row.operation, row.series): row for row in report.rows}
    operations = (
        ["sleeping stages"] * len(SLEEPING) + ["an action"] + ["pipeline step"] * (3 + 3 * peer)
    )
    assert list(rows) == list(
        zip(operations, [*SLEEPING, "1f1b", *OURS, *THEIRS * peer], strict=True)
    )
    targets = {target.what: target for target in report.targets}
    for name, units in SLEEPING.items():
        row = rows["sleeping stages", name]
        assert row.values == {"simulated": pytest.approx(units * 2e-3)}
        assert row.times.minimum >= units * 2e-3
        target = targets.pop(f"sleeping stages, {name}, step over simulated")
        assert target.value == row.times.median / row.values["simulated"] >= 1
    action = rows["an action", "1f1b"].times.median
    assert targets.pop("added to an action, us").value == action * 1e6
    over = {
        name: row.times.median / row.values["simulated"]
        for (operation, name), row in rows.items()
        if operation == "pipeline step" and "alone" not in name
    }
    assert list(over) == [*OURS[:2], *THEIRS[:2]][: 2 + 2 * peer]
    for ours, theirs in zip(OURS[:2], THEIRS[:2], strict=True) if peer else ():
        target = targets.pop(f"{ours}, step over simulated, over torch's")
        assert target.value == over[ours] / over[theirs]
    assert not targets


def test_steps_are_compared_with_what_their_schedules_say() -> None:
    parser = argparse.ArgumentParser()
    pipeline.configure(parser)
    options = parser.parse_args([*WORDS, "--repeats", "2", "--no-torch"])
    reports = run_ranks(2, pipeline.run, options)
    for report in reports:
        assert "torch was left out" in report.notes
    check(reports[0], peer=False)


@pytest.mark.full
@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.timeout(120)
def test_the_command_measures_torch_beside_it(mpirun, tmp_path) -> None:
    if find_spec("torch") is None:
        pytest.skip("torch is missing")
    bench(mpirun, tmp_path / "r", "pipeline", *WORDS, "--repeats", "5")
    check(Report.load(tmp_path / "r"), peer=True)
    assert "load average" in json.loads((tmp_path / "r").read_text())["notes"][-1]
