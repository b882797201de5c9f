"""Numbers of bytes as people write them."""

from __future__ import annotations

import argparse
import re

__all__ = ["read_size", "sweep"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def read_size(text: str) -> int:
    """Return the number of bytes that a word of the command line means.

    Parameters
    ----------
    text : str
        A whole number, of bytes or with a unit that is a power of 1024: ``4``, ``64K``, ``1MiB``.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is none.
    """
    found = re.fullmatch(r"([1-9]\d*) ?([KMG]?)i?B?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; expected a number of bytes such as 4, 64K or 16MiB"
        )
    return int(found[1]) << _UNITS[found[2].upper()]


def sweep(first: str, last: str, factor: int) -> tuple[int, ...]:
    """Return the sizes from the first to the last, each `factor` times the one before."""
    sizes, stop = [read_size(first)], read_size(last)
    while sizes[-1] * factor <= stop:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)
