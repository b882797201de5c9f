"""Numbers, sizes and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def shorten(text: str, most: int) -> str:
    """Return a text; of one that has more than `most` characters these, and ``...``."""
    return text if len(text) <= most else f"{text[:most]}..."


def format_bytes(nbytes: int) -> str:
    """Return a size with three digits, in a unit that is a power of 1024: ``1.5 MiB``."""
    size, suffix = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, suffix = size / 1024, larger
    return f"{size:.3g} {suffix}" if size < 1000 else f"{size:.0f} {suffix}"


def format_count(number: int, thing: str) -> str:
    """Return ``1 rank`` or ``2,000 ranks``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def format_number(value: float) -> str:
    """Return a number with at least three significant digits, never as a power of ten."""
    for bound, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if value < bound:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def format_ranges(numbers: Iterable[int], *, ordered: bool = False) -> str:
    """Return numbers of ranks or processes in short: ``0-2, 5`` for 0, 1, 2 and 5.

    They are sorted, unless they are to keep their order.
    """
    runs: list[list[int]] = []
    for number in numbers if ordered else sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def format_cuda_version(number: int) -> str:
    """Return 12.4 for 12040; nothing for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def format_nccl_version(number: int) -> str:
    """Return 2.23.4 for 22304, and 2.8.4 for 2804, as NCCL counted before 2.9; nothing for 0."""
    thousand = 10_000 if number >= 10_000 else 1_000
    version = f"{number // thousand}.{number % thousand // 100}.{number % 100}"
    return version if number else ""


def columns(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0, ruled: bool = False
) -> Iterator[str]:
    """Yield the lines of a table with one head and one cell per column.

    The last `left` columns are aligned to the left, the others to the right. If `ruled`, the heads
    are underlined.
    """
    table = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if ruled:
        table.insert(1, ["-" * width for width in widths])
    split = len(heads) - left
    for row in table:
        cells = [
            cell.rjust(width) if i < split else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
