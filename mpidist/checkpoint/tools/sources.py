"""Arrays that are read part by part: those of a checkpoint, and whatever else is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.loading.reading import Files
from mpidist.checkpoint.loading.units import UNIT, Pieces, Unit, Wanted, give, units_of

__all__ = ["Progress", "Reader", "Source", "StoredSource", "unheard"]

Progress: TypeAlias = Callable[[int], object]
"""Is told how many more bytes are done."""


def unheard(nbytes: int) -> None:
    """Take no notice of progress."""


class Source(Protocol):
    """An array of which any part can be had, and which need not be in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        ...

    @property
    def dtype(self) -> DType:
        """Of the array; its bytes may be in any order."""
        ...

    def read(self, box: Box) -> Array:
        """Return the elements of a part, of the sizes of `box`."""
        ...


class Reader:
    """Reads any part of any array of a checkpoint, each verified by its digests.

    Parameters
    ----------
    checkpoint : Checkpoint
        What to read.

    Notes
    -----
    A context manager. Memory: 1 MiB, and what is asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._manifest = checkpoint.manifest
        self._files = Files(checkpoint.directory, self._manifest)
        self._memory = np.empty(UNIT, np.uint8)

    def __enter__(self) -> Reader:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._files.__exit__()

    def read(self, name: str, box: Box) -> Array:
        """Return a part of an array.

        Raises
        ------
        CheckpointError
            As `Files.load`.
        """
        out: Array = np.empty(box.sizes, self._manifest.arrays[name].dtype)
        for unit, data in self.units(name, box):
            give(self._manifest, unit, data, {name: Pieces([(box, out)])})
        return out

    def units(self, name: str, box: Box) -> Iterator[tuple[Unit, Array]]:
        """Yield what has to be read of an array for a part of it.

        Yields
        ------
        Unit, Array
            Which tiles, and their elements, until the next ones are asked for.
        """
        for unit in units_of(self._manifest, [Wanted(name, box)]):
            yield unit, self._files.load([unit], [self._memory])[0]

    def sources(self) -> dict[str, Source]:
        """Return all arrays, to be read while this is open."""
        arrays = self._manifest.arrays.items()
        return {name: StoredSource(self, name, array.shape, array.dtype) for name, array in arrays}


class StoredSource:
    """An array of a checkpoint: a `Source`.

    Parameters
    ----------
    reader : Reader
        Of the checkpoint; it has to be open while this is read.
    name : str
        Of the array.
    shape : tuple of int
        Of the array.
    dtype : dtype
        Of the array.
    """

    def __init__(self, reader: Reader, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        self._reader = reader
        self._name = name
        self.shape = shape
        self.dtype = dtype

    def read(self, box: Box) -> Array:
        """Return the elements of a part."""
        return self._reader.read(self._name, box)
