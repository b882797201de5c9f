"""Reports as text and as pictures, and plans as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpidist._formatting import columns, format_bytes, format_number
from mpidist._optional import require
from mpidist.bench.model import JobLayout
from mpidist.bench.predictions import Fitted, JobPlan, Step
from mpidist.bench.report import (
    BOUND,
    GLOO,
    LIBRARY,
    LINK,
    ORDINARY,
    REGISTERED,
    Measure,
    Report,
    Row,
    Target,
)


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
    blocks += [[name, _table(report, name, rows)] for name, rows in _by_operation(report).items()]
    legend = [f"{name}: {text}" for name, text in report.legend.items()]
    explained = "times in us: median (95th percentile), each of the slowest rank"
    if any(row.bus_factor is not None for row in report.rows):
        explained += "; bandwidths of the first series"
    blocks.append([explained, *legend])
    blocks += [list(report.notes), [f"FAILED: {text}" for text in report.failures]]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _by_operation(report: Report) -> dict[str, list[Row]]:
    by_operation: dict[str, list[Row]] = {}
    for row in report.rows:
        by_operation.setdefault(row.operation, []).append(row)
    return by_operation


def _by_series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    by_series: dict[str, list[Row]] = {}
    for row in rows:
        by_series.setdefault(row.series, []).append(row)
    return by_series


def _table(report: Report, operation: str, rows: Sequence[Row]) -> str:
    series = list(_by_series(rows))
    sizes = list(dict.fromkeys(row.nbytes for row in rows))
    compared = [c for c in report.comparisons if {c.series, c.reference} <= set(series)]
    wide = any(row.bus_factor is not None for row in rows)
    sized = sizes != [0]
    heads = [*["size"] * sized, *series, *(c.title for c in compared)]
    heads += ["alg GB/s", "bus GB/s"] * wide
    lines: list[list[str]] = []
    for size in sizes:
        line = [format_bytes(size)] * sized
        line += [_time(report.find(operation, name, size)) for name in series]
        line += [_compared(report.compare(c, operation, size), c.measure) for c in compared]
        if wide:
            line += _bandwidths(report.find(operation, series[0], size))
        lines.append(line)
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


# Okabe and Ito's colours: told apart with any colour vision; marks and dashes help in grey print.
_STYLES: Mapping[str, Mapping[str, Any]] = {
    REGISTERED: {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 4},
    ORDINARY: {"color": "#56B4E9", "marker": "s"},
    LIBRARY: {"color": "#D55E00", "marker": "^"},
    GLOO: {"color": "#009E73", "marker": "v"},
    LINK: {"color": "0.35", "linestyle": ":", "linewidth": 1.2},
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
        for axes, (draw, panel_rows) in zip(line, drawn, strict=True):
            draw(axes, panel_rows, styles)
            handles, names = axes.get_legend_handles_labels()
            labels |= dict(zip(names, handles, strict=True))
    machine = report.machine
    where = [f"{machine.ranks} ranks" * (machine.ranks > 1), machine.mpi, machine.processor]
    subtitle = ", ".join(filter(None, [*where, machine.date]))
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=6, frameon=False
    )
    _save(figure, path, f"mpidist bench {report.benchmark}\n{subtitle}")


Styles: TypeAlias = Mapping[str, Mapping[str, Any]]
_Draw = Callable[[Any, Sequence[Row], Styles], None]


def _panels(report: Report) -> list[list[tuple[_Draw, Sequence[Row]]]]:
    """Return the lines of panels: one operation beside its bandwidth, several above theirs."""
    per = list(_by_operation(report).values())
    sized = [rows for rows in per if any(row.nbytes for row in rows)]
    if not sized:
        return [[(_draw_bars, rows) for rows in per]]
    times: list[tuple[_Draw, Sequence[Row]]] = [(_draw_times, rows) for rows in sized]
    if any(row.bus_bandwidth is None for rows in sized for row in rows):
        return [times]
    speeds: list[tuple[_Draw, Sequence[Row]]] = [(_draw_bandwidths, rows) for rows in sized]
    return [[*times, *speeds]] if len(sized) == 1 else [times, speeds]


def _styles(report: Report) -> Styles:
    """Return how each series of a report is drawn, the same in all panels."""
    others = iter(_OTHERS * len(report.rows))
    return {
        name: {"linewidth": 1.6, "markersize": 4}
        | dict(_STYLES.get(name) or {"color": next(others), "marker": "D"})
        for name in dict.fromkeys(row.series for row in report.rows)
    }


def _draw_times(axes: Any, rows: Sequence[Row], styles: Styles) -> None:
    _draw_lines(axes, rows, styles, lambda row: row.times.median * 1e6)
    for name, of_series in _by_series(rows).items():
        axes.fill_between(
            [row.nbytes for row in of_series],
            [row.times.median * 1e6 for row in of_series],
            [row.times.p95 * 1e6 for row in of_series],
            color=styles[name]["color"],
            alpha=0.13,
            linewidth=0,
        )
    axes.set(title=rows[0].operation, ylabel="time (µs): median to 95th percentile")


def _draw_bandwidths(axes: Any, rows: Sequence[Row], styles: Styles) -> None:
    _draw_lines(axes, rows, styles, lambda row: (row.bus_bandwidth or float("nan")) / 1e9)
    axes.set(title=rows[0].operation, ylabel="bus bandwidth (GB/s)")


def _draw_lines(
    axes: Any, rows: Sequence[Row], styles: Styles, value: Callable[[Row], float]
) -> None:
    for name, of_series in _by_series(rows).items():
        sizes = [row.nbytes for row in of_series]
        axes.plot(sizes, [value(row) for row in of_series], label=name, **styles[name])
    axes.set(xscale="log", yscale="log")
    _size_axis(axes, sorted({row.nbytes for row in rows}))
    axes.tick_params(axis="x", labelrotation=30)
    _tidy(axes)


def _draw_bars(axes: Any, rows: Sequence[Row], styles: Styles) -> None:
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
    from matplotlib.ticker import FuncFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _size_axis(axes: Any, sizes: Sequence[int]) -> None:
    """Mark at most eight of the sizes, rising ones, in their units."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    step = -(-len(sizes) // 7)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::-step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(int(size))))
    axes.set_xlabel("size of the array")


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


