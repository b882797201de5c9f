"""What lies where: the parts of a manifest."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

from mpidist._types import DType
from mpidist.arrays.boxes import Box, BoxIndex
from mpidist.arrays.namespaces import DTYPES

__all__ = [
    "StoredArray",
    "StoredBox",
    "StoredDataset",
    "StoredFile",
    "box_of",
    "dtype_of",
    "name_of",
]

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
        Its shape.
    """

    byte: int
    shape: tuple[int, ...]


class StoredFile(NamedTuple):
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

    def as_json(self) -> dict[str, Any]:
        """Return it as it stands in the manifest."""
        datasets = {name: each._asdict() for name, each in self.datasets.items()}
        return {"name": self.name, "size": self.size, "datasets": datasets}


class StoredBox(NamedTuple):
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

    @cached_property
    def numbers(self) -> dict[Box, int]:
        """Positions in `boxes`, by box."""
        return {stored.box: number for number, stored in enumerate(self.boxes)}

    @cached_property
    def index(self) -> BoxIndex:
        """Finds positions in `boxes` by what is wanted of the array."""
        return BoxIndex([stored.box for stored in self.boxes])
