"""The manifest: which part of which array lies where, with digests, and what else is said.

Names, shapes and steps have the same limits when a checkpoint is saved and when it is read. Names
reach terminals, HDF5 files and the entries of zip files, so they hold no control characters and no
way out of a directory. The limits of shapes are those of HDF5 and of numpy.

[Note: chunks] A chunk is the part of a stored box that has a digest, so that any part of the box
can be verified alone. It is small enough that reading a part of a box, widened to whole chunks,
reads little more than that part: a cut between rows costs at most the rows of one row of chunks,
about a 128th of a box with 32 KiB per row, and a cut between columns at most 4 KiB per row, which
is what a file system would read of it anyway.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from math import prod
from operator import index
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import xxhash

from mpidist._formatting import shorten
from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box, BoxIndex, boxes_of_at_most, boxes_of_range
from mpidist.arrays.namespaces import DTYPES, as_bytes

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
        got = shorten(repr(step), 40)
        raise ValueError(f"a step is a whole number from 0 to 2**63 - 1, got {got}")
    return number


def is_printable(text: str) -> bool:
    """Return whether a text has no characters that control a terminal or cannot be encoded."""
    return _CONTROL.search(text) is None


def printable(text: str) -> str:
    r"""Return a text with such characters written as Python writes them, as ``\x1b``.

    The bytes of a file's name that are no text stay as they are, but for those that are controls.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


@lru_cache(maxsize=1 << 14)  # a program saves the same names again and again
def problem_with_name(name: str) -> str | None:
    """Return why no array or value can have a name, or None if it can."""
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
    """Return why no array can have a shape, or None if it can."""
    if len(shape) > MOST_DIMENSIONS:
        return f"{len(shape)} dimensions; HDF5 has at most {MOST_DIMENSIONS}"
    if min(shape, default=0) < 0:
        return f"the shape {list(shape)}; expected none of it negative"
    if prod(length or 1 for length in shape) * itemsize > _MOST_BYTES:
        return (
            f"the shape {list(shape)}; expected fewer than 2**63 bytes, empty dimensions left out"
        )
    return None


# Many arrays have the same few shapes, and are cut in the same way.
box_of = lru_cache(maxsize=4096)(Box)
"""Make a `Box`; of the same numbers mostly the same object."""

_DTYPES = {str(dtype): dtype for dtype in DTYPES}


def dtype_of(name: str) -> DType:
    """Return the dtype of a name as manifests have it; KeyError for others."""
    return _DTYPES[name]


@cache
def name_of(dtype: DType) -> str:
    """Return the name that manifests have for a dtype of any byte order."""
    return str(dtype.newbyteorder("="))


DIGEST_BYTES = 8
"""Bytes of a digest: XXH3, 64 bits, in its canonical (big-endian) form."""

_CHUNK, _LARGEST = 1 << 16, 1 << 20
"""Most bytes of a chunk: the first in small boxes, doubled up to the second in large ones. One
element may be larger."""

_MANY = 1 << 10
"""Chunks that a box may have before they become larger."""

_RUN = 1 << 12
"""Bytes that lie side by side in a chunk, where the box has so many: as many rows of the dimensions
behind the cut as these bytes hold, which is always more than half of them."""