# Okabe and Ito's colours, told apart with any colour vision: what was measured.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_EXTRAPOLATED: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.3}
_POINTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "zorder": 5}


def plot_plan(plan: JobPlan, reports: Mapping[str, Report], path: Path) -> None:
    """Draw a plan, made from these reports, into a file; the suffix decides the format.

    Points are measured medians, solid lines the model where something was measured, dashed lines
    where nothing was. Below, how far the model is off at each point. Beside it, if there are
    steps, what they take on more nodes, over the same step without communication: between the
    dashed line and the dotted one, more or less of the network's time is hidden behind the backward
    pass.
    """
    require("matplotlib", extra="bench", purpose="plot_plan")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 12.5 if plan.steps else 7.5
    figure = Figure(figsize=(width, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = ["time", "time", "time", "off"]
    mosaic: Any = [[row, "steps"] if plan.steps else [row] for row in rows]
    axes = figure.subplot_mosaic(mosaic)
    axes["off"].sharex(axes["time"])
    _draw_all_reduce(axes["time"], plan)
    _draw_errors(axes["off"], plan.fitted)
    _size_axis(axes["off"], sorted({p.nbytes for node in plan.fitted for p in node.points}))
    if plan.steps:
        _draw_steps(axes["steps"], plan.steps)
        handles = axes["steps"].get_legend_handles_labels()
        figure.legend(*handles, fontsize=8, frameon=False, loc="outside lower right", ncols=3)
    _save(figure, path, _title(plan, reports))


def _title(plan: JobPlan, reports: Mapping[str, Report]) -> str:
    machine = next(iter(reports.values())).machine
    parts = [f"measured on {machine.processor}, {machine.mpi}, {machine.date}"]
    network = plan.model.network
    if network is not None:
        parts.append(
            f"network, {plan.network_source}: {network.latency * 1e6:.3g} µs, "
            f"{network.bandwidth / 1e9:.3g} GB/s per node"
        )
    return "mpidist plan: all_reduce of registered float32\n" + "; ".join(parts)


def _draw_all_reduce(axes: Any, plan: JobPlan) -> None:
    from matplotlib import colormaps

    model = plan.model
    sizes = np.array([point.nbytes for node in plan.fitted for point in node.points])
    grid = np.geomspace(sizes.min(), sizes.max(), 200)
    for node, color in zip(plan.fitted, _cycle(plan.fitted), strict=False):
        ranks = node.fit.ranks
        points = [(point.nbytes, point.seconds * 1e6) for point in node.points]
        axes.plot(
            *zip(*points, strict=True), **_POINTS, color=color, label=f"{ranks} ranks, measured"
        )
        times = [model.all_reduce(n, ranks=ranks) * 1e6 for n in grid]
        axes.plot(grid, times, color=color, linewidth=1.6, label=f"{ranks} ranks, model")
    measured = {JobLayout(1, node.fit.ranks) for node in plan.fitted}
    others = [
        layout
        for layout in dict.fromkeys(prediction.layout for prediction in plan.predictions)
        if layout not in measured
    ]
    shades = colormaps["plasma"](np.linspace(0.05, 0.8, max(len(others), 1)))
    for layout, shade in zip(others, shades, strict=False):
        times = [model.all_reduce(n, ranks=layout.ranks, nodes=layout.nodes) * 1e6 for n in grid]
        label = f"{_layout_label(layout)}, extrapolated"
        axes.plot(grid, times, color=shade, label=label, **_EXTRAPOLATED)
    axes.set(xscale="log", yscale="log", ylabel="time (µs)")
    axes.set_title("all_reduce", fontsize=10)
    axes.tick_params(labelbottom=False)
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _draw_errors(axes: Any, fitted: Sequence[Fitted]) -> None:
    axes.axhline(0, color="0.3", linewidth=0.8)
    for node, color in zip(fitted, _cycle(fitted), strict=False):
        at = [point.nbytes for point in node.points]
        off = [(node.fit.time(point.nbytes) / point.seconds - 1) * 100 for point in node.points]
        label = f"median {node.errors.median:.0%}, worst {node.errors.worst:.0%}"
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 0.8}
        axes.plot(at, off, label=label, **style)
    axes.set(ylabel="model is off (%)")
    axes.margins(y=0.25)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    _tidy(axes)


def _draw_steps(axes: Any, steps: Sequence[Step]) -> None:
    """Draw what a step takes, as a multiple of one without communication, over the nodes."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    models = list(dict.fromkeys(step.parameters for step in steps))
    on_a_node = sorted({step.layout.ranks for step in steps})
    for parameters, color in zip(models, _cycle(models), strict=False):
        for ranks, marker in zip(on_a_node, "os^vD" * len(on_a_node), strict=False):
            own = [s for s in steps if (s.parameters, s.layout.ranks) == (parameters, ranks)]
            _draw_line(axes, own, {"color": color, "marker": marker, "markersize": 5})
        alone = next(step.alone for step in steps if step.parameters == parameters)
        label = f"{parameters / 1e6:.3g} million parameters ({alone * 1e3:,.3g} ms alone)"
        axes.plot([], [], color=color, linewidth=5, label=label)
    for ranks, marker in zip(on_a_node, "os^vD" * len(on_a_node), strict=False):
        style = {"color": "0.3", "marker": marker, "linestyle": "none", "markersize": 5}
        axes.plot([], [], label=f"{ranks} ranks per node", **style)
    axes.plot([], [], color="0.3", label="extrapolated, nothing hidden", **_EXTRAPOLATED)
    axes.plot([], [], color="0.3", linestyle=":", label="extrapolated, network behind backward")
    axes.plot([], [], **_POINTS | {"color": "0.3", "markersize": 8}, label="filled: measured")
    axes.set(xscale="log", xlabel="nodes", ylabel="time over that of a step without communication")
    axes.xaxis.set_major_locator(FixedLocator(sorted({step.layout.nodes for step in steps})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda nodes, _: f"{nodes:.0f}"))
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_title("DDP step", fontsize=10)
    _tidy(axes)


def _draw_line(axes: Any, steps: Sequence[Step], style: Mapping[str, Any]) -> None:
    """Draw the steps of one model with so many ranks on each node."""
    nodes = [step.layout.nodes for step in steps]
    late = [step.seconds / step.alone for step in steps]
    early = [step.hidden / step.alone for step in steps]
    axes.plot(nodes, late, **style, **_EXTRAPOLATED, markerfacecolor="white")
    axes.plot(nodes, early, color=style["color"], linestyle=":", linewidth=1.3)
    axes.fill_between(nodes, early, late, color=style["color"], alpha=0.1, linewidth=0)
    for step in steps:
        if step.measured is not None:
            measured = step.measured / step.alone
            axes.plot(step.layout.nodes, measured, **{**style, **_POINTS, "markersize": 8})


def _cycle(things: Sequence[object]) -> tuple[str, ...]:
    return _COLORS * (len(things) // len(_COLORS) + 1)


def _layout_label(layout: JobLayout) -> str:
    return (
        f"{layout.ranks} ranks" if layout.nodes == 1 else f"{layout.nodes} nodes x {layout.ranks}"
    )
