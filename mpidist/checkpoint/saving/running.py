"""What this process is saving, and what it saved last: neither may be removed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

__all__ = ["begin_write", "end_write", "is_being_written", "was_written_last"]

_lock = threading.Lock()
_writing: Counter[Path] = Counter()
"""Directories of steps, and how many ranks of this process write there: simulated ones share it."""

_last: dict[Path, Path] = {}
"""For each directory of checkpoints, the step that was completed last."""


def begin_write(directory: Path) -> None:
    """Note that a save into the directory of a step has begun."""
    with _lock:
        _writing[directory] += 1


def end_write(directory: Path, *, complete: bool) -> None:
    """Note that a save is over, and whether there is a checkpoint."""
    with _lock:
        _writing[directory] -= 1
        if not _writing[directory]:
            del _writing[directory]
        if complete:
            _last[directory.parent] = directory


def is_being_written(directory: Path) -> bool:
    """Return whether this process saves into the directory of a step, whatever leads to it."""
    with _lock:
        return _is_among(directory, _writing)


def was_written_last(directory: Path) -> bool:
    """Return whether no later step has been completed by this process beside it."""
    with _lock:
        return _is_among(directory, _last.values())


def _is_among(directory: Path, others: Iterable[Path]) -> bool:
    return any(
        other.name == directory.name and _is_same(directory.parent, other.parent)
        for other in others
    )


def _is_same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them is gone
        return False
