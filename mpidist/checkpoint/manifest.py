"""The manifest: which part of which array lies where, and what else a checkpoint says."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from math import prod
from operator import le
from typing import Any, TypeAlias

import numpy as np
import xxhash

from mpidist._types import DType
from mpidist.arrays import DTYPES
from mpidist.boxes import Box
from mpidist.checkpoint.cover import check_cover
from mpidist.checkpoint.tiles import DIGEST_BYTES, Tiling
from mpidist.errors import CheckpointCorruptError, CheckpointIncompatibleError

__all__ = [
    "ALIGNMENT",
    "FLOAT_KEY",
    "FORMAT",
    "ID_DATASET",
    "JSON",
    "MANIFEST",
    "VERSION",
    "Manifest",
    "StoredArray",
    "StoredBox",
    "StoredDataset",
    "StoredFile",
    "box_of",
    "decode",
    "dtype_of",
    "encode",
    "name_of",
]

ALIGNMENT = 1 << 20
"""Bytes from which on a box has a dataset of its own, which begins at a multiple of them."""

ID_DATASET = "mpidist id"
"""Dataset of a file with the manifest's id, ASCII, which tells files of different saves apart."""

FORMAT, VERSION = "mpidist checkpoint", 1
MANIFEST = "manifest.json"

FLOAT_KEY = "mpidist:float"
"""Key of a mapping that stands for a float that JSON has no number for: inf, -inf, nan."""

JSON: TypeAlias = Any
"""None, a bool, int, float, str, or a list or a mapping (with str keys) of such."""

_DTYPES = {str(dtype): dtype for dtype in DTYPES}


def dtype_of(name: str) -> DType:
    """Return the dtype of a name as manifests have it; KeyError for others."""
    return _DTYPES[name]


@cache
def name_of(dtype: DType) -> str:
    """Return the name that manifests have for a dtype of any byte order."""
    return str(dtype.newbyteorder("="))


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A dataset of a file: contiguous, C order, little-endian.

    Attributes
    ----------
    byte : int
        Where its bytes begin, counted from the beginning of the file.
    shape : tuple of int
        Its shape.
    """

    byte: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint.

    Attributes
    ----------
    name : str
        In the checkpoint's directory.
    size : int
        Bytes.
    datasets : mapping of str to StoredDataset
        What lies where in it, by name.
    """

    name: str
    size: int
    datasets: Mapping[str, StoredDataset]


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A part of an array as it lies in a file.

    Attributes
    ----------
    box : Box
        Which part.
    file : int
        Position in `Manifest.files`.
    dataset : str
        Of that file.
    first : int
        Position of the box's first element in the dataset, counted in C order. A dataset with as
        many dimensions as the box has the box as a region; in another one, of one dimension, the
        box's elements lie side by side, in C order.
    digests : bytes
        `DIGEST_BYTES` per tile (`Tiling`).
    """

    box: Box
    file: int
    dataset: str
    first: int
    digests: bytes

    def as_json(self) -> dict[str, JSON]:
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
    def from_json(cls, entry: Mapping[str, JSON]) -> StoredBox:
        """Undo `as_json`."""
        return cls(
            box_of(_numbers(entry["offsets"]), _numbers(entry["sizes"])),
            int(entry["file"]),
            str(entry["dataset"]),
            int(entry["first"]),
            base64.b64decode(entry["digests"], validate=True),
        )


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array of a checkpoint.

    Attributes
    ----------
    dtype : dtype
        Its own; bfloat16 is stored as uint16.
    shape : tuple of int
        Of the whole array.
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


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint says of itself.

    Attributes
    ----------
    id : str
        Of this save; also in its files.
    step : int
        As given to `save`.
    created : str
        When it was committed, ISO 8601, UTC.
    world_size : int
        Ranks that saved it.
    versions : mapping of str to str
        Of mpidist and the libraries.
    crossovers : JSON value
        From which sizes on the group took which path, on which rounding may depend.
    metadata : JSON value
        The user's own.
    values : mapping of str to JSON value
        What is no array, by name.
    files : tuple of StoredFile
        Its files.
    arrays : mapping of str to StoredArray
        Its arrays, by name.
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
            "files": [asdict(file) for file in self.files],
            "arrays": arrays,
        }
        text = _text(body)
        # The digest goes in front: a person sees at once what kind of file this is.
        return _FRONT + _digest(text).encode() + b'",' + text[1:] + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Manifest:
        """Read a manifest, and believe nothing that it does not prove.

        Parameters
        ----------
        data : bytes
            Contents of the file.
        where : object
            Its path, for messages.

        Raises
        ------
        CheckpointCorruptError
            If it is cut off, damaged or edited, or contradicts itself.
        CheckpointIncompatibleError
            If its format is a later one.
        """
        try:
            body = json.loads(data)
            digest = body.pop("digest")
            kind, version = body["format"], body["version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointCorruptError(
                f"{where} is not, or not all of, the manifest of a checkpoint: "
                f"{type(error).__name__}: {error}; load another step"
            ) from error
        if kind == FORMAT and isinstance(version, int) and version > VERSION:
            raise CheckpointIncompatibleError(
                f"{where} has version {version} of the format, and this mpidist reads up to "
                f"{VERSION}; install a later mpidist"
            )
        if kind != FORMAT or not data.startswith(_FRONT) or digest != _digest(_rest(data)):
            raise CheckpointCorruptError(
                f"{where} is damaged, or was edited: its contents do not have the digest that it "
                "states; restore it from a copy, or load another step"
            )
        try:
            return _parsed(body)
        except _CONTRADICTIONS as error:
            raise CheckpointCorruptError(
                f"{where} contradicts itself ({type(error).__name__}: {error}); load another step"
            ) from error


_CONTRADICTIONS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What code raises when JSON is not what it takes it for."""


