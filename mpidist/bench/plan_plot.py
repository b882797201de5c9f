"""Predictions as a picture, with the measured points on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpidist._formatting import format_bytes
from mpidist._optional import require
from mpidist.bench.predictions import Fitted, Layout, Plan, Step
from mpidist.bench.report import Report

__all__ = ["plot_plan"]

# Okabe and Ito's colours, told apart with any colour vision: what was measured.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_EXTRAPOLATED: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.3}
_POINTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "zorder": 5}


def plot_plan(plan: Plan, reports: Mapping[str, Report], path: Path) -> None:
    """Draw a plan into a file.

    Parameters
    ----------
    plan : Plan
        What to draw.
    reports : mapping of str to Report
        From which it was made.
    path : Path
        Where to write; the suffix decides the format, such as ``.png`` or ``.svg``.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.

    Notes
    -----
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
    _draw_times(axes["time"], plan)
    _draw_errors(axes["off"], plan.fitted)
    _size_axis(axes["off"], plan.fitted)
    if plan.steps:
        _draw_steps(axes["steps"], plan.steps)
        told = axes["steps"].get_legend_handles_labels()
        figure.legend(*told, fontsize=8, frameon=False, loc="outside lower right", ncols=3)
    figure.suptitle(_title(plan, reports), fontsize=10)
    figure.savefig(path, dpi=130)


def _title(plan: Plan, reports: Mapping[str, Report]) -> str:
    machine = next(iter(reports.values())).machine
    words = [f"measured on {machine.processor}, {machine.mpi}, {machine.date}"]
    network = plan.model.network
    if network is not None:
        words.append(
            f"network, {plan.network_source}: {network.latency * 1e6:.3g} µs, "
            f"{network.bandwidth / 1e9:.3g} GB/s per node"
        )
    return "mpidist plan: all_reduce of registered float32\n" + "; ".join(words)


def _draw_times(axes: Any, plan: Plan) -> None:
    from matplotlib import colormaps

    model = plan.model
    sizes = np.array([point.nbytes for each in plan.fitted for point in each.points])
    grid = np.geomspace(sizes.min(), sizes.max(), 200)
    for each, color in zip(plan.fitted, _cycle(plan.fitted), strict=False):
        ranks = each.fit.ranks
        points = [(point.nbytes, point.seconds * 1e6) for point in each.points]
        axes.plot(
            *zip(*points, strict=True), **_POINTS, color=color, label=f"{ranks} ranks, measured"
        )
        times = [model.all_reduce(n, ranks=ranks) * 1e6 for n in grid]
        axes.plot(grid, times, color=color, linewidth=1.6, label=f"{ranks} ranks, model")
    measured = {Layout(1, each.fit.ranks) for each in plan.fitted}
    others = [
        layout
        for layout in dict.fromkeys(each.layout for each in plan.predictions)
        if layout not in measured
    ]
    shades = colormaps["plasma"](np.linspace(0.05, 0.8, max(len(others), 1)))
    for layout, shade in zip(others, shades, strict=False):
        times = [model.all_reduce(n, ranks=layout.ranks, nodes=layout.nodes) * 1e6 for n in grid]
        label = f"{_told(layout)}, extrapolated"
        axes.plot(grid, times, color=shade, label=label, **_EXTRAPOLATED)
    axes.set(xscale="log", yscale="log", ylabel="time (µs)")
    axes.set_title("all_reduce", fontsize=10)
    axes.tick_params(labelbottom=False)
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _draw_errors(axes: Any, fitted: Sequence[Fitted]) -> None:
    axes.axhline(0, color="0.3", linewidth=0.8)
    for each, color in zip(fitted, _cycle(fitted), strict=False):
        at = [point.nbytes for point in each.points]
        off = [(each.fit.time(point.nbytes) / point.seconds - 1) * 100 for point in each.points]
        words = f"median {each.errors.median:.0%}, worst {each.errors.worst:.0%}"
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 0.8}
        axes.plot(at, off, label=words, **style)
    axes.set(ylabel="model is off (%)")
    axes.margins(y=0.25)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    _tidy(axes)


def _size_axis(axes: Any, fitted: Sequence[Fitted]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = sorted({point.nbytes for each in fitted for point in each.points})
    step = -(-len(sizes) // 7)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::-step][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(int(size))))
    axes.set_xlabel("size of the array")


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
        words = f"{parameters / 1e6:.3g} million parameters ({alone * 1e3:,.3g} ms alone)"
        axes.plot([], [], color=color, linewidth=5, label=words)
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


def _told(layout: Layout) -> str:
    return (
        f"{layout.ranks} ranks" if layout.nodes == 1 else f"{layout.nodes} nodes x {layout.ranks}"
    )


def _tidy(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
