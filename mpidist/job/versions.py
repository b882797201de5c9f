"""Whether all ranks run the same mpidist: the first message that they exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidist._version import __version__
from mpidist.errors import LaunchError

__all__ = ["LAYOUT", "compare_versions"]

LAYOUT = 2
"""Version of what ranks exchange: messages, shared memory, arguments. Each change adds one."""

_NBYTES = 64
"""Bytes of the message. This never changes, so that any two versions can be compared."""


def compare_versions(all_gather: Callable[[bytes], Sequence[bytes]]) -> None:
    """Raise on all ranks unless all have the same version and layout.

    Parameters
    ----------
    all_gather : callable
        Returns the messages of all ranks, of one length; collective, blocks.

    Raises
    ------
    LaunchError
        With the ranks of each version.

    Notes
    -----
    Collective; blocks. One all-gather of 64 bytes.
    """
    name = f"{__version__}, layout {LAYOUT}".encode()[:_NBYTES].ljust(_NBYTES, b"\0")
    names = all_gather(name)
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
