"""Tables as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["columns"]


def columns(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0, ruled: bool = False
) -> Iterator[str]:
    """Align columns to the right, the last `left` ones to the left; if `ruled`, underline heads."""
    table = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if ruled:
        table.insert(1, ["-" * width for width in widths])
    split = len(heads) - left
    for row in table:
        cells = [
            cell.rjust(width) if place < split else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
