"""Reading a manifest, and checking everything in it before it is used.

There may be hundreds of thousands of boxes, and all ranks wait for the one that reads them. So the
loops over them are in C where possible: over one column of all boxes of all arrays at a time.

[Note: covering] To compare many boxes pair by pair takes too long, so a sum is taken instead. In
each dimension every index gets a random number r, and a box counts the product over the dimensions
of r[start] - r[stop]. If the boxes cover the whole, each element once, their sum is what the whole
counts: cutting a box in two leaves the sum as it is, and every cover has a common refinement. If
they do not, both are different polynomials in the random numbers, and agree with a probability of
at most the number of dimensions over the modulus (Schwartz and Zippel). Two sums modulo 2**31 - 1
agree by chance less than once in 10**15 times, whoever chose the boxes.
"""

from __future__ import annotations

import binascii
import gc
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, repeat
from math import prod
from operator import itemgetter, le
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box, corners, overlapping
from mpidist.checkpoint.format.manifest import (
    DIGEST_BYTES,
    FORMAT,
    FRONT,
    JSON,
    MOST_BYTES,
    MOST_CHARACTERS,
    MOST_STEP,
    VERSION,
    Manifest,
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
    decode,
    digest_of,
    dtype_of,
    is_printable,
    nested,
    number_of_chunks,
    problem_with_name,
    problem_with_shape,
)
from mpidist.errors import (
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    SizeMismatchError,
)

_CONTRADICTIONS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What code raises when JSON is not what it takes it for."""


_FEW = 6
"""Boxes that are compared pair by pair: for so few the sum takes longer."""

_NAMED = 10_000
"""Boxes of which two that overlap are looked for, to name them."""

_PRIME = np.uint64((1 << 31) - 1)


def check_cover(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Raise unless boxes, in any order, cover an array of this shape, each element once.

    Raises
    ------
    SizeMismatchError
        If two overlap, one is not inside, or elements are in none. It names the first of them, but
        for an overlap of more than 10,000 boxes.

    Notes
    -----
    Time: that of sorting the boxes; see [Note: covering].
    """
    array = Box.whole(shape)
    if len(boxes) == 1 and boxes[0] == array:
        return  # most often
    boxes = [box for box in boxes if not box.empty]
    for box in boxes:
        if len(box.sizes) != len(array.sizes):
            raise SizeMismatchError(f"{box} does not lie inside {array}")
    if len(boxes) > _FEW and array.sizes and _has_the_sum_of(array, boxes):
        return
    for box in boxes:
        box.relative_to(array)
    pair = overlapping(boxes) if len(boxes) <= _NAMED else None
    if pair is not None:
        raise SizeMismatchError(f"{pair[0]} and {pair[1]} overlap")
    missing = array.count - sum(box.count for box in boxes)
    if missing > 0:
        raise SizeMismatchError(
            f"{missing} of {array.count} elements of shape {tuple(shape)} are in no box"
        )
    if len(boxes) > _NAMED:
        raise SizeMismatchError(f"of {len(boxes)} boxes some overlap")


def _has_the_sum_of(array: Box, boxes: Sequence[Box]) -> bool:
    """Return whether boxes cover another one, each element once; see [Note: covering]."""
    starts, stops = corners([*boxes, array])
    count = starts.shape[1]
    indices = [
        np.unique(np.concatenate(both), return_inverse=True)
        for both in zip(starts, stops, strict=True)
    ]
    random = np.random.default_rng()
    for _ in range(2):
        products: Array = np.ones(count, np.uint64)
        for values, position in indices:
            numbers = random.integers(int(_PRIME), size=len(values), dtype=np.uint64)
            drawn = numbers[position]
            products = products * (drawn[:count] + _PRIME - drawn[count:]) % _PRIME
        if products[:-1].sum() % _PRIME != products[-1]:
            return False
    return True


def parse_manifest(data: bytes, path: object) -> Manifest:
    """Read the bytes of a manifest, and check everything in them.

    Raises CheckpointCorruptError if it is cut off, damaged or edited, or contradicts itself, and
    CheckpointIncompatibleError if its format is a later one.
    """
    if len(data) > MOST_BYTES:
        raise CheckpointCorruptError(
            f"{path} has {len(data)} bytes, and a manifest at most {MOST_BYTES}; load another step"
        )
    with _uncollected():
        return _parse(data, path)


def _parse(data: bytes, path: object) -> Manifest:
    try:
        body = json.loads(data.decode("utf-8", "surrogatepass"))
        digest = body.pop("digest")
        kind, version = body["format"], body["version"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"{path} is not, or not all of, the manifest of a checkpoint: "
            f"{type(error).__name__}: {error}; load another step"
        ) from error
    if kind == FORMAT and isinstance(version, int) and version > VERSION:
        raise CheckpointIncompatibleError(
            f"{path} has version {version} of the format, and this mpidist reads up to "
            f"{VERSION}; install a later mpidist"
        )
    if kind != FORMAT or not data.startswith(FRONT) or digest != digest_of(_rest(data)):
        raise CheckpointCorruptError(
            f"{path} is damaged, or was edited: its contents do not have the digest that it "
            "states; restore it from a copy, or load another step"
        )
    try:
        return _manifest_of(body)
    except _CONTRADICTIONS as error:
        raise CheckpointCorruptError(
            f"{path} contradicts itself ({type(error).__name__}: {error}); load another step"
        ) from error