class ChunkGrid:
    """The chunks of a box, numbered in C order; see [Note: chunks].

    Parameters
    ----------
    sizes : sequence of int
        Extent of the box in each dimension.
    itemsize : int
        Bytes of one element.
    chunk : tuple of int, optional
        Sizes of a chunk, where they are those of another box. The last chunk in a dimension may be
        smaller.

    Attributes
    ----------
    counts : tuple of int
        Number of chunks in each dimension.
    count : int
        Number of chunks; none of an empty box, one of a 0-d array.
    """

    def __init__(
        self, sizes: Sequence[int], itemsize: int, chunk: tuple[int, ...] | None = None
    ) -> None:
        self.sizes = tuple(sizes)
        self.itemsize = itemsize
        self.chunk = chunk or _chunk_sizes(self.sizes, itemsize)
        self.counts = tuple(
            -(-size // max(part, 1)) for size, part in zip(self.sizes, self.chunk, strict=True)
        )
        self.count = prod(self.counts)
        self._all: tuple[int, list[tuple[int, int, Box]]] | None = None

    @staticmethod
    @lru_cache(maxsize=1024)  # many arrays have the same few shapes
    def of(sizes: tuple[int, ...], itemsize: int) -> ChunkGrid:
        """Return the chunks of a box; of boxes of the same sizes mostly the same object."""
        return ChunkGrid(sizes, itemsize)

    @cached_property
    def numbers(self) -> Array:
        """Those of all chunks, ascending, int64; read-only."""
        numbers = np.arange(self.count)
        numbers.flags.writeable = False
        return numbers

    def span(self, index: Sequence[int], lengths: Sequence[int]) -> Box:
        """Return what so many chunks in each dimension cover, from the one with this index on."""
        offsets = tuple(i * part for i, part in zip(index, self.chunk, strict=True))
        stops = tuple(
            min((i + n) * part, size)
            for i, n, part, size in zip(index, lengths, self.chunk, self.sizes, strict=True)
        )
        return Box(offsets, tuple(b - a for a, b in zip(offsets, stops, strict=True)))

    def over(self, region: Box) -> ChunkGrid:
        """Return the chunks of a region that consists of whole ones, which are alike."""
        if region.sizes == self.sizes:
            return self
        return ChunkGrid(region.sizes, self.itemsize, self.chunk)

    def joined(self, numbers: Array, nbytes: int) -> Iterable[tuple[int, int, Box]]:
        """Join chunks with ascending numbers that follow each other, where together they are a box.

        What is joined has at most `nbytes` bytes; a larger chunk stays alone. Returns the number of
        each first chunk, how many they are, and what they cover.
        """
        if numbers is not self.numbers:
            return self._joined(numbers, nbytes)
        if self._all is None or self._all[0] != nbytes:
            self._all = (nbytes, [*self._joined(numbers, nbytes)])
        return self._all[1]

    def _joined(self, numbers: Array, nbytes: int) -> Iterator[tuple[int, int, Box]]:
        if self.count == 1 or not len(numbers):
            yield from [(0, 1, Box.whole(self.sizes))][: len(numbers)]
            return
        most = max(nbytes // max(prod(self.chunk) * self.itemsize, 1), 1)
        for together in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            start, stop = int(together[0]), int(together[-1]) + 1
            for box in boxes_of_range(self.counts, start, stop):
                for part in boxes_of_at_most(box, most):
                    yield start, part.count, self.span(part.offsets, part.sizes)
                    start += part.count

    def covering(self, region: Box) -> Array:
        """Return the numbers of the chunks that a region touches, ascending, int64."""
        if region.empty or not self.count:
            return np.empty(0, np.int64)
        if region.sizes == self.sizes:
            return self.numbers
        ranges = [
            np.arange(start // part, -(-stop // part))
            for start, stop, part in zip(region.offsets, region.stops, self.chunk, strict=True)
        ]
        return np.ravel_multi_index(np.ix_(*ranges), self.counts).reshape(-1)


def number_of_chunks(sizes: tuple[int, ...], count: int, itemsize: int) -> int:
    """Return `ChunkGrid.count` of a box of `count` elements; fast where they fit into one chunk."""
    if count * itemsize <= _CHUNK:
        return int(count > 0)
    return ChunkGrid.of(sizes, itemsize).count


def _chunk_sizes(sizes: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the sizes of a chunk, of which the innermost dimensions are whole."""
    nbytes = _CHUNK
    while nbytes < _LARGEST and nbytes * _MANY < prod(sizes) * itemsize:
        nbytes *= 2
    most = max(nbytes // itemsize, 1)
    if prod(sizes) <= most:
        return sizes
    run, inner, cut = max(_RUN // itemsize, 1), 1, len(sizes) - 1
    while inner * sizes[cut] <= run:
        inner *= sizes[cut]
        cut -= 1
    chunk = list(sizes)
    chunk[cut] = max(run // inner, 1)
    left = most // (inner * chunk[cut])
    for dimension in reversed(range(cut)):
        chunk[dimension] = min(sizes[dimension], max(left, 1))
        left //= chunk[dimension]
    chunk[cut] = min(sizes[cut], chunk[cut] * max(left, 1))  # what no outer dimension has used
    return tuple(chunk)


def digests_of(array: Array, grid: ChunkGrid | None = None) -> bytes:
    """Return the digests of the chunks of an array, `DIGEST_BYTES` each, by their numbers.

    The digest of a chunk is that of its elements in C order, little-endian.

    References
    ----------
    Collet, XXH3, as of the xxHash specification 0.2.0 (the xxhash package).
    """
    grid = grid or ChunkGrid.of(array.shape, array.dtype.itemsize)
    if grid.count <= 1:
        return _digest(array) if grid.count else b""
    # Fresh memory for each chunk would cost several times the copy into it.
    scratch = np.empty(grid.chunk, array.dtype.newbyteorder("<"))
    digests = []
    for position in np.ndindex(*grid.counts):
        part = tuple(slice(i * n, (i + 1) * n) for i, n in zip(position, grid.chunk, strict=True))
        digests.append(_digest(array[part], scratch))
    return b"".join(digests)


def _digest(part: Array, scratch: Array | None = None) -> bytes:
    """Return the digest of a chunk, whose elements are put side by side if they do not lie so."""
    little = part.dtype.newbyteorder("<")
    if not part.flags.c_contiguous or part.dtype != little:
        if scratch is not None and scratch.shape == part.shape:
            np.copyto(scratch, part)
            part = scratch
        else:
            part = np.ascontiguousarray(part, little)
    return xxhash.xxh3_64_digest(as_bytes(part).data)


class StoredDataset(NamedTuple):
    """A dataset of a file: contiguous, C order, little-endian.

    `byte` is where it begins in the file; `shape` is its shape as HDF5 sees it.
    """

    byte: int
    shape: tuple[int, ...]


class StoredFile(NamedTuple):
    """A file in the directory of a checkpoint: its size in bytes, and what lies where in it."""

    name: str
    size: int
    datasets: Mapping[str, StoredDataset]

    def as_json(self) -> dict[str, Any]:
        """Return it as it stands in the manifest."""
        datasets = {name: dataset._asdict() for name, dataset in self.datasets.items()}
        return {"name": self.name, "size": self.size, "datasets": datasets}


class StoredBox(NamedTuple):
    """A part of an array as it lies in a file.

    Attributes
    ----------
    file : int
        Index of the file in `Manifest.files`.
    first : int
        Position of the box's first element in the dataset, counted in C order. A dataset with as
        many dimensions as the box has the box as a region; in another one, of one dimension, the
        box's elements lie side by side, in C order.
    digests : bytes
        `DIGEST_BYTES` for each chunk of the box (`ChunkGrid`).
    """

    box: Box
    file: int
    dataset: str
    first: int
    digests: bytes

    def as_json(self) -> dict[str, Any]:
        """Return it as it stands in the manifest."""
        return {
            "file": self.file,
            "dataset": self.dataset,
            "first": self.first,
            "offsets": self.box.offsets,
            "sizes": self.box.sizes,
            "digests": base64.b64encode(self.digests).decode(),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> StoredBox:
        """Undo `as_json`."""
        return cls(
            box_of(tuple(entry["offsets"]), tuple(entry["sizes"])),
            entry["file"],
            entry["dataset"],
            entry["first"],
            base64.b64decode(entry["digests"]),
        )


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint.

    Attributes
    ----------
    dtype : dtype
        Its own; bfloat16 is stored as uint16.
    shape : tuple of int
        Length of each dimension of the whole array.
    boxes : tuple of StoredBox
        Its parts: they cover it, each element once.
    """

    dtype: DType
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return Box.whole(self.shape).count * self.dtype.itemsize

    @cached_property
    def numbers(self) -> dict[Box, int]:
        """Positions in `boxes`, by box."""
        return {stored.box: number for number, stored in enumerate(self.boxes)}

    @cached_property
    def index(self) -> BoxIndex:
        """Finds positions in `boxes` by what is wanted of the array."""
        return BoxIndex([stored.box for stored in self.boxes])


ALIGNMENT = 1 << 20
"""Bytes from which on a box has a dataset of its own, which begins at a multiple of them."""

ID_DATASET = "mpidist id"
"""Dataset of a file with the manifest's id, ASCII, which distinguishes files of different saves."""

FORMAT, VERSION = "mpidist checkpoint", 1
MANIFEST = "manifest.json"

MOST_BYTES = 1 << 30
"""Bytes of a manifest, which has the digests of at least 6 TiB then. A larger file is not read."""

FLOAT_KEY = "mpidist:float"
"""Key of a mapping that stands for a float that JSON has no number for: inf, -inf, nan."""

JSON: TypeAlias = Any
"""None, a bool, int, float, str, or a list or a mapping (with str keys) of such."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint says of itself.

    Attributes
    ----------
    id : str
        Of this save; also in its files.
    created : str
        When it was committed, ISO 8601, UTC.
    versions : mapping of str to str
        Of mpidist and the libraries.
    crossovers : JSON value
        From which sizes on the group took which path, on which rounding may depend.
    metadata : JSON value
        What the user gave to `save`.
    values : mapping of str to JSON value
        What is no array, by name.
    files : tuple of StoredFile
        The files in its directory, but for the view.
    """

    id: str
    step: int
    created: str
    world_size: int
    versions: Mapping[str, str] = field(default_factory=dict)
    crossovers: JSON = None
    metadata: JSON = None
    values: Mapping[str, JSON] = field(default_factory=dict)
    files: tuple[StoredFile, ...] = ()
    arrays: Mapping[str, StoredArray] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the manifest as a file holds it: JSON with a digest of all the rest."""
        arrays = {
            name: {
                "dtype": name_of(array.dtype),
                "shape": array.shape,
                "boxes": [box.as_json() for box in array.boxes],
            }
            for name, array in self.arrays.items()
        }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id,
            "step": self.step,
            "created": self.created,
            "world_size": self.world_size,
            "versions": dict(self.versions),
            "crossovers": self.crossovers,
            "metadata": encode(self.metadata),
            "values": encode(dict(self.values)),
            "files": [file.as_json() for file in self.files],
            "arrays": arrays,
        }
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        # The digest goes in front: a person sees at once what kind of file this is.
        return FRONT + digest_of(text).encode() + b'",' + text[1:] + b"\n"


FRONT = b'{"digest":"'
"""How the file of a manifest begins."""


def digest_of(text: bytes) -> str:
    """Return the digest of a manifest's text, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(text)


def encode(value: JSON) -> JSON:
    """Return a value as JSON has it: with something else for inf and nan."""
    if isinstance(value, float) and not np.isfinite(value):
        return {FLOAT_KEY: str(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


_FLOATS = {text: float(text) for text in ("inf", "-inf", "nan")}


def decode(value: JSON) -> JSON:
    """Undo `encode`."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_KEY}:
            return _FLOATS[value[FLOAT_KEY]]
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value
