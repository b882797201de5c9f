"""Sizes as people write them."""

from __future__ import annotations

import argparse

import pytest

from mpidist.bench.sizes import read_size, sweep, tell_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4", 4), ("4B", 4), ("64K", 65536), ("64 KiB", 65536), ("1mib", 1 << 20), ("2G", 2 << 30)],
)
def test_a_size_is_read(text: str, nbytes: int) -> None:
    assert read_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-4", "1.5M", "4T", "K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no size"):
        read_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(4, "4 B"), (1000, "1000 B"), (1024, "1 KiB"), (1536, "1536 B"), (3 << 20, "3 MiB")],
)
def test_a_size_is_told_in_whole_units(nbytes: int, text: str) -> None:
    assert tell_size(nbytes) == text
    assert read_size(text) == nbytes


def test_a_sweep_ends_at_or_before_its_last_size() -> None:
    assert sweep("4", "1K", 16) == (4, 64, 1024)
    assert sweep("4", "1000", 16) == (4, 64)