def _rest(data: bytes) -> bytes:
    """Return what the digest of a manifest covers: its bytes without the digest.

    Not the JSON written anew: another program may write numbers in another way.
    """
    return b"{" + data[len(FRONT) + 34 : -1]  # 32 hexadecimal digits, a quote and a comma; the \n


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage in the block: with many objects that takes longer than all else."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _manifest_of(body: Mapping[str, JSON]) -> Manifest:
    files = _files_of(body["files"])
    values = dict(decode(body["values"]).items())
    _check_names(list(values))
    identity = _text_of(body["id"], 64)
    return Manifest(
        id=identity.encode("ascii").decode(),  # raises ValueError if it is not
        step=_whole_number(body["step"], 0, MOST_STEP),
        created=_text_of(body["created"], 64),
        world_size=_whole_number(body["world_size"], 1),
        versions={_text_of(key): _text_of(text) for key, text in body["versions"].items()},
        crossovers=body["crossovers"],
        metadata=decode(body["metadata"]),
        values=values,
        files=files,
        arrays=_arrays_of(body["arrays"], files),
    )


_MOST_BYTES = 2**63 - 1


def _files_of(entries: Any) -> tuple[StoredFile, ...]:
    """Return the files of a manifest; raises one of `_CONTRADICTIONS`."""
    _check_types(list, [entries])
    names, sizes, datasets = _columns(entries, ("name", "size", "datasets"), (str, int, dict))
    _check_texts(names, 4096)
    if "/" in "".join(names) or not {"", ".", ".."}.isdisjoint(names):
        raise ValueError("a file is not in this directory")
    if len(set(names)) < len(names):
        raise ValueError("two files have one name")
    _check_texts(list(chain.from_iterable(datasets)), 2 * 4096)
    entries = list(chain.from_iterable(map(dict.values, datasets)))
    begins, shapes = _columns(entries, ("byte", "shape"), (int, list))
    for numbers in (sizes, begins):
        if not 0 <= min(numbers, default=0) <= max(numbers, default=0) <= _MOST_BYTES:
            raise ValueError("a byte or a size that no file has")
    stored = map(StoredDataset, begins, _shapes(shapes, repeat(1)))
    return tuple(
        StoredFile(name, size, dict(zip(own, stored)))  # noqa: B905  # of the rest, as many as it has
        for name, size, own in zip(names, sizes, datasets, strict=True)
    )


def _arrays_of(entries: Mapping[str, Any], files: Sequence[StoredFile]) -> dict[str, StoredArray]:
    """Return the arrays of a manifest with these files.

    Raises one of `_CONTRADICTIONS` where a box is not inside its dataset, a dataset not inside its
    file, or the boxes of an array do not cover it.
    """
    _check_types(dict, [entries])
    names = list(entries)
    _check_names(names)
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


def _check_names(names: Sequence[Any]) -> None:
    """Raise ValueError unless arrays or values can have these names, each inside none other."""
    _check_types(str, names)
    _check_texts(names, MOST_CHARACTERS)
    if _NO_PATH.search("\n".join(names)) and names:
        raise ValueError(next(filter(None, map(problem_with_name, names))))


_NO_PATH = re.compile(r"(?:^|/)\.{0,2}(?:/|$)", re.MULTILINE)
"""In names, one a line: a part that is empty, or "." or ".."."""


def _text_of(value: Any, most: int = 4096) -> str:
    """Return a value that is a short text which can be shown; raise otherwise."""
    _check_types(str, [value])
    _check_texts([value], most)
    text: str = value
    return text


def _check_texts(texts: Sequence[str], most: int) -> None:
    if max(map(len, texts), default=0) > most or not is_printable("".join(texts)):
        text = next(text for text in texts if len(text) > most or not is_printable(text))
        raise ValueError(f"{text[:60]!a} is not a text of at most {most} printable characters")


def _whole_number(value: Any, least: int, most: int = _MOST_BYTES) -> int:
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
    for box, size, itemsize, digest in zip(boxes, counts, itemsizes, digests, strict=True):
        chunks = number_of_chunks(box.sizes, size, itemsize)
        if len(digest) != chunks * DIGEST_BYTES:
            raise ValueError(f"{len(digest)} bytes of digests for {chunks} chunks of {box}")
    keys = list(zip(number, dataset, itemsizes, strict=True))
    spaces: dict[tuple[int, str, int], _Space] = {}
    for box, size, begin, key in zip(boxes, counts, first, keys, strict=True):
        if size:
            space = spaces.get(key) or spaces.setdefault(key, _space(files, *key))
            if not space.has(box, size, begin):
                raise ValueError(f"{box} does not lie inside {key[1]} of {space.file}")
    return list(map(StoredBox, boxes, number, dataset, first, digests))


class _Space(NamedTuple):
    """A dataset of a file, as a place for boxes; `length` is the number of its elements."""

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
    boxes = tuple([box.box for box in stored])
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
