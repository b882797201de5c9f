"""The manifest: which part of which array lies where, and what else a checkpoint says."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import xxhash

from mpidist.checkpoint.format.limits import MOST_STEP
from mpidist.checkpoint.format.parsing import (
    CONTRADICTIONS,
    arrays_of,
    check_names,
    files_of,
    text_of,
    whole_number,
)
from mpidist.checkpoint.format.stored import (
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
    box_of,
    dtype_of,
    name_of,
)
from mpidist.errors import CheckpointCorruptError, CheckpointIncompatibleError

__all__ = [
    "ALIGNMENT",
    "FLOAT_KEY",
    "FORMAT",
    "ID_DATASET",
    "JSON",
    "MANIFEST",
    "MOST_BYTES",
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
            "files": [file.as_json() for file in self.files],
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
        if len(data) > MOST_BYTES:
            raise CheckpointCorruptError(
                f"{where} has {len(data)} bytes, and a manifest at most {MOST_BYTES}; load another "
                "step"
            )
        with _uncollected():
            return cls._from_bytes(data, where)

    @classmethod
    def _from_bytes(cls, data: bytes, where: object) -> Manifest:
        try:
            body = json.loads(data.decode("utf-8", "surrogatepass"))
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
        except CONTRADICTIONS as error:
            raise CheckpointCorruptError(
                f"{where} contradicts itself ({type(error).__name__}: {error}); load another step"
            ) from error


def _parsed(body: Mapping[str, JSON]) -> Manifest:
    files = files_of(body["files"])
    values = dict(decode(body["values"]).items())
    check_names(list(values))
    identity = text_of(body["id"], 64)
    return Manifest(
        id=identity.encode("ascii").decode(),  # raises ValueError if it is not
        step=whole_number(body["step"], 0, MOST_STEP),
        created=text_of(body["created"], 64),
        world_size=whole_number(body["world_size"], 1),
        versions={text_of(key): text_of(text) for key, text in body["versions"].items()},
        crossovers=body["crossovers"],
        metadata=decode(body["metadata"]),
        values=values,
        files=files,
        arrays=arrays_of(body["arrays"], files),
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile, which takes longer than all else where objects are many."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


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
