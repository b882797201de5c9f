"""Reports as values: formulas, comparisons, and JSON there and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mpidist.bench.report import LIBRARY, REGISTERED, Comparison, Measure, Report, bus_factor
from tests.bench.reports import REPORT, row


@pytest.mark.parametrize(
    ("operation", "ranks", "expected"),
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 4, 1.5),
        ("all_gather", 4, 0.75),
        ("reduce_scatter", 8, 0.875),
        ("all_to_all", 2, 0.5),
        ("broadcast", 5, 1.0),
        ("reduce", 5, 1.0),
        ("ping-pong", 2, 1.0),
        ("barrier", 2, None),
        ("step", 2, None),
    ],
)
def test_bus_factors_are_those_of_nccl_tests(
    operation: str, ranks: int, expected: float | None
) -> None:
    assert bus_factor(operation, ranks) == expected


def test_bandwidth_is_size_over_time() -> None:
    one = row(REGISTERED, 3_000_000, 2e-3)
    assert one.algorithm_bandwidth == pytest.approx(1.5e9)
    assert one.bus_bandwidth == pytest.approx(2.25e9)


def test_what_moves_no_bytes_has_no_bandwidth() -> None:
    one = row(REGISTERED, 4, 1.0, operation="step")
    assert one.algorithm_bandwidth is None
    assert one.bus_bandwidth is None


def test_a_speedup_is_above_one_where_the_series_is_faster() -> None:
    speedup = Comparison("", REGISTERED, LIBRARY)
    assert REPORT.compare(speedup, "all_reduce", 1 << 20) == pytest.approx(2.5)
    assert REPORT.compare(speedup, "all_reduce", 4) == pytest.approx(0.5)


def test_added_time_is_a_difference() -> None:
    added = Comparison("", REGISTERED, LIBRARY, Measure.ADDED)
    assert REPORT.compare(added, "all_reduce", 4) == pytest.approx(2e-6)


def test_a_missing_series_cannot_be_compared() -> None:
    assert REPORT.compare(Comparison("", REGISTERED, "Gloo"), "all_reduce", 4) is None
    assert REPORT.compare(Comparison("", REGISTERED, LIBRARY), "all_reduce", 8) is None


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == dataclasses.replace(
        REPORT, rows=tuple(REPORT.rows)
    )


def test_json_holds_percentiles_and_bandwidths() -> None:
    written = json.loads(REPORT.to_json())["rows"][2]
    assert written["times"]["p95"] == 200e-6
    assert written["algorithm_bandwidth"] == pytest.approx((1 << 20) / 100e-6)
    assert written["bus_bandwidth"] == pytest.approx(1.5 * (1 << 20) / 100e-6)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 99}'])
def test_another_document_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a JSON object with format 1"):
        Report.from_json(text)
