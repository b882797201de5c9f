"""The manifest: which part of which array lies where, and what else a checkpoint says.

Names, shapes and steps have the same limits when a checkpoint is saved and when it is read. Names
reach terminals, HDF5 files and the entries of zip files, so they hold no control characters and no
way out of a directory. The limits of shapes are those of HDF5 and of numpy.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from math import prod
from operator import index
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import xxhash

from mpidist._types import DType
from mpidist.arrays.boxes import Box, BoxIndex
from mpidist.arrays.namespaces import DTYPES

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
        text = repr(step) if len(repr(step)) <= 40 else f"{repr(step)[:40]}..."
        raise ValueError(f"a step is a whole number from 0 to 2**63 - 1, got {text}")
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


class StoredDataset(NamedTuple):
    """A dataset of a file: contiguous, C order, little-endian.

    Attributes
    ----------
    byte : int
        Where its bytes begin, counted from the beginning of the file.
    shape : tuple of int
        Length of each dimension, as HDF5 sees it.
    """

    byte: int
    shape: tuple[int, ...]


class StoredFile(NamedTuple):
    """A file of a checkpoint.

    Attributes
    ----------
    name : str
        The file's name in the checkpoint's directory.
    size : int
        Length of the file in bytes.
    datasets : mapping of str to StoredDataset
        What lies where in it, by name.
    """

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
    box : Box
        The part of the array.
    file : int
        Index of the file in `Manifest.files`.
    dataset : str
        Name of a dataset of that file.
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
    step : int
        The step given to `save`.
    created : str
        When it was committed, ISO 8601, UTC.
    world_size : int
        Number of ranks that saved it.
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
    arrays : mapping of str to StoredArray
        Dtype, shape and boxes by name.
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
        text = _text(body)
        # The digest goes in front: a person sees at once what kind of file this is.
        return FRONT + digest_of(text).encode() + b'",' + text[1:] + b"\n"


def _text(body: Mapping[str, JSON]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


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
