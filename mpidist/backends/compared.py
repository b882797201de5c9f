"""Debug mode: all ranks say what they are about to call before any of them begins.

The comparison travels in a lane of its own, so that it finds ranks that call different verbs, and
ranks of which one blocks where another does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mpidist.backends import algorithms
from mpidist.backends.work import Steps
from mpidist.errors import CollectiveMismatchError

__all__ = ["BY_MESSAGES", "DIFFERENT", "compare"]

DIFFERENT = (
    "the ranks called different things; nothing has been changed. All must make the same calls in "
    "the same order"
)
"""What an error says where calls are compared before anything begins; who called what follows."""

_ROOM = 512
"""Bytes for the words of each rank."""

BY_MESSAGES: Mapping[str, Callable[..., Steps]] = {
    "all_gather": algorithms.ring_all_gather,
    "all_reduce": algorithms.all_reduce,
    "all_to_all": algorithms.pairwise_all_to_all,
    "barrier": algorithms.dissemination_barrier,
    "broadcast": algorithms.tree_broadcast,
    "gather": algorithms.linear_gather,
    "reduce": algorithms.reduce,
    "reduce_scatter": algorithms.pairwise_reduce_scatter,
    "scatter": algorithms.linear_scatter,
}
"""How each collective goes by messages."""


def compare(lane: algorithms.Lane, what: str, site: str, *, rank: int, size: int) -> Steps:
    """Raise on all ranks if they are about to call different things.

    Parameters
    ----------
    lane : Lane
        For the messages.
    what : str
        What has to be the same on all ranks.
    site : str
        Where it was called.
    rank, size : int
        Of the group.

    Raises
    ------
    CollectiveMismatchError
        With what every rank calls, and where.
    """
    texts = np.zeros((size, _ROOM), np.uint8)
    words = f"{what}\n{site}".encode(errors="replace")[:_ROOM]
    texts[rank, : len(words)] = np.frombuffer(words, np.uint8)
    yield from algorithms.ring_all_gather(lane, None, texts.reshape(-1), (_ROOM,) * size)
    calls: dict[tuple[str, str], list[int]] = {}
    for other, text in enumerate(texts):
        theirs, _, where = text.tobytes().rstrip(b"\0").decode(errors="replace").partition("\n")
        calls.setdefault((theirs, where), []).append(other)
    if len({theirs for theirs, _ in calls}) > 1:
        # The fewest first: they are the likeliest to be wrong.
        told = "; ".join(
            f"rank {', '.join(map(str, ranks))}: {theirs} at {where}"
            for (theirs, where), ranks in sorted(calls.items(), key=lambda call: len(call[1]))
        )
        raise CollectiveMismatchError(f"{DIFFERENT}. {told}")
