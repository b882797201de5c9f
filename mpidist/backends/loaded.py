"""The shared libraries that this process has loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["loaded_libraries", "mpi_library"]


def loaded_libraries() -> list[str]:
    """Return their files."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(file for file in files if re.search(r"\.so[.\d]*$", file))


def mpi_library(files: Sequence[str]) -> str:
    """Return which of these files is the MPI library itself, not one of its other languages."""
    form = re.compile(r"libmpi(?!_?(cxx|fort|usempi|mpifh|java))\w*\.so")
    return next((file for file in files if form.match(Path(file).name)), "")
