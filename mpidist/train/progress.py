"""A progress bar on one rank."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import Any

from mpidist._optional import require
from mpidist.train.records import Record

__all__ = ["ProgressBar"]


class ProgressBar:
    """Steps made, speed, and the figures of the last record, on standard error.

    Parameters
    ----------
    steps : int
        Steps of the whole run.
    name : str
        Before the bar.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
