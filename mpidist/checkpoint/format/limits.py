"""What a checkpoint can have: names, shapes and steps, alike when it is saved and when it is read.

Names reach terminals, HDF5 files and the entries of zip files, so they hold no control characters
and no way out of a directory. The limits of shapes are those of HDF5 and of numpy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from operator import index

import numpy as np

__all__ = [
    "MOST_CHARACTERS",
    "MOST_DIMENSIONS",
    "MOST_STEP",
    "is_printable",
    "nested",
    "printable",
    "problem_with_name",
    "problem_with_shape",
    "step_number",
]

MOST_DIMENSIONS = 32
"""Dimensions of a dataset of HDF5."""

MOST_STEP = 2**63 - 1
"""The highest step; it stands in each file as an attribute of 64 bits."""

MOST_CHARACTERS = 4096
"""Characters of a name."""

_MOST_BYTES = 2**63 - 1

# Control characters, line and paragraph separators, those that turn the direction of text, and
# halves of characters, which no encoding has.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Of these, what may be printed: bytes of a file's name that are no text in this locale, as Python
# has them, but for those that control a terminal of 8 bits.
_UNPRINTABLE = re.compile(_CONTROL.pattern.replace("\ud800-\udfff", "\ud800-\udc9f\udd00-\udfff"))


def step_number(step: object) -> int:
    """Return a step as a plain integer; ValueError if it is none, or no checkpoint can have it."""
    try:
        number = -1 if isinstance(step, (bool, np.bool_)) else index(step)  # type: ignore[arg-type]  # raises
    except TypeError:
        number = -1
    if not 0 <= number <= MOST_STEP:
        told = repr(step) if len(repr(step)) <= 40 else f"{repr(step)[:40]}..."
        raise ValueError(f"a step is a whole number from 0 to 2**63 - 1, got {told}")
    return number


def is_printable(text: str) -> bool:
    """Return whether a text has no characters that control a terminal or cannot be encoded."""
    return _CONTROL.search(text) is None


def printable(text: str) -> str:
    r"""Return a text with such characters written as Python writes them, as ``\x1b``.

    The bytes of a file's name that are no text stay as they are, but for those that are controls.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


@lru_cache(maxsize=1 << 14)  # a program saves the same names again and again
def problem_with_name(name: str) -> str | None:
    """Return why no array or value can have a name, or None if it can.

    Parameters
    ----------
    name : str
        Such as "optimizer/weight/mean".
    """
    if len(name) > MOST_CHARACTERS:
        return (
            f"{name[:30]!r}... cannot be a name: {len(name)} characters, at most {MOST_CHARACTERS}"
        )
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        return (
            f"{name!r} cannot be a name; expected text whose parts between '/' are neither empty "
            "nor '.' nor '..'"
        )
    if not is_printable(name):
        return f"{name!r} cannot be a name; expected text without control characters"
    return None


def nested(names: Iterable[str]) -> tuple[str, str] | None:
    """Return two names of which the second is inside the first, as "a/b" in "a"; None without."""
    # No name has a character before this one, so what is inside a name follows it at once.
    order = sorted(name.replace("/", "\0") for name in names)
    for outer, inner in pairwise(order):
        if inner.startswith(f"{outer}\0"):
            return outer.replace("\0", "/"), inner.replace("\0", "/")
    return None


def problem_with_shape(shape: Sequence[int], itemsize: int) -> str | None:
    """Return why no array can have a shape, or None if it can.

    Parameters
    ----------
    shape : sequence of int
        Its shape.
    itemsize : int
        Bytes of an element.
    """
    if len(shape) > MOST_DIMENSIONS:
        return f"{len(shape)} dimensions; HDF5 has at most {MOST_DIMENSIONS}"
    if min(shape, default=0) < 0:
        return f"the shape {list(shape)}; expected none of it negative"
    if prod(length or 1 for length in shape) * itemsize > _MOST_BYTES:
        return (
            f"the shape {list(shape)}; expected fewer than 2**63 bytes, empty dimensions left out"
        )
    return None
