"""How ranks that share no memory compare their calls by a small sum, and how a difference is told.

Either way the comparison is the arrival of a collective at the same time: a rank learns that the
calls are the same when it learns that all ranks have called.

Where calls differ, and in debug mode, the ranks exchange a description of each call, in lanes of
their own, so that this works for ranks that call different verbs, and for ranks of which one blocks
where another does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from mpidist._formatting import format_ranges
from mpidist._types import Array
from mpidist.backends import algorithms
from mpidist.backends.node.sequencer import Payload, fence
from mpidist.backends.node.signatures import CallSignature, Described, splitmix64
from mpidist.backends.work import Steps, Work
from mpidist.errors import CollectiveMismatchError

__all__ = [
    "Add",
    "SumComparison",
    "compare",
    "difference",
    "refuse",
]

Add: TypeAlias = Callable[[Array], Work[Any]]
"""Starts adding up the uint64 words of all ranks, in place and modulo 2**64."""

_MASK = 2**64 - 1


class SumComparison:
    """Compares by one all-reduce of 32 bytes.

    Each rank adds two hashes of its signature, whether a difference breaks the group, and its
    balance. If all signatures are equal, the sums of the hashes are the size of the group times
    this rank's own. If they are not, the sums show it as reliably as the digests of the calls,
    which are a CRC-32.

    Parameters
    ----------
    add : callable
        Starts the all-reduce.
    size : int
        Number of ranks.
    """

    def __init__(self, add: Add, size: int) -> None:
        self._add = add
        self._size = size
        self._sums: dict[int, tuple[Array, Work[Any]]] = {}

    in_slots = False

    def arrive_and_compare(
        self, number: int, signature: CallSignature, payload: Payload | None = None
    ) -> bool:
        """Return False: the ranks need not wait for each other in a sum."""
        return False

    def arrive(self, number: int, signature: CallSignature, payload: Payload | None = None) -> None:
        """Start the all-reduce; at the call, so that its order is the same on all ranks."""
        numbers = (*_hashes(signature.digest), int(signature.breaks), signature.balance or 0)
        sums = np.array(numbers, np.uint64)
        fence()  # other ranks may read what this one has written to shared memory from now on
        self._sums[number] = sums, self._add(sums)

    def all_arrived(self, number: int) -> bool:
        """Whether the sum is complete."""
        return self._sums[number][1].done()

    def missing(self, number: int) -> list[int]:
        """Return none: a sum does not show which ranks are missing."""
        return []

    def equal(self, number: int, signature: CallSignature) -> bool:
        """Whether the signatures are equal."""
        first, second, _, balance = self._sums[number][0].tolist()
        own = tuple(value * self._size & _MASK for value in _hashes(signature.digest))
        same = (first, second) == own and balance == 0
        if same:
            del self._sums[number]
        return same

    def breaks(self, number: int) -> bool:
        """Whether a part of the call is under way on any rank."""
        sums, _ = self._sums.pop(number)
        return bool(sums[2])


@lru_cache(1024)
def _hashes(digest: int) -> tuple[int, int]:
    """Return two independent hashes of a digest (outputs of SplitMix64)."""
    return splitmix64(digest), splitmix64(digest ^ 0x5851F42D4C957F2D)


_LONGEST = 240, 150, 200
"""Most bytes of the call, of its site and of its route in a description."""

_DESCRIPTION_NBYTES = 640
"""Bytes of the description of each rank."""

_NAMED = 8
"""Most different calls that an error lists."""

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


def compare(lane: algorithms.Lane, described: Described, *, rank: int, size: int) -> Steps:
    """Raise on all ranks if they are about to call different things.

    Parameters
    ----------
    lane : Lane
        The lane of the descriptions.
    described : Described
        The call of this rank.
    rank, size : int
        This rank, and the number of ranks.

    Raises
    ------
    CollectiveMismatchError
        With what every rank calls, and where.
    """
    calls = np.zeros((size, _DESCRIPTION_NBYTES), np.uint8)
    yield from _exchange(lane, described, calls, rank)
    everybody = _read(calls)
    balanced = sum(call.balance for call in everybody) % 2**64 == 0
    if len({call.what for call in everybody}) > 1 or not balanced:
        raise difference(everybody)


def refuse(
    lane: algorithms.Lane, described: Described, *, rank: int, size: int, usable: bool
) -> Steps:
    """Raise the error of calls that differ on all ranks, which know already that they do.

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
    calls = np.zeros((size, _DESCRIPTION_NBYTES), np.uint8)
    yield from _exchange(lane, described, calls, rank)
    raise difference(_read(calls), usable=usable)


def _exchange(lane: algorithms.Lane, described: Described, calls: Array, rank: int) -> Steps:
    """Write this rank's description into its row, and all-gather the rows."""
    *texts, balance = described
    parts = zip(texts, _LONGEST, strict=True)
    lines = [str(balance).encode(), *(part.encode(errors="replace")[:most] for part, most in parts)]
    text = b"\n".join(lines)
    calls[rank, : len(text)] = np.frombuffer(text, np.uint8)
    yield from algorithms.ring_all_gather(
        lane, None, calls.reshape(-1), (_DESCRIPTION_NBYTES,) * len(calls)
    )


def _read(calls: Array) -> list[Described]:
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in calls]
    rows = [[*text.split("\n"), "", ""] for text in texts]
    return [Described(what, site, how, int(balance)) for balance, what, site, how, *_ in rows]


def difference(calls: Sequence[Described], *, usable: bool = True) -> CollectiveMismatchError:
    """Return the error that says who called what, and where.

    Parameters
    ----------
    calls : sequence of Described
        The call of each rank. Their routes are named only if they are the same otherwise.
    usable : bool, optional
        Whether nothing has been changed, so that the group can still be used.
    """
    differ = len({call.what for call in calls}) > 1
    ranks: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        description = f" called {call.what}" if differ else f": {call.how},"
        description += f" at {call.site}"
        ranks.setdefault(description, []).append(rank)
    # The fewest first: they are the likeliest to be wrong.
    ordered = sorted(ranks.items(), key=lambda item: len(item[1]))
    lines = [f"rank {format_ranges(who)}{description}" for description, who in ordered[:_NAMED]]
    if len(ordered) > _NAMED:
        lines.append(f"and {len(ordered) - _NAMED} other calls")
    head = "the ranks called different things" if differ else _ALIKE.format(calls[0].what)
    rule = _SAME_CALLS if differ else _SAME_ARRAYS
    error = CollectiveMismatchError(f"{head}: {'; '.join(lines)}. {_STATES[usable]}. {rule}")
    error.usable = usable
    return error
