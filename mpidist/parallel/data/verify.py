"""Compare descriptions of arrays across ranks: one small exchange, a second one at a difference."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import is_device
from mpidist.collectives import all_gather, all_gather_object
from mpidist.errors import CollectiveMismatchError
from mpidist.group import ProcessGroup

__all__ = ["Description", "describe", "verify_same"]

Description: TypeAlias = tuple[tuple[str, str], ...]
"""What has to be the same: (a thing's name, what it is), in order."""

_SHOWN = 4
"""Names listed in an error before it says how many more there are."""


def describe(kind: str, name: str, array: Array) -> tuple[str, str]:
    """Describe an array by its kind and name, and by its shape, dtype and kind of memory."""
    memory = " on a device" if is_device(array) else ""
    return f"{kind} '{name}'", f"{tuple(array.shape)} {array.dtype}{memory}"


def verify_same(description: Description, group: ProcessGroup, *, operation: str) -> None:
    """Raise the same error on every rank if the ranks were given different descriptions.

    Parameters
    ----------
    description : tuple of (str, str)
        What this rank has.
    group : ProcessGroup
        The ranks to compare.
    operation : str
        Who asks; named in the error.

    Raises
    ------
    CollectiveMismatchError
        On every rank, with one text: the first rank that differs from most others, and in what.

    Notes
    -----
    Collective over `group`; blocks. One all_gather of 32 bytes per rank; only where it shows a
    difference, a second one of the whole descriptions.
    """
    digest = np.frombuffer(hashlib.sha256(repr(description).encode()).digest(), np.uint8)
    digests = all_gather(digest, group).reshape(group.size, -1)
    if (digests == digest).all():
        return
    everyone = [tuple(theirs) for theirs in all_gather_object(description, group)]
    # The odd one out is more often to blame than rank 0; a tie goes to the lower rank.
    usual, _ = Counter(everyone).most_common(1)[0]
    model = everyone.index(usual)
    odd = next(rank for rank, theirs in enumerate(everyone) if theirs != usual)
    raise CollectiveMismatchError(
        f"{operation} over group '{group.name}' ({group.size} ranks): "
        f"{_difference(usual, everyone[odd], model, odd)}. "
        "Nothing was changed; build the same thing in the same order on every rank"
    )


def _difference(usual: Description, theirs: Description, model: int, odd: int) -> str:
    """Say in what the description of rank `odd` differs from that of rank `model`."""
    expected, got = dict(usual), dict(theirs)
    for thing, value in theirs:
        if thing in expected and expected[thing] != value:
            return f"{thing} is {value} on rank {odd} and {expected[thing]} on rank {model}"
    missing = [thing for thing in expected if thing not in got]
    unknown = [thing for thing in got if thing not in expected]
    if missing or unknown:
        parts = [f"rank {odd} lacks {_listed(missing)}"] if missing else []
        parts += [f"rank {odd} has {_listed(unknown)}"] if unknown else []
        return " and ".join(parts) + f", compared with rank {model}"
    index = next(i for i, pair in enumerate(theirs) if pair != usual[i])
    return f"rank {odd} has {theirs[index][0]} where rank {model} has {usual[index][0]}"


def _listed(things: Sequence[str]) -> str:
    more = len(things) - _SHOWN
    return ", ".join(things[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
