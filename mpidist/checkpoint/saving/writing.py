"""One rank's file: its parts laid out, written, synced, and given its name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import as_bytes
from mpidist.checkpoint.format import hdf5
from mpidist.checkpoint.format.files import naming, publish, temporary, write_at
from mpidist.checkpoint.format.layout import Extent, lay_out
from mpidist.checkpoint.format.manifest import (
    ALIGNMENT,
    ID_DATASET,
    StoredBox,
    StoredDataset,
    StoredFile,
)
from mpidist.checkpoint.format.tiles import digests_of
from mpidist.checkpoint.saving.worker import settle

__all__ = ["Piece", "Writable", "Written", "shard_name", "write_file"]

_BLOCK = 1 << 22
"""Bytes that are gathered before they are written, where they do not lie side by side already; in
two such blocks: one for the elements of a piece, and one for small pieces."""


class Writable(Extent, Protocol):
    """A part of an array, wherever its elements are."""

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """Yield its bytes, little-endian: where they begin in C order, and an array of uint8.

        A chunk has to last until the next one is asked for.
        """
        ...

    def digests(self) -> bytes:
        """Return the digests of its tiles; asked for when all chunks have been."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an array, in memory: a `Writable`.

    Attributes
    ----------
    name : str
        Of the array.
    box : Box
        Which part.
    data : Array
        Its elements, of the box's sizes; host memory. Need not be contiguous.
    """

    name: str
    box: Box
    data: Array

    @property
    def dtype(self) -> DType:
        """Of the array."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return int(self.data.nbytes)

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """Yield all at once if it lies side by side, else a copy of one block after the other."""
        little = self.dtype.newbyteorder("<")
        if self.data.flags.c_contiguous and self.dtype == little:
            yield 0, as_bytes(self.data)
            return
        memory = np.empty(min(self.nbytes, _BLOCK), np.uint8)
        place = 0
        for chunk in _blocks(self.data):
            copied = memory[: chunk.nbytes]
            np.copyto(copied.view(little).reshape(chunk.shape), chunk)
            yield place, copied
            place += chunk.nbytes

    def digests(self) -> bytes:
        """Return the digests of its tiles."""
        return digests_of(self.data)


@dataclass(frozen=True)
class Written:
    """A file that is complete and on disk.

    Attributes
    ----------
    file : StoredFile or None
        The file; None if a rank before this one tells of it.
    boxes : list of (str, StoredBox)
        What lies in it, by name of the array; `StoredBox.file` is to be set.
    """

    file: StoredFile | None
    boxes: list[tuple[str, StoredBox]]


def shard_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.h5"


def write_file(
    path: Path,
    pieces: Sequence[Writable],
    attributes: Mapping[str, str | int],
    meanwhile: Callable[[], None] = lambda: None,
) -> Written:
    """Write a file with these pieces.

    Parameters
    ----------
    path : Path
        Its directory must exist.
    pieces : sequence of Writable
        What goes into it; there may be none.
    attributes : mapping of str to (str or int)
        Of the file.
    meanwhile : callable, optional
        What else is to be done beside it; the file is not complete if that raises.

    Returns
    -------
    Written
        When it is on disk, under its name, and the directory is, too.

    Raises
    ------
    OSError
        If it cannot be; a part of it may be there under its temporary name.

    Notes
    -----
    Local. Memory: at most 8 MiB, and one chunk of a piece that is not in memory as it is
    written. Digests are computed while the disk works.
    """
    pieces, datasets, boxes = lay_out(pieces)
    identity = np.frombuffer(str(attributes["id"]).encode(), np.uint8)
    datasets[ID_DATASET] = (identity.shape, identity.dtype)
    shapes = [(name, shape, dtype) for name, (shape, dtype) in datasets.items()]
    part = temporary(path)
    with _beside(meanwhile), naming(part, sum(piece.nbytes for piece in pieces)):
        begins = hdf5.create_file(part, shapes, attributes)
        descriptor = os.open(part, os.O_RDWR | os.O_NOFOLLOW)
        try:
            write_at(descriptor, identity, begins[ID_DATASET])
            for data, offset in _stream(pieces, boxes, begins):
                write_at(descriptor, data, offset)
            size = os.fstat(descriptor).st_size
            with _beside(os.fsync, descriptor):
                digests = [piece.digests() for piece in pieces]
        finally:
            os.close(descriptor)
    publish(part, path, warn=attributes["rank"] == 0)  # one rank's warning is enough
    stored = StoredFile(
        path.name,
        size,
        {name: StoredDataset(begins[name], shape) for name, (shape, _) in datasets.items()},
    )
    found = [
        (piece.name, StoredBox(piece.box, 0, dataset, first, digest))
        for piece, (dataset, first), digest in zip(pieces, boxes, digests, strict=True)
    ]
    return Written(stored, found)


def _stream(
    pieces: Sequence[Writable], boxes: Sequence[tuple[str, int]], begins: Mapping[str, int]
) -> Iterator[tuple[Array, int]]:
    """Yield what is to be written, and where; small chunks that follow each other together."""
    block = np.empty(0, np.uint8)
    filled, begin = 0, 0
    for piece, (dataset, first) in zip(pieces, boxes, strict=True):
        start = begins[dataset] + first * piece.dtype.itemsize
        for place, chunk in piece.chunks():
            offset = start + place
            if chunk.nbytes >= ALIGNMENT:
                yield chunk, offset
                continue
            if filled and (offset != begin + filled or filled + chunk.nbytes > _BLOCK):
                yield block[:filled], begin
                filled = 0
            if not filled:
                begin = offset
            if not block.size:
                block = np.empty(_BLOCK, np.uint8)
            block[filled : filled + chunk.nbytes] = chunk
            filled += chunk.nbytes
    if filled:
        yield block[:filled], begin


def _blocks(data: Array) -> Iterator[Array]:
    """Cut an array into parts of at most a block, in C order."""
    if data.nbytes <= _BLOCK:
        yield data
    elif len(data) == 1:
        yield from _blocks(data[0])
    else:
        rows = max(_BLOCK * len(data) // data.nbytes, 1)
        for start in range(0, len(data), rows):
            yield from _blocks(data[start : start + rows])


@contextmanager
def _beside(call: Callable[..., None], *args: object) -> Iterator[None]:
    """Call a function in a thread of its own while the block runs; raise what it raises.

    Not in an executor of the standard library: see `Worker`.
    """
    future: Future[None] = Future()
    thread = threading.Thread(target=settle, args=(future, call, *args), daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()  # it uses what the caller is about to close
    future.result()
