"""Reading what a manifest says of files and arrays, and believing nothing that it does not prove.

There may be hundreds of thousands of boxes, and all ranks wait for who reads them. So the loops
over them are in C where possible: over one column of all boxes of all arrays at a time.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain, repeat
from math import prod
from operator import itemgetter, le
from typing import Any, NamedTuple

import numpy as np

from mpidist.arrays.boxes import Box
from mpidist.checkpoint.format.cover import check_cover
from mpidist.checkpoint.format.limits import (
    MOST_CHARACTERS,
    is_printable,
    nested,
    problem_with_name,
    problem_with_shape,
)
from mpidist.checkpoint.format.stored import (
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
    dtype_of,
)
from mpidist.checkpoint.format.tiles import DIGEST_BYTES, number_of_tiles

__all__ = ["CONTRADICTIONS", "arrays_of", "check_names", "files_of", "text_of", "whole_number"]

CONTRADICTIONS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What code raises when JSON is not what it takes it for."""

_MOST_BYTES = 2**63 - 1


def files_of(entries: Any) -> tuple[StoredFile, ...]:
    """Return the files of a manifest.

    Parameters
    ----------
    entries : JSON value
        What it has under ``files``.

    Raises
    ------
    Exception
        One of `CONTRADICTIONS`.
    """
    _check_types(list, [entries])
    names, sizes, datasets = _columns(entries, ("name", "size", "datasets"), (str, int, dict))
    _check_texts(names, 4096)
    if "/" in "".join(names) or not {"", ".", ".."}.isdisjoint(names):
        raise ValueError("a file is not in this directory")
    if len(set(names)) < len(names):
        raise ValueError("two files have one name")
    _check_texts(list(chain.from_iterable(datasets)), 2 * 4096)
    places = list(chain.from_iterable(map(dict.values, datasets)))
    begins, shapes = _columns(places, ("byte", "shape"), (int, list))
    for numbers in (sizes, begins):
        if not 0 <= min(numbers, default=0) <= max(numbers, default=0) <= _MOST_BYTES:
            raise ValueError("a byte or a size that no file has")
    found = map(StoredDataset, begins, _shapes(shapes, repeat(1)))
    return tuple(
        StoredFile(name, size, dict(zip(own, found)))  # noqa: B905  # of the rest, as many as it has
        for name, size, own in zip(names, sizes, datasets, strict=True)
    )


