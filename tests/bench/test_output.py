"""The table and the picture of a report."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mpidist.bench.rendering import plot_report, render_table
from mpidist.bench.report import Machine, Report
from mpidist.testing import run_ranks
from tests.bench.reports import REPORT, row

TEXT = render_table(REPORT)


def cells(first: str) -> list[str]:
    """Return the cells of the line of the table that begins so."""
    (line,) = [line for line in TEXT.splitlines() if line.strip().startswith(first)]
    return re.split(r"\s{2,}", line.strip())


def test_a_line_has_times_ratios_and_bandwidths() -> None:
    assert cells("1 MiB") == [
        "1 MiB",
        "100 (200)",
        "250 (500)",
        "2.50",
        "-150.00 us",
        "10.5",
        "15.7",
    ]


def test_heads_name_series_and_comparisons_that_were_measured() -> None:
    series, comparisons = ["registered", "library"], ["reg/library", "added"]
    assert cells("size") == ["size", *series, *comparisons, "alg GB/s", "bus GB/s"]


def test_everything_that_was_said_is_there() -> None:
    words = ["$ mpirun -n 4 python -m mpidist bench all_reduce", "registered: ours"]
    words += ["Gloo is missing", "FAILED: too slow", *REPORT.machine.lines()]
    assert [word for word in words if word not in TEXT] == []


def test_a_series_that_lacks_a_size_leaves_a_gap() -> None:
    report = dataclasses.replace(REPORT, rows=REPORT.rows[:3])
    assert re.search(r"1 MiB +100 \(200\) +10\.5", render_table(report))


def test_without_sizes_there_is_no_column_for_them() -> None:
    rows = [row("registered", 0, 1e-3, operation="step")]
    text = render_table(dataclasses.replace(REPORT, rows=rows, comparisons=()))
    assert "size" not in text
    assert "1,000 (2,000)" in text
    assert "GB/s" not in text


def several() -> Report:
    rows = [row("registered", 1 << size, 1e-6 * size) for size in range(2, 20)]
    rows += [row("another", 4, 1e-6, operation="broadcast")]
    return dataclasses.replace(REPORT, rows=rows)


def step() -> Report:
    rows = [row(name, 0, 1e-3, operation="step") for name in ("one", "two")]
    return dataclasses.replace(REPORT, rows=rows)


@pytest.mark.parametrize("report", [REPORT, several(), step()], ids=["one", "several", "bars"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(report: Report, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    plot_report(report, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == "png" else b"</svg>" in data
    assert len(data) > 5000


def test_a_machine_is_described() -> None:
    (machine,) = run_ranks(1, Machine.of)
    assert machine.cores >= machine.usable_cores >= 1
    assert machine.memory_bytes > 2**26
    assert machine.ranks == machine.nodes == 1
    assert machine.mpi == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", machine.date)
    assert machine.processor
    assert machine.lines()[0].startswith("1 rank on 1 node with ")
