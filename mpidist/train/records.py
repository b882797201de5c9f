"""What a run says about itself, as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["MetricsFile", "Record"]


@dataclass(frozen=True, slots=True)
class Record:
    """How training went over some steps, or how the model did on held-out samples.

    Attributes
    ----------
    kind : str
        ``"train"`` or ``"held-out"``.
    step : int
        Optimizer steps made.
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
        Where to write, replacing what is there. None writes nothing: what every rank but 0 does.

    Notes
    -----
    Local. A run that is killed leaves every line it has written, none of them cut off.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w", encoding="utf-8")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line.

        Parameters
        ----------
        values : mapping
            JSON values. A number that is not finite becomes null: JSON knows none.
        """
        if self._file is not None:
            known = {key: None if _unknown(value) else value for key, value in values.items()}
            self._file.write(json.dumps(known, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            self._file.close()


def _unknown(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
