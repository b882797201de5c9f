"""Numbers, names and differences between ranks, in few words."""

from __future__ import annotations

from collections.abc import Sequence

from mpidist._formatting import format_ranges

__all__ = ["by_value", "rank_names"]


def rank_names(ranks: Sequence[int]) -> str:
    """Return ``rank 1`` or ``ranks 0-3, 6``."""
    return f"rank{'s' * (len(ranks) > 1)} {format_ranges(ranks)}"


def by_value(values: Sequence[str]) -> str:
    """Return the value of all ranks; or each value with the ranks that have it.

    Parameters
    ----------
    values : sequence of str
        One per rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    if len(ranks) == 1:
        return values[0]
    return "; ".join(f"{value} ({rank_names(some)})" for value, some in ranks.items())
