"""Records of a training run: JSON lines, a progress bar, a picture."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpidist._new_file import create
from mpidist._optional import require
from mpidist.log import logger


@dataclass(frozen=True, slots=True)
class Record:
    """How training went over some steps, or how the model did on held-out samples.

    Attributes
    ----------
    kind : str
        Either ``"train"`` or ``"held-out"``.
    step : int
        Optimizer steps made so far.
    epoch : float
        The same in passes over the training samples.
    loss : float
        Mean cross-entropy per target, in nats.
    accuracy : float
        Share of targets that got the highest output, in [0, 1].
    samples_per_second : float
        Over all ranks together.
    lr : float or None
        Learning rate of the last step.
    grad_norm : float or None
        Mean 2-norm of the gradient before clipping.
    """

    kind: str
    step: int
    epoch: float
    loss: float
    accuracy: float
    samples_per_second: float
    lr: float | None = None
    grad_norm: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the values that are there, as JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class MetricsFile:
    """A file of JSON lines, written through to the system line by line.

    Parameters
    ----------
    path : Path or None
        Where to write. None writes nothing: what every rank but 0 does.
    after : int, optional
        The run goes on after this step: lines of later steps are dropped, since those steps are
        made again, and lines are added behind the others. 0 replaces the file.

    Raises
    ------
    OSError
        Naming the file, if it cannot be opened.

    Notes
    -----
    Local. A run that is killed leaves every line it has written, none of them cut off. A loss of
    power, or a second writer, may leave damaged lines. A run that goes on drops these, keeps all
    others, and logs a warning with their number and the first of them.
    """

    def __init__(self, path: Path | None, *, after: int = 0) -> None:
        if path is not None and after:
            _keep(path, after)
        # Not buffered: what could not be written would be written again when it is closed.
        self._file = None if path is None else path.open("ab" if after else "wb", buffering=0)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line.

        Parameters
        ----------
        values : mapping
            JSON values. A number that is not finite becomes null: JSON knows none.

        Raises
        ------
        OSError
            Naming the file, if it cannot be written.
        """
        if self._file is None:
            return
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = f"{json.dumps(known, allow_nan=False)}\n".encode()
        try:
            while line:  # a disk that becomes full takes a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file.name)) from error

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            self._file.close()


def read_records(path: Path) -> list[Record]:
    """Read the records of a file of JSON lines; what else stands there is left out.

    Parameters
    ----------
    path : Path
        What a `MetricsFile` wrote.

    Returns
    -------
    list of Record
        In order. What is null there is NaN. Lines that are no whole record are left out: headers,
        and what was cut off.
    """
    records = []
    names = [field.name for field in fields(Record)]
    for _, _, values in _lines(path):
        if values is not None and values.get("kind") in ("train", "held-out"):
            known = {name: values[name] for name in names if name in values}
            known = {name: math.nan if value is None else value for name, value in known.items()}
            with contextlib.suppress(TypeError):  # a field without a default is missing
                records.append(Record(**known))
    return records


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yield the lines of a file: number, bytes, and the object, or None if it is damaged."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # cut off, or no UTF-8
                values = None
            yield number, line, values if isinstance(values, dict) else None


def _keep(path: Path, step: int) -> None:
    """Drop the lines of later steps; a kill leaves the old file or the new one."""
    if not path.exists():
        return
    damaged = []
    part = path.with_name(path.name + ".part")
    with os.fdopen(create(part, mode=path.stat().st_mode & 0o777, replace=True), "wb") as file:
        for number, line, values in _lines(path):
            if values is None:
                damaged.append(number)
                continue
            made = values.get("step")
            if not (isinstance(made, (int, float)) and made > step):
                file.write(line.rstrip(b"\n") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    if damaged:
        logger.warning(
            "%s: dropped %d damaged lines, the first of them line %d; all others are kept",
            path,
            len(damaged),
            damaged[0],
        )


class ProgressBar:
    """Steps made, speed, and the figures of the last record, on standard error.

    Parameters
    ----------
    steps : int
        Steps of the whole run.
    name : str
        Text in front of the bar.
    show : bool
        Whether to draw it: usually on rank 0 only.
    done : int, optional
        Steps made by an earlier job.

    Raises
    ------
    BackendUnavailableError
        If it is to be shown and tqdm is not installed.

    Notes
    -----
    Local. Under `mpirun` standard error is a pipe even in front of a terminal, so the bar is drawn
    there too, but less often and with a fixed width. Where standard error cannot be written any
    more, because the terminal has been closed, nothing is drawn from then on.
    """

    def __init__(self, steps: int, *, name: str, show: bool, done: int = 0) -> None:
        self._bar: Any = None
        self._figures: dict[str, str] = {}
        if show:
            tqdm = require("tqdm", extra="train", purpose="ProgressBar").tqdm
            terminal = sys.stderr.isatty()
            with contextlib.suppress(OSError):
                self._bar = tqdm(
                    total=steps,
                    initial=done,
                    desc=name,
                    unit="step",
                    file=sys.stderr,
                    mininterval=0.1 if terminal else 0.5,
                    ncols=None if terminal else 100,
                    dynamic_ncols=terminal,
                )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def show(self, record: Record) -> None:
        """Move to the step of a record and show its figures.

        Parameters
        ----------
        record : Record
            What `train` yielded last.
        """
        if self._bar is None:
            return
        name = "held-out accuracy" if record.kind == "held-out" else "loss"
        value = f"{record.accuracy:.1%}" if record.kind == "held-out" else f"{record.loss:.3f}"
        self._figures[name] = value
        self._bar.set_postfix(self._figures, refresh=False)
        try:
            self._bar.update(record.step - self._bar.n)
        except OSError:  # the run must not be lost with its terminal
            self._bar.disable = True  # or it would be drawn when it is deleted
            self._bar = None


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
        Records of one run, in order.
    path : Path
        Where to write; the suffix decides the format, such as ``.png`` or ``.svg``.
    title : str
        Title above the picture.
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
