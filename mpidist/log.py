"""Messages that say which rank speaks.

mpidist logs through the standard library to the logger ``mpidist`` and configures nothing at
import. `rank_logger` is what a group uses; a program that wants other output attaches its own
handlers to that logger.

`init` gives the logger the level that ``MPIDIST_LOG`` names: ``debug`` or ``info`` for all there
is, ``warning`` for no line at the start, ``error`` for reports of what ends the job only. A program
may set the level itself, before `init`.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

logger = logging.getLogger("mpidist")

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(level: str, *, warn: bool = True) -> None:
    """Give the logger the level that ``MPIDIST_LOG`` names.

    Nothing is changed where it says nothing; a name that does not exist is a warning, of one rank
    if the others pass ``warn=False``, for nobody's job should end of it.
    """
    if level in _LEVELS:
        logger.setLevel(_LEVELS[level])
    elif level and warn:
        logger.warning("MPIDIST_LOG=%s: expected one of %s", level, ", ".join(_LEVELS))


def shows(level: int) -> bool:
    """Whether messages of a level are wanted that no handler is needed for.

    `logging.INFO` is, unless the logger has a level above it; what is below that, only if the
    logger has such a level.
    """
    return (logger.level or logging.INFO) <= level


class _RankAdapter(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from 3.11 on only
    """Puts ``[group rank/size]`` before each message."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        extra: Any = self.extra
        return f"[{extra['group']} {extra['rank']}/{extra['size']}] {msg}", kwargs


def rank_logger(group: str, rank: int, size: int) -> logging.LoggerAdapter[logging.Logger]:
    """Return a logger that writes to ``mpidist`` and whose messages carry group, rank and size."""
    return _RankAdapter(logger, {"group": group, "rank": rank, "size": size})
