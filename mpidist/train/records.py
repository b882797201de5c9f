"""What a run says about itself, as JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from mpidist._new_file import create
from mpidist.log import logger

__all__ = ["MetricsFile", "Record", "read_records"]


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

        Raises
        ------
        OSError
            Naming the file, if it cannot be written.
        """
        if self._file is None:
            return
        known = {key: None if _unknown(value) else value for key, value in values.items()}
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
    found = (_record(values) for _, _, values in _lines(path) if values is not None)
    return [record for record in found if record is not None]


_KINDS = ("train", "held-out")


def _record(values: Mapping[str, Any]) -> Record | None:
    """Return the record that a line holds, or None if it holds something else."""
    if values.get("kind") not in _KINDS:
        return None
    names = [field.name for field in fields(Record)]
    try:
        return Record(**{name: _number(values[name]) for name in names if name in values})
    except TypeError:  # a field without a default is missing
        return None


def _number(value: Any) -> Any:
    return math.nan if value is None else value


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
    """Drop the lines of later steps; whoever is killed leaves the old file or the new one."""
    if not path.exists():
        return
    damaged = []
    part = path.with_name(path.name + ".part")
    with os.fdopen(create(part, mode=path.stat().st_mode & 0o777, replace=True), "wb") as file:
        for number, line, values in _lines(path):
            if values is None:
                damaged.append(number)
            elif not _is_later(values.get("step"), step):
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


def _is_later(value: object, step: int) -> bool:
    return isinstance(value, (int, float)) and value > step


def _unknown(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