def _parsed(body: Mapping[str, JSON]) -> Manifest:
    files = tuple(map(_file, body["files"]))
    arrays = {}
    for name, entry in body["arrays"].items():
        boxes = tuple(map(StoredBox.from_json, entry["boxes"]))
        array = StoredArray(dtype_of(entry["dtype"]), _numbers(entry["shape"]), boxes)
        _check_cover(array.shape, tuple(stored.box for stored in boxes))
        for stored in boxes:
            _check_place(name, stored, array.dtype.itemsize, files)
        arrays[name] = array
    return Manifest(
        id=str(body["id"]),
        step=int(body["step"]),
        created=str(body["created"]),
        world_size=int(body["world_size"]),
        versions=dict(body["versions"]),
        crossovers=body["crossovers"],
        metadata=decode(body["metadata"]),
        values=decode(body["values"]),
        files=files,
        arrays=arrays,
    )


# Many arrays have the same few shapes, and are cut in the same way.
box_of = lru_cache(maxsize=4096)(Box)
"""Make a `Box`; of the same numbers mostly the same object."""

_check_cover = lru_cache(maxsize=1024)(check_cover)  # what it raises is not kept


def _file(entry: Mapping[str, JSON]) -> StoredFile:
    name = str(entry["name"])
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise ValueError(f"a file named {name!r} is not in this directory")
    datasets = {
        key: StoredDataset(int(dataset["byte"]), _numbers(dataset["shape"]))
        for key, dataset in entry["datasets"].items()
    }
    return StoredFile(name, int(entry["size"]), datasets)


def _check_place(
    name: str, stored: StoredBox, itemsize: int, files: tuple[StoredFile, ...]
) -> None:
    """Raise ValueError unless a box lies inside its dataset, and that inside its file."""
    tiles = Tiling.of(stored.box.sizes, itemsize).count
    if len(stored.digests) != tiles * DIGEST_BYTES:
        raise ValueError(f"{name}: {len(stored.digests)} bytes of digests for {tiles} tiles")
    if not tiles:
        return
    if stored.file < 0:
        raise ValueError(f"{name}: file {stored.file}")
    file = files[stored.file]
    dataset = file.datasets[stored.dataset]
    count = prod(dataset.shape)
    if not (dataset.byte >= 0 and dataset.byte + count * itemsize <= file.size):
        raise ValueError(f"{name}: {stored.dataset} does not lie inside {file.name}")
    sizes = stored.box.sizes
    if len(dataset.shape) == 1:
        inside = 0 <= stored.first <= count - stored.box.count
    elif stored.first == 0:
        inside = len(sizes) == len(dataset.shape) and all(map(le, sizes, dataset.shape))
    else:
        begin = np.unravel_index(stored.first, dataset.shape)  # raises if it is outside
        inside = all(
            a + n <= length for a, n, length in zip(begin, sizes, dataset.shape, strict=True)
        )
    if not inside:
        raise ValueError(f"{name}: {stored.box} does not lie inside {stored.dataset}")


def _text(body: Mapping[str, JSON]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


_FRONT = b'{"digest":"'


def _rest(data: bytes) -> bytes:
    """Return what the digest of a manifest is of: its bytes, as they would be without it.

    Not the JSON written anew: another program may write numbers in another way.
    """
    return b"{" + data[len(_FRONT) + 34 : -1]  # 32 hexadecimal digits, a quote and a comma; the \n


def _digest(text: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(text)


_INT = frozenset([int])


def _numbers(values: JSON) -> tuple[int, ...]:
    if not _INT.issuperset(map(type, values)):
        raise ValueError(f"expected whole numbers, got {values}")
    return tuple(values)


def encode(value: JSON) -> JSON:
    """Return a value as JSON has it: with something else for inf and nan."""
    if isinstance(value, float) and not np.isfinite(value):
        return {FLOAT_KEY: str(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode(value: JSON) -> JSON:
    """Undo `encode`."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT_KEY}:
            return float(value[FLOAT_KEY])
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value
