"""What the ranks call, in words: told to all where it differs, and compared by debug mode.

The words travel in a lane of their own, so that this works for ranks that call different verbs, and
for ranks of which one blocks where another does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpidist._types import Array
from mpidist.backends import algorithms
from mpidist.backends.node.signatures import Described
from mpidist.backends.work import Steps
from mpidist.errors import CollectiveMismatchError
from mpidist.log import ranges

__all__ = ["BY_MESSAGES", "compare", "difference", "refuse"]

_LONGEST = 240, 150, 200
"""Bytes of what a rank calls, where, and how it travels; the rest is cut off."""

_ROOM = 640
"""Bytes for the words of each rank."""

_NAMED = 8
"""Different calls that an error tells one by one."""

_ALIKE = "the ranks made the same call, {}, with arrays that do not fit together"

_STATES = {
    True: "Nothing has been changed, and the group can still be used",
    False: "A part of it was under way, and the group is broken: let this error end the job",
}

_SAME_CALLS = "All ranks must make the same calls in the same order"
_SAME_ARRAYS = (
    "All ranks must pass the same place of the same registered block, or none of them a registered "
    "one; have the same crossovers; and expect as much as is sent to them"
)

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


def compare(lane: algorithms.Lane, described: Described, *, rank: int, size: int) -> Steps:
    """Raise on all ranks if they are about to call different things.

    Parameters
    ----------
    lane : Lane
        For the messages.
    described : Described
        What this rank calls.
    rank, size : int
        This rank, and the number of ranks.

    Raises
    ------
    CollectiveMismatchError
        With what every rank calls, and where.
    """
    calls = np.zeros((size, _ROOM), np.uint8)
    yield from _exchange(lane, described, calls, rank)
    everybody = _read(calls)
    balanced = sum(call.balance for call in everybody) % 2**64 == 0
    if len({call.what for call in everybody}) > 1 or not balanced:
        raise difference(everybody)


def refuse(
    lane: algorithms.Lane, described: Described, *, rank: int, size: int, usable: bool
) -> Steps:
    """Raise on all ranks, which know already that their calls differ, what they have called.

    Parameters
    ----------
    lane, described, rank, size
        As `compare`.
    usable : bool
        Whether nothing has been changed, so that the group can still be used.

    Raises
    ------
    CollectiveMismatchError
        Always.
    """
    calls = np.zeros((size, _ROOM), np.uint8)
    yield from _exchange(lane, described, calls, rank)
    raise difference(_read(calls), usable=usable)


def _exchange(lane: algorithms.Lane, described: Described, calls: Array, rank: int) -> Steps:
    """Let every rank write what it calls into its row, and give all rows to all ranks."""
    *words, balance = described
    parts = zip(words, _LONGEST, strict=True)
    lines = [str(balance).encode(), *(part.encode(errors="replace")[:most] for part, most in parts)]
    text = b"\n".join(lines)
    calls[rank, : len(text)] = np.frombuffer(text, np.uint8)
    yield from algorithms.ring_all_gather(lane, None, calls.reshape(-1), (_ROOM,) * len(calls))


def _read(calls: Array) -> list[Described]:
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in calls]
    rows = [[*text.split("\n"), "", ""] for text in texts]
    return [Described(what, site, how, int(balance)) for balance, what, site, how, *_ in rows]


def difference(calls: Sequence[Described], *, usable: bool = True) -> CollectiveMismatchError:
    """Return the error that says who called what, and where.

    Parameters
    ----------
    calls : sequence of Described
        By rank. How they travel is told only if they are the same otherwise.
    usable : bool, optional
        Whether nothing has been changed, so that the group can still be used.
    """
    differ = len({call.what for call in calls}) > 1
    ranks: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        words = f" called {call.what}" if differ else f": {call.how},"
        words += f" at {call.site}"
        ranks.setdefault(words, []).append(rank)
    # The fewest first: they are the likeliest to be wrong.
    ordered = sorted(ranks.items(), key=lambda item: len(item[1]))
    told = [f"rank {ranges(who)}{words}" for words, who in ordered[:_NAMED]]
    if len(ordered) > _NAMED:
        told.append(f"and {len(ordered) - _NAMED} other calls")
    head = "the ranks called different things" if differ else _ALIKE.format(calls[0].what)
    rule = _SAME_CALLS if differ else _SAME_ARRAYS
    error = CollectiveMismatchError(f"{head}: {'; '.join(told)}. {_STATES[usable]}. {rule}")
    error.usable = usable
    return error
