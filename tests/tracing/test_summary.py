"""The summary's figures, counted by hand, and how they are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpidist import cli
from mpidist.tracing.parts import TracePart, TraceRow
from mpidist.tracing.summary import (
    CallTime,
    Lateness,
    StepTime,
    Summary,
    TransferTime,
    load,
    summarise,
)
from tests.tracing.format import check_trace
from tests.tracing.parts import MS, part, row, trace_of

SUM = "all_reduce SUM float32[1000]"


def steps(late: dict[int, list[float]], count: int, ranks: int) -> list[TracePart]:
    """Make steps of 100 ms: 10 ms, what the rank is late, a sum that ends at 80 ms."""
    parts = []
    for rank in range(ranks):
        rows: list[TraceRow] = []
        for step in range(count):
            begin = 100 * step
            arrival = begin + 10 + late.get(rank, [0.0] * count)[step]
            rows.append(row("blocking", SUM, arrival, begin + 80, step + 1))
            rows.append(row("region", "step", begin, begin + 100))
        parts.append(part(rank, rows, ended=100 * count, size=ranks))
    return parts


def summary_of(parts: list[TracePart], directory: Path) -> Summary:
    return summarise(trace_of(parts, directory))


def test_compute_and_communication_make_up_the_wall_time(tmp_path: Path) -> None:
    rows = [
        row("blocking", SUM, 10, 30, 1),
        row("blocking", "barrier", 12, 20, 2),  # inside another one
        row("immediate", f"i{SUM}", 40, 80, 3),
        row("immediate", f"i{SUM}", 50, 90, 4),
        row("wait", f"i{SUM}", 70, 80, 3),
        row("wait", f"i{SUM}", 80, 90, 4),
    ]
    summary = summary_of([part(0, rows, size=1)], tmp_path)
    (rank,) = summary.ranks
    assert rank.wall == pytest.approx(0.100)
    assert rank.communication == pytest.approx(0.040)
    assert rank.compute == pytest.approx(0.060)
    assert rank.in_flight == pytest.approx(0.050)
    assert rank.hidden == pytest.approx(0.6)
    assert rank.waiting == 0


def test_nothing_in_flight_hides_nothing(tmp_path: Path) -> None:
    (rank,) = summary_of([part(0, [], size=1)], tmp_path).ranks
    assert (rank.compute, rank.in_flight, rank.hidden) == (pytest.approx(0.1), 0, None)


def test_the_time_for_late_ranks_is_what_the_others_waited(tmp_path: Path) -> None:
    summary = summary_of(steps({2: [20, 30]}, 2, 3), tmp_path)
    assert [rank.waiting for rank in summary.ranks] == pytest.approx([0.050, 0.050, 0])


def test_the_slowest_rank_of_each_step_is_the_one_that_was_waited_for(tmp_path: Path) -> None:
    late = {2: [20, 0, 30, 5], 1: [1, 40, 2, 3]}
    summary = summary_of(steps(late, 4, 4), tmp_path)
    expected = [(0, 2, 0.020), (1, 1, 0.040), (2, 2, 0.030), (3, 2, 0.005)]
    assert [
        (step.step, step.last, pytest.approx(step.behind)) for step in summary.steps
    ] == expected
    assert all(step.seconds == pytest.approx(0.1) for step in summary.steps)
    first, second = summary.lateness
    assert (first.rank, first.steps) == (2, 3)
    assert (first.mean, first.worst) == (pytest.approx(0.055 / 3), pytest.approx(0.030))
    assert (second.rank, second.steps, second.mean) == (1, 1, pytest.approx(0.040))


def test_a_step_in_which_nobody_waited_has_no_slowest_rank(tmp_path: Path) -> None:
    summary = summary_of(steps({}, 1, 2), tmp_path)
    assert summary.steps == [StepTime(0, pytest.approx(0.1), None, 0.0)]
    assert summary.lateness == []


def test_what_lies_between_steps_belongs_to_none(tmp_path: Path) -> None:
    parts = []
    for rank in range(2):
        rows = [row("region", "step", 0, 40), row("region", "step", 60, 100)]
        rows += [row("blocking", SUM, 45 + rank * 5, 55, 1)]
        rows += [row("blocking", SUM, 65 + rank * 10, 80, 2)]
        parts.append(part(rank, rows))
    summary = summary_of(parts, tmp_path)
    assert [step.last for step in summary.steps] == [None, 1]
    assert summary.ranks[0].waiting == pytest.approx(0.015)


def test_without_steps_it_says_so_and_goes_on(tmp_path: Path) -> None:
    summary = summary_of([part(0, [row("blocking", SUM, 1, 2, 1)], size=1)], tmp_path)
    assert summary.steps == []
    assert summary.notes == [
        'no steps: put each in `with mpidist.region("step"):`, as mpidist.train does'
    ]


def test_only_steps_of_all_ranks_count(tmp_path: Path) -> None:
    parts = [*steps({}, 3, 2)[:1], *steps({}, 2, 2)[1:]]
    summary = summary_of(parts, tmp_path)
    assert len(summary.steps) == 2
    assert "the ranks made from 2 to 3 steps; the first ones count" in summary.notes


def test_operations_are_added_up_by_place(tmp_path: Path) -> None:
    rows = [
        row("blocking", SUM, 0, 10, 1),
        row("blocking", SUM, 20, 25, 2),
        row("blocking", SUM, 30, 40, 3, site="other.py:5"),
        row("immediate", f"i{SUM}", 50, 60, 4),
        row("wait", f"i{SUM}", 55, 60, 4),
    ]
    summary = summary_of([part(0, rows, size=1)], tmp_path)
    assert summary.calls == [
        CallTime("all_reduce", "train.py:1", 2, pytest.approx(0.015), 0, 8000),
        CallTime("all_reduce", "other.py:5", 1, pytest.approx(0.010), 0, 4000),
        CallTime("iall_reduce", "train.py:1", 1, pytest.approx(0.005), 0, 4000),
    ]


def test_transfers_of_units_are_hidden_but_for_what_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = []
    for rank in range(2):
        rows = [
            row("region", "step", 0, 60),
            row("transfer", "unit 10: reduce", 10, 50, 15 * MS),
            row("transfer", "unit 9: gather", 20, 25, 0),
            row("transfer", "unit 9: gather", 30, 35 + rank, 5 * MS),
            row("transfer", "unit 9: gather", 70, 80, 10 * MS),  # in no step
        ]
        parts.append(part(rank, rows))
    document = trace_of(parts, tmp_path)
    check_trace(document)
    summary = summarise(document)
    seconds = [0.021, 0.011, 0.010, 0.080, 0.050, 0.030]
    assert summary.transfers == [
        TransferTime("unit 9: gather", 4, *map(pytest.approx, seconds[:3])),
        TransferTime("unit 10: reduce", 2, *map(pytest.approx, seconds[3:])),
    ]
    assert [rank.in_flight for rank in summary.ranks] == [0, 0]  # of its operations alone
    assert run("summary", str(tmp_path / "trace.json")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["80.00", "50.00", "30.00", "2", "15.00", "unit", "10:", "reduce"] in lines


def run(*words: str) -> int:
    return cli.main(["trace", *words])


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace_of(steps({2: [20, 25, 30]}, 3, 4), tmp_path)
    assert run("summary", str(tmp_path / "trace.json"), "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"$ python -m mpidist trace summary {tmp_path}")
    assert lines[1] == "4 ranks on 1 host; times in ms"
    assert lines[3].split()[:4] == ["rank", "wall", "compute", "communication"]
    assert lines[6].split() == ["2", "300.00", "165.00", "135.00", "0.00", "0.00", "node0"]
    assert "3 steps, median 100.00, longest 100.00" in lines
    assert ["2", "3", "of", "3", "25.00", "30.00"] in [line.split() for line in lines]
    worst = lines[lines.index("Steps with the longest waiting") + 2 :]
    assert [line.split() for line in worst[:2]] == [
        ["2", "100.00", "2", "30.00"],
        ["1", "100.00", "2", "25.00"],
    ]
    assert len(worst) == 2
    assert max(map(len, lines[1:])) <= 100


def test_the_command_gives_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = trace_of(steps({1: [20]}, 1, 2), tmp_path)
    assert run("summary", str(tmp_path / "trace.json"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    summary = summarise(document)
    assert told["ranks"][0]["wall"] == summary.ranks[0].wall
    assert told["steps"] == [{"step": 0, "seconds": 0.1, "last": 1, "behind": 0.02}]
    assert Lateness(**told["lateness"][0]) == summary.lateness[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no json", "is no JSON document"),
        (b"\x1f\x8bno gzip", "is no JSON document"),
        (b"[]", "is no trace that mpidist.trace"),
        (b'{"traceEvents": []}', "is no trace that mpidist.trace"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, content: bytes, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert run("summary", str(path)) == 2
    assert told in capsys.readouterr().err
    with pytest.raises(ValueError, match=told):
        load(path)


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("summary", str(tmp_path / "none")) == 2
    assert "No such file" in capsys.readouterr().err


def left_behind(directory: Path, parts: list[TracePart]) -> Path:
    where = directory / "run.json.parts"
    where.mkdir()
    for each in parts:
        (where / f"rank-{each.facts['rank']:05d}.jsonl.gz").write_bytes(each.data)
    return where


def test_parts_of_a_broken_job_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = left_behind(tmp_path, steps({1: [20]}, 1, 3)[1:])
    assert run("merge", str(where)) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.json'}: 2 of 3 ranks\n"
    summary = summarise(load(tmp_path / "run.json"))
    assert [rank.rank for rank in summary.ranks] == [1, 2]
    assert summary.notes == ["nothing is known of rank 0"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"run": "2"}, "holds parts of several traces"),
        ({"format": 99}, "no part of a trace of format 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, more: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def make() -> Path:
        return left_behind(tmp_path, [part(0, []), part(1, [], **more)])

    if "format" in more:
        with pytest.raises(ValueError, match=told):
            make()
        return
    assert run("merge", str(make())) == 2
    assert told in capsys.readouterr().err


def test_a_directory_without_parts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("merge", str(tmp_path)) == 2
    assert "does not end with .parts" in capsys.readouterr().err
    assert run("merge", str(tmp_path), "--out", str(tmp_path / "x")) == 2
    assert "holds no rank's part" in capsys.readouterr().err
