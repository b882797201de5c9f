"""What HDF5 sees in files that may be damaged.

Its library does not survive some of them: one flipped bit in the structure of a file may end the
process. So it looks at them in a process of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mpidist.checkpoint.format.hdf5 import Contents, Dataset, contents
from mpidist.checkpoint.format.manifest import JSON
from mpidist.errors import CheckpointCorruptError

__all__ = ["answer", "inspect"]

_SECONDS = 60.0
"""Within which the process has to answer, and one more for each file."""

_CHILD = (
    "import sys; sys.path[:] = {}; from mpidist.checkpoint.tools.inspecting import answer; answer()"
)


def inspect(paths: Sequence[Path]) -> list[Contents | str]:
    """Return what HDF5 sees in files.

    Parameters
    ----------
    paths : sequence of Path
        The files.

    Returns
    -------
    list of (Contents or str)
        For each file what is in it, or why that cannot be told.

    Notes
    -----
    Local. Starts one process, and one more after each file that ends it.
    """
    told: list[Contents | str] = []
    while len(told) < len(paths):
        answers, end = _ask(paths[len(told) :])
        told += answers
        if len(told) < len(paths):
            told.append(end)
    return told


def _ask(paths: Sequence[Path]) -> tuple[list[Contents | str], str]:
    """Return what a process has told before it ended, and how it ended."""
    seconds = _SECONDS + len(paths)
    try:
        child = subprocess.run(  # noqa: S603  # this interpreter, and a text of ours
            [sys.executable, "-c", _CHILD.format(sys.path)],
            input="\n".join(json.dumps(str(path)) for path in paths).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        output = child.stdout
        end = f"the library of HDF5 does not survive it ({_words(child.returncode, child.stderr)})"
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        end = f"the library of HDF5 comes to no end with it in {seconds:g} s"
    return [_read(json.loads(line)) for line in output.splitlines()], end


def _words(code: int, told: bytes) -> str:
    if code < 0:
        return signal.Signals(-code).name
    lines = told.decode(errors="replace").splitlines()
    return f"exit code {code}: {lines[-1] if lines else ''}"


def answer() -> None:
    """Tell on standard output what is in the files that standard input names, a line for each."""
    for line in sys.stdin:
        found: JSON
        try:
            seen = contents(Path(json.loads(line)))
            found = [seen.id, seen.datasets]
        except (OSError, CheckpointCorruptError) as error:
            found = str(error)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


def _read(found: JSON) -> Contents | str:
    if isinstance(found, str):
        return found
    identity, datasets = found
    return Contents(identity, {name: _dataset(*entry) for name, entry in datasets.items()})


def _dataset(byte: int, shape: JSON, dtype: str, sources: JSON) -> Dataset:
    return Dataset(byte, tuple(shape), dtype, tuple(map(tuple, sources)))