def arrays_of(entries: Mapping[str, Any], files: Sequence[StoredFile]) -> dict[str, StoredArray]:
    """Return the arrays of a manifest.

    Parameters
    ----------
    entries : JSON value
        What it has under ``arrays``.
    files : sequence of StoredFile
        Its files.

    Raises
    ------
    Exception
        One of `CONTRADICTIONS`: where a box is not inside its dataset, a dataset not inside its
        file, or the boxes of an array do not cover it.
    """
    _check_types(dict, [entries])
    names = list(entries)
    check_names(names)
    pair = nested(names)
    if pair is not None:
        raise ValueError(f"{pair[1]!r} is inside {pair[0]!r}, which is an array")
    kinds, lengths, lists = _columns(
        list(entries.values()), ("dtype", "shape", "boxes"), (str, list, list)
    )
    dtypes = list(map(dtype_of, kinds))
    itemsizes = [dtype.itemsize for dtype in dtypes]
    shapes = _shapes(lengths, itemsizes)
    numbers = list(map(len, lists))
    stored = _boxes(
        list(chain.from_iterable(lists)),
        list(chain.from_iterable(map(repeat, itemsizes, numbers))),
        files,
    )
    arrays, begin = {}, 0
    for name, dtype, shape, number in zip(names, dtypes, shapes, numbers, strict=True):
        own = tuple(stored[begin : begin + number])
        begin += number
        try:
            _check_cover(shape, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        arrays[name] = StoredArray(dtype, shape, own)
    return arrays


def check_names(names: Sequence[Any]) -> None:
    """Raise ValueError unless arrays or values can have these names, each inside none other."""
    _check_types(str, names)
    _check_texts(names, MOST_CHARACTERS)
    if _NO_PATH.search("\n".join(names)) and names:
        raise ValueError(next(filter(None, map(problem_with_name, names))))


_NO_PATH = re.compile(r"(?:^|/)\.{0,2}(?:/|$)", re.MULTILINE)
"""In names, one a line: a part that is empty, or "." or ".."."""


def text_of(value: Any, most: int = 4096) -> str:
    """Return a value that is a short text which can be shown; raise otherwise."""
    _check_types(str, [value])
    _check_texts([value], most)
    text: str = value
    return text


def _check_texts(texts: Sequence[str], most: int) -> None:
    if max(map(len, texts), default=0) > most or not is_printable("".join(texts)):
        text = next(text for text in texts if len(text) > most or not is_printable(text))
        raise ValueError(f"{text[:60]!a} is not a text of at most {most} printable characters")


def whole_number(value: Any, least: int, most: int = _MOST_BYTES) -> int:
    """Return a value that is a whole number between two others; raise otherwise."""
    _check_types(int, [value])
    if not least <= value <= most:
        raise ValueError(f"{_short(value)} is not from {least} to {most}")
    number: int = value
    return number


def _shapes(shapes: Sequence[Any], itemsizes: Iterable[int]) -> list[tuple[int, ...]]:
    _check_types(int, chain.from_iterable(shapes))
    return list(map(_shape, map(tuple, shapes), itemsizes))


@lru_cache(maxsize=1024)
def _shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    problem = problem_with_shape(shape, itemsize)
    if problem is not None:
        raise ValueError(problem)
    return shape


_NAMES = ("file", "dataset", "first", "offsets", "sizes", "digests")
_TYPES = (int, str, int, list, list, str)
_NOT_BASE64 = re.compile("[^A-Za-z0-9+/=]")


def _boxes(
    entries: Sequence[Any], itemsizes: Sequence[int], files: Sequence[StoredFile]
) -> list[StoredBox]:
    """Return the boxes of all arrays, each of which lies in its dataset and has its digests."""
    if not entries:
        return []
    number, dataset, first, offsets, sizes, encoded = _columns(entries, _NAMES, _TYPES)
    _check_types(int, chain.from_iterable(chain(offsets, sizes)))
    if min(number) < 0 or max(number) >= len(files):
        raise ValueError(f"a box lies in file {min(number)} or {max(number)} of {len(files)}")
    if _NOT_BASE64.search("".join(encoded)):
        raise ValueError("digests that are not base64")
    boxes = list(map(Box, map(tuple, offsets), map(tuple, sizes)))
    digests = list(map(binascii.a2b_base64, encoded))
    counts = list(map(prod, sizes))
    for box, size, itemsize, found in zip(boxes, counts, itemsizes, digests, strict=True):
        tiles = number_of_tiles(box.sizes, size, itemsize)
        if len(found) != tiles * DIGEST_BYTES:
            raise ValueError(f"{len(found)} bytes of digests for {tiles} tiles of {box}")
    keys = list(zip(number, dataset, itemsizes, strict=True))
    spaces: dict[tuple[int, str, int], _Space] = {}
    for box, size, begin, key in zip(boxes, counts, first, keys, strict=True):
        if size:
            space = spaces.get(key) or spaces.setdefault(key, _space(files, *key))
            if not space.has(box, size, begin):
                raise ValueError(f"{box} does not lie inside {key[1]} of {space.file}")
    return list(map(StoredBox, boxes, number, dataset, first, digests))


class _Space(NamedTuple):
    """A dataset, as a place for boxes.

    Attributes
    ----------
    file : str
        Name of its file.
    shape : tuple of int
        Its shape.
    length : int
        How many elements it has.
    """

    file: str
    shape: tuple[int, ...]
    length: int

    def has(self, box: Box, count: int, first: int) -> bool:
        """Return whether a box of so many elements lies inside, from its first element on."""
        if len(self.shape) == 1:
            return 0 <= first <= self.length - count
        if len(self.shape) != len(box.sizes):
            return False
        if first == 0:
            return all(map(le, box.sizes, self.shape))
        begin = np.unravel_index(first, self.shape)  # raises if it is outside
        return all(
            start + size <= length
            for start, size, length in zip(begin, box.sizes, self.shape, strict=True)
        )


def _space(files: Sequence[StoredFile], number: int, name: str, itemsize: int) -> _Space:
    """Return a dataset, which lies inside its file."""
    file = files[number]
    dataset = file.datasets[name]
    count = prod(dataset.shape)
    if dataset.byte + count * itemsize > file.size:
        raise ValueError(f"{name} does not lie inside {file.name}")
    return _Space(file.name, dataset.shape, count)


_MANY = 64
"""Boxes of an array from which on it is worth less to remember how they cover it."""

_remembered = lru_cache(maxsize=1024)(check_cover)  # what it raises is not kept


def _check_cover(shape: tuple[int, ...], stored: Sequence[StoredBox]) -> None:
    boxes = tuple([each.box for each in stored])
    check = check_cover if len(boxes) == 1 or len(boxes) > _MANY else _remembered
    check(shape, boxes)


def _columns(
    entries: Sequence[Any], names: Sequence[str], kinds: Sequence[type]
) -> list[Sequence[Any]]:
    """Return what objects have under these names, by name; raise if it is of another type."""
    _check_types(dict, entries)
    if not entries:
        return [() for _ in names]
    columns: list[Sequence[Any]] = list(zip(*map(itemgetter(*names), entries), strict=True))
    for kind, column in zip(kinds, columns, strict=True):
        _check_types(kind, column)
    return columns


def _check_types(kind: type, values: Iterable[Any]) -> None:
    """Raise TypeError unless all values are of a type; a bool is no int."""
    others = set(map(type, values)) - {kind}
    if others:
        names = ", ".join(sorted(other.__name__ for other in others))
        raise TypeError(f"expected {kind.__name__}, got {names}")


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**30 else "a number of over 30 digits"
