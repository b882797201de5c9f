"""Numbers of bytes as people write them."""

from __future__ import annotations

import argparse
import re

__all__ = ["read_size", "sweep", "tell_size"]

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


def tell_size(nbytes: int) -> str:
    """Return a number of bytes in the largest unit of which it is a whole number: ``64 KiB``."""
    for unit, shift in reversed(_UNITS.items()):
        if unit and nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift} {unit}iB"
    return f"{nbytes} B"


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
