"""Numbers, sizes and tables as text."""

from __future__ import annotations

import pytest

from mpidist._formatting import (
    columns,
    format_bytes,
    format_count,
    format_number,
    format_ranges,
)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1 MiB"),
        (1000 << 20, "1000 MiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 1, 3, 7, 6], "0-1, 3, 6-7"), ([], "")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert format_ranges(numbers) == text


def test_ranges_in_their_own_order() -> None:
    assert format_ranges([7, 8, 1], ordered=True) == "7-8, 1"


def test_counts() -> None:
    assert [format_count(n, "rank") for n in (0, 1, 2000)] == ["0 ranks", "1 rank", "2,000 ranks"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (0.5, "0.500"), (1.5, "1.50"), (99.94, "99.9"), (123456.0, "123,456")],
)
def test_numbers(value: float, text: str) -> None:
    assert format_number(value) == text


def test_a_table() -> None:
    lines = [*columns(("size", "name"), [("4", "a"), ("1024", "bcd")], left=1, ruled=True)]
    assert lines == ["size  name", "----  ----", "   4  a", "1024  bcd"]
