"""The run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpidist._optional import require
from mpidist.train.records import Record

__all__ = ["plot_records"]

# Okabe and Ito's blue and vermilion: told apart with any colour vision, and in grey print.
_TRAIN, _HELD_OUT = "#0072B2", "#D55E00"

_LOG_FROM = 30.0
"""Highest over lowest loss from which on a linear axis would show only the beginning."""


def plot_records(
    records: Sequence[Record],
    path: Path,
    *,
    title: str,
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draw loss and accuracy over the steps into a file.

    Parameters
    ----------
    records : sequence of Record
        What `train` yielded.
    path : Path
        Where to write; the suffix decides the format, such as ``.png`` or ``.svg``.
    title : str
        Above the picture.
    baseline : (str, float), optional
        A loss in nats to compare with, and what it is called.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.

    Notes
    -----
    Local: call it on one rank. No display is needed, and matplotlib's global state is not touched.
    """
    require("matplotlib", extra="train", purpose="plot_records")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    loss, accuracy = figure.subplots(1, 2)
    _draw(loss, records, "loss")
    if baseline is not None:
        name, value = baseline
        loss.axhline(
            value, color="0.35", linestyle="--", linewidth=1.2, label=f"{name} {value:.2f}"
        )
    loss.set(title="Loss", ylabel="cross-entropy (nats per target)")
    values = [record.loss for record in records if record.loss > 0]
    if values and max(values) > _LOG_FROM * min(values):
        loss.set_yscale("log")
        loss.yaxis.set_major_formatter("{x:g}")
    else:
        loss.set_ylim(0, None)
    _draw(accuracy, records, "accuracy")
    accuracy.set(title="Accuracy", ylabel="targets predicted correctly (%)", ylim=(0, 1.02))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    for axes in (loss, accuracy):
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=3,
            columnspacing=1.2,
            frameon=False,
            fontsize=9,
        )
    figure.savefig(path, dpi=130)


def _draw(axes: Any, records: Sequence[Record], value: str) -> None:
    """Draw one quantity: training as a line, held-out samples as marks with the last one named."""
    for kind, label, style in (
        ("train", "training", {"color": _TRAIN, "linewidth": 1.3}),
        ("held-out", "held out", {"color": _HELD_OUT, "linewidth": 1.8, "marker": "o"}),
    ):
        chosen = [record for record in records if record.kind == kind]
        if not chosen:
            continue
        last = getattr(chosen[-1], value)
        shown = f"{100 * last:.1f} %" if value == "accuracy" else f"{last:.3f}"
        axes.plot(
            [record.step for record in chosen],
            [getattr(record, value) for record in chosen],
            label=f"{label} (last {shown})",
            markersize=4,
            **style,
        )
    axes.set_xlabel("optimizer step")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
