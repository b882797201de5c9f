"""A report as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidist._formatting import format_bytes
from mpidist._optional import require
from mpidist.bench.report import BOUND, GLOO, LIBRARY, ORDINARY, REGISTERED, Report, Row

__all__ = ["plot_report"]

# Okabe and Ito's colours: told apart with any colour vision; marks and dashes help in grey print.
_STYLES: Mapping[str, Mapping[str, Any]] = {
    REGISTERED: {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 4},
    ORDINARY: {"color": "#56B4E9", "marker": "s"},
    LIBRARY: {"color": "#D55E00", "marker": "^"},
    GLOO: {"color": "#009E73", "marker": "v"},
    BOUND: {"color": "0.35", "linestyle": "--", "linewidth": 1.2},
}
_OTHERS = ("#CC79A7", "#E69F00", "#F0E442", "#000000")


def plot_report(report: Report, path: Path) -> None:
    """Draw time and bandwidth over size into a file.

    Parameters
    ----------
    report : Report
        What a benchmark found.
    path : Path
        Where to write; the suffix decides the format, such as ``.png`` or ``.svg``.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.

    Notes
    -----
    For each operation the median time with a band up to the 95th percentile and, where bytes are
    moved, the bus bandwidth; these axes are logarithmic. An operation without sizes is a bar per
    series, with a line from the 5th to the 95th percentile. Local: call it on one rank. No display
    is needed, and matplotlib's global state is not touched.
    """
    require("matplotlib", extra="bench", purpose="plot_report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(report)
    rows, columns = len(panels), len(panels[0])
    figure = Figure(figsize=(max(4.0 * columns, 6.5), 4.1 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    styles = _styles(report)
    labels: dict[str, Any] = {}
    for line, drawn in zip(figure.subplots(rows, columns, squeeze=False), panels, strict=True):
        for axes, (draw, each) in zip(line, drawn, strict=True):
            draw(axes, each, styles)
            handles, names = axes.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
    machine = report.machine
    where = [f"{machine.ranks} ranks" * (machine.ranks > 1), machine.mpi, machine.processor]
    words = ", ".join(filter(None, [*where, machine.date]))
    figure.suptitle(f"mpidist bench {report.benchmark}\n{words}", fontsize=10)
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=6, frameon=False
    )
    figure.savefig(path, dpi=130)


_Draw = Callable[[Any, Sequence[Row], Mapping[str, Mapping[str, Any]]], None]


def _panels(report: Report) -> list[list[tuple[_Draw, Sequence[Row]]]]:
    """Return the lines of panels: one operation beside its bandwidth, several above theirs."""
    operations = list(dict.fromkeys(row.operation for row in report.rows))
    per = [[row for row in report.rows if row.operation == name] for name in operations]
    sized = [rows for rows in per if any(row.nbytes for row in rows)]
    if not sized:
        return [[(_draw_bars, rows) for rows in per]]
    times: list[tuple[_Draw, Sequence[Row]]] = [(_draw_times, rows) for rows in sized]
    if any(row.bus_bandwidth is None for rows in sized for row in rows):
        return [times]
    speeds: list[tuple[_Draw, Sequence[Row]]] = [(_draw_bandwidths, rows) for rows in sized]
    return [[*times, *speeds]] if len(sized) == 1 else [times, speeds]


def _styles(report: Report) -> Mapping[str, Mapping[str, Any]]:
    """Return how each series of a report is drawn, the same in all panels."""
    others = iter(_OTHERS * len(report.rows))
    return {
        name: {"linewidth": 1.6, "markersize": 4}
        | dict(_STYLES.get(name) or {"color": next(others), "marker": "D"})
        for name in dict.fromkeys(row.series for row in report.rows)
    }


def _draw_times(axes: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> None:
    _draw_lines(axes, rows, styles, lambda row: row.times.median * 1e6)
    for name in dict.fromkeys(row.series for row in rows):
        each = [row for row in rows if row.series == name]
        axes.fill_between(
            [row.nbytes for row in each],
            [row.times.median * 1e6 for row in each],
            [row.times.p95 * 1e6 for row in each],
            color=styles[name]["color"],
            alpha=0.13,
            linewidth=0,
        )
    axes.set(title=rows[0].operation, ylabel="time (µs): median to 95th percentile")


def _draw_bandwidths(
    axes: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    _draw_lines(axes, rows, styles, lambda row: (row.bus_bandwidth or float("nan")) / 1e9)
    axes.set(title=rows[0].operation, ylabel="bus bandwidth (GB/s)")


def _draw_lines(
    axes: Any,
    rows: Sequence[Row],
    styles: Mapping[str, Mapping[str, Any]],
    value: Callable[[Row], float],
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for name in dict.fromkeys(row.series for row in rows):
        each = [row for row in rows if row.series == name]
        axes.plot([row.nbytes for row in each], list(map(value, each)), label=name, **styles[name])
    axes.set(xscale="log", yscale="log", xlabel="size of the array")
    sizes = sorted({row.nbytes for row in rows})
    step = -(-len(sizes) // 7)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::-step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(int(size))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.tick_params(axis="x", labelrotation=30)
    _tidy(axes)


def _draw_bars(axes: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> None:
    for row in rows:
        times = row.times
        axes.barh(row.series, times.median * 1e3, color=styles[row.series]["color"], height=0.5)
        ends = [times.p5 * 1e3, times.p95 * 1e3]
        axes.plot(ends, [row.series] * 2, color="0.2", linewidth=1.5, marker="|", markersize=7)
    axes.set(title=rows[0].operation, xlabel="time (ms): median, 5th to 95th percentile")
    axes.set_xlim(left=0)
    axes.margins(y=0.2)
    axes.invert_yaxis()  # the first one above
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
