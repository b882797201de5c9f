"""Sizes as people write them."""

from __future__ import annotations

import argparse

import pytest

from mpidist.bench.harness import read_size, sweep


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


def test_a_sweep_ends_at_or_before_its_last_size() -> None:
    assert sweep("4", "1K", 16) == (4, 64, 1024)
    assert sweep("4", "1000", 16) == (4, 64)
