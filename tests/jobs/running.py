"""What tests of jobs/train.py share."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "train.py"

Start = Callable[..., "subprocess.Popen[bytes]"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def read_arrays(directory: Path) -> dict[str, Any]:
    """Return the arrays of the newest checkpoint, as plain HDF5 shows them."""
    newest = max(path.parent for path in directory.glob("step-*/manifest.json"))
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    with h5py.File(newest / "view.h5") as file:
        file.visititems(note)
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
