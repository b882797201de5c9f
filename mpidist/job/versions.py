"""Whether all ranks run the same mpidist: the first thing that they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpidist import __version__
from mpidist.errors import LaunchError

__all__ = ["LAYOUT", "compare_versions"]

LAYOUT = 1
"""Of what ranks share: messages, shared memory, arguments. Counted up with each change to them."""

_NBYTES = 64
"""Of the name, which never changes: any two versions have to understand each other here."""


def compare_versions(comm: Any) -> None:
    """Raise on all ranks unless all have the same version and layout.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.

    Raises
    ------
    LaunchError
        With the ranks of each version.

    Notes
    -----
    Collective over `comm`; blocks. One all-gather of 64 bytes.
    """
    name = f"{__version__}, layout {LAYOUT}".encode()[:_NBYTES].ljust(_NBYTES, b"\0")
    everyone = np.empty((comm.size, _NBYTES), np.uint8)
    comm.Allgather(np.frombuffer(name, np.uint8), everyone)
    names = [row.tobytes() for row in everyone]
    if set(names) == {name}:
        return
    raise LaunchError(
        "init: the ranks run different versions of mpidist, which do not understand each other: "
        f"{_describe(names)}. Install the same one on all nodes, and "
        "look at PATH and PYTHONPATH of the job"
    )


def _describe(names: Sequence[bytes]) -> str:
    """Return which ranks have which version."""
    parts = []
    for name in dict.fromkeys(names):
        ranks = ", ".join(str(rank) for rank, other in enumerate(names) if other == name)
        version = name.rstrip(b"\0").decode(errors="replace")
        parts.append(f"{version} on rank {ranks}")
    return "; ".join(parts)
