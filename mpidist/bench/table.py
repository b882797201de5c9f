"""A report as text."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist._formatting import columns, format_bytes, format_number
from mpidist.bench.report import Measure, Report, Row, Target

__all__ = ["render_table"]


def render_table(report: Report) -> str:
    """Lay a report out as text: the machine, one table per operation, and what it says.

    Parameters
    ----------
    report : Report
        What a benchmark found.

    Returns
    -------
    str
        Lines of text. Targets come first. A row is a size; each series has its median time and in
        parentheses its 95th percentile, in microseconds. Comparisons are of the medians. Bandwidths
        are those of the first series, in 10**9 bytes per second.
    """
    blocks = [[f"mpidist bench {report.benchmark}", *report.machine.lines()]]
    if report.command:
        blocks[0].append(f"$ {' '.join(report.command)}")
    if report.targets:
        blocks.append(["targets", _targets(report.targets)])
    operations = list(dict.fromkeys(row.operation for row in report.rows))
    blocks += [[operation, _table(report, operation)] for operation in operations]
    legend = [f"{name}: {text}" for name, text in report.legend.items()]
    explained = "times in us: median (95th percentile), each of the slowest rank"
    if any(row.bus_factor is not None for row in report.rows):
        explained += "; bandwidths of the first series"
    blocks.append([explained, *legend])
    blocks += [list(report.notes), [f"FAILED: {text}" for text in report.failures]]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _table(report: Report, operation: str) -> str:
    rows = [row for row in report.rows if row.operation == operation]
    series = list(dict.fromkeys(row.series for row in rows))
    sizes = list(dict.fromkeys(row.nbytes for row in rows))
    compared = [c for c in report.comparisons if {c.series, c.reference} <= set(series)]
    wide = any(row.bus_factor is not None for row in rows)
    sized = sizes != [0]
    heads = [*["size"] * sized, *series, *(comparison.title for comparison in compared)]
    lines: list[list[str]] = []
    for size in sizes:
        line: list[str] = [format_bytes(size)] if sized else []
        line += [_time(report.find(operation, name, size)) for name in series]
        for comparison in compared:
            value = report.compare(comparison, operation, size)
            line.append(_compared(value, comparison.measure))
        if wide:
            line += _bandwidths(report.find(operation, series[0], size))
        lines.append(line)
    if wide:
        heads += ["alg GB/s", "bus GB/s"]
    return "\n".join(columns(heads, lines, ruled=True))


def _targets(targets: Sequence[Target]) -> str:
    lines = [
        (
            target.what,
            format_number(target.value),
            f"at {'most' if target.most else 'least'} {target.bound:g}",
            "yes" if target.reached else "no",
            target.detail,
        )
        for target in targets
    ]
    return "\n".join(columns(("", "measured", "target", "reached", ""), lines, left=2, ruled=True))


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{format_number(row.times.median * 1e6)} ({format_number(row.times.p95 * 1e6)})"


def _compared(value: float | None, measure: Measure) -> str:
    if value is None:
        return ""
    return f"{value * 1e6:+.2f} us" if measure is Measure.ADDED else f"{value:.2f}"


def _bandwidths(row: Row | None) -> Sequence[str]:
    if row is None or row.algorithm_bandwidth is None or row.bus_bandwidth is None:
        return ("", "")
    return (format_number(row.algorithm_bandwidth / 1e9), format_number(row.bus_bandwidth / 1e9))
