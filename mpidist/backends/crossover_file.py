"""The file in which a user keeps what was measured, for every machine and number of ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpidist import env
from mpidist.backends.crossovers import Crossovers

__all__ = ["machine_name", "processor", "read", "user_file", "write"]


def user_file() -> Path:
    """Return the path of the user's file, which may not exist."""
    # Unlike Path.expanduser, this raises nothing where there is no home directory.
    return Path(os.path.expanduser(env.cache_directory()), "crossovers.json")  # noqa: PTH111


def processor() -> str:
    """Return the model of this machine's CPU."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "cpu"):
            return value.strip()
    return platform.machine()


def machine_name(library: str) -> str:
    """Return what distinguishes one kind of machine from another.

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
    OSError
        If it cannot be read.
    """
    try:
        return _table(_load(path).get(machine, {}))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold what 'python -m mpidist bench crossovers --save' writes "
            f"({error}); remove it, and measure again"
        ) from error


def write(path: Path, machine: str, ranks: int, crossovers: Crossovers) -> None:
    """Add what was measured; the file is replaced at once, so that a reader sees all or nothing.

    A file that holds something else is replaced, too.
    """
    try:
        entries = _load(path)
        by_ranks = dict(_table(entries.get(machine, {})))
    except (TypeError, AttributeError, ValueError):
        entries, by_ranks = {}, {}
    by_ranks[ranks] = crossovers
    entries[machine] = {
        str(number): dataclasses.asdict(sizes) for number, sizes in by_ranks.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, indent=2, sort_keys=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text + "\n")
    Path(file.name).replace(path)


def _table(entries: Mapping[str, Any]) -> Mapping[int, Crossovers]:
    table = {int(ranks): Crossovers(**sizes) for ranks, sizes in entries.items()}
    if any(ranks < 1 for ranks in table):
        raise ValueError(f"there are measurements of {min(table)} ranks")
    return table


def _load(path: Path) -> dict[str, Any]:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not regular:  # reading a FIFO would wait for a writer
        raise ValueError("it is no regular file")
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    return entries
