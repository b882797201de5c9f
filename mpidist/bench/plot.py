"""A report as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpidist._optional import require
from mpidist.bench.report import BOUND, GLOO, LIBRARY, ORDINARY, REGISTERED, Report, Row
from mpidist.bench.sizes import tell_size

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
    One column per operation: above, the median time with a band up to the 95th percentile; below,
    where bytes are moved, the bus bandwidth. All axes are logarithmic. Local: call it on one rank.
    No display is needed, and matplotlib's global state is not touched.
    """
    require("matplotlib", extra="bench", purpose="plot_report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(row.operation for row in report.rows))
    moving = any(row.bus_bandwidth for row in report.rows)
    columns = len(operations)
    figure = Figure(figsize=(max(4.4 * columns, 7.0), 8.2 if moving else 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + moving, columns, squeeze=False)
    for column, operation in enumerate(operations):
        rows = [row for row in report.rows if row.operation == operation]
        _draw_times(axes[0][column], rows)
        axes[0][column].set_title(operation, fontsize=11)
        if moving:
            _draw_bandwidths(axes[1][column], rows)
    machine = report.machine
    where = f"{machine.ranks} ranks, {machine.mpi or 'no MPI'}, {machine.processor}, {machine.date}"
    figure.suptitle(f"mpidist bench {report.benchmark}\n{where}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)


def _draw_times(axes: Any, rows: Sequence[Row]) -> None:
    lines = _draw(axes, rows, lambda row: row.times.median * 1e6)
    for each, line in lines:
        axes.fill_between(
            [row.nbytes for row in each],
            [row.times.median * 1e6 for row in each],
            [row.times.p95 * 1e6 for row in each],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    axes.set_ylabel("time (µs), up to the 95th percentile")


def _draw_bandwidths(axes: Any, rows: Sequence[Row]) -> None:
    _draw(axes, rows, lambda row: (row.bus_bandwidth or float("nan")) / 1e9)
    axes.set_ylabel("bus bandwidth (GB/s)")


def _draw(
    axes: Any, rows: Sequence[Row], value: Callable[[Row], float]
) -> list[tuple[list[Row], Any]]:
    """Draw a line per series, and return them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    drawn, others = [], iter(_OTHERS * 4)
    for name in dict.fromkeys(row.series for row in rows):
        each = [row for row in rows if row.series == name]
        style = {"linewidth": 1.6, "markersize": 4} | dict(
            _STYLES.get(name) or {"color": next(others), "marker": "D"}
        )
        (line,) = axes.plot([r.nbytes for r in each], list(map(value, each)), label=name, **style)
        drawn.append((each, line))
    axes.set(xscale="log", yscale="log", xlabel="bytes of the array")
    sizes = sorted({row.nbytes for row in rows})
    step = -(-len(sizes) // 7)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::-step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: tell_size(int(size))))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", labelrotation=35)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
