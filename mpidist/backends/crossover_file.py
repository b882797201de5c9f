"""The file in which a user keeps what was measured, for every machine and number of ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpidist.backends.crossovers import Crossovers

__all__ = ["FILE_NAME", "machine_name", "processor", "read", "write"]


FILE_NAME = "crossovers.json"
"""Name of the file in the user's cache directory."""


def processor() -> str:
    """Return the model of this machine's CPU."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu"):
            return value.strip()
    return platform.machine()


def machine_name(library: str) -> str:
    """Return what tells one kind of machine from another.

    Host names do not: the nodes of a cluster are many and alike, and its login node, which sees
    the same home directory, is another kind.

    Parameters
    ----------
    library : str
        Name and version of the MPI library.
    """
    return f"{processor()}, {os.cpu_count()} cores, {library}"


def read(path: Path, machine: str) -> Mapping[int, Crossovers]:
    """Return what was measured on a machine, by the number of ranks; nothing if there is no file.

    Raises
    ------
    ValueError
        If the file does not hold such measurements.
    """
    try:
        entries = _load(path).get(machine, {})
        return {int(ranks): Crossovers(**sizes) for ranks, sizes in entries.items()}
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold what 'python -m mpidist bench crossovers --save' writes "
            f"({error}); remove it, and measure again"
        ) from error


def write(path: Path, machine: str, ranks: int, crossovers: Crossovers) -> None:
    """Add what was measured; the file is replaced at once, so that a reader sees all or nothing."""
    entries = _load(path)
    entries.setdefault(machine, {})[str(ranks)] = dataclasses.asdict(crossovers)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, indent=2, sort_keys=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)


def _load(path: Path) -> dict[str, Any]:
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return entries
