"""Numbers, names and differences between ranks, in few words."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["by_value", "count", "number_list", "rank_names", "tell_bytes"]


def count(number: int, thing: str) -> str:
    """Return ``1 rank`` or ``2 ranks``."""
    return f"{number} {thing}{'s' * (number != 1)}"


def number_list(numbers: Sequence[int]) -> str:
    """Return ``0-3, 6`` for 0, 1, 2, 3 and 6."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def rank_names(ranks: Sequence[int]) -> str:
    """Return ``rank 1`` or ``ranks 0-3, 6``."""
    return f"rank{'s' * (len(ranks) > 1)} {number_list(ranks)}"


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


def tell_bytes(nbytes: int) -> str:
    """Return a size as people read it, such as ``1.5 MiB``."""
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
