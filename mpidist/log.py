"""Messages that say which rank speaks.

mpidist logs through the standard library to the logger ``mpidist`` and configures nothing at
import. `rank_logger` is what a group uses; a program that wants other output attaches its own
handlers to that logger.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping, Sequence
from typing import Any

__all__ = ["logger", "rank_logger"]

logger = logging.getLogger("mpidist")


class _RankAdapter(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from 3.11 on only
    """Puts ``[group rank/size]`` before each message."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        extra: Any = self.extra
        return f"[{extra['group']} {extra['rank']}/{extra['size']}] {msg}", kwargs


def rank_logger(group: str, rank: int, size: int) -> logging.LoggerAdapter[logging.Logger]:
    """Return a logger whose messages carry group and rank.

    Parameters
    ----------
    group : str
        Name of the group.
    rank, size : int
        This rank, and the number of ranks.

    Returns
    -------
    logging.LoggerAdapter
        Writes to the logger ``mpidist``.
    """
    return _RankAdapter(logger, {"group": group, "rank": rank, "size": size})


def ranges(ranks: Sequence[int]) -> str:
    """Return numbers of ranks as people write them, such as ``"0-2, 5"``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
