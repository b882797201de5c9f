"""One file for all ranks, written together through HDF5's driver for MPI.

[Note: the same calls] Whatever changes the structure of such a file, and each write in it, is
collective: a rank that leaves one out, because it has nothing to write, or because its disk is
full, keeps the others waiting in a library that has no deadline. So the ranks agree on the number
of writes of each dataset first; a rank with fewer blocks takes part in the others without one; and
what fails is remembered, and raised when the file is closed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from mpidist._types import MAX, Array, DType
from mpidist.boxes import Box
from mpidist.checkpoint import hdf5
from mpidist.checkpoint.files import sync_directory, temporary, write_at
from mpidist.checkpoint.manifest import ID_DATASET, StoredBox, StoredDataset, StoredFile, dtype_of
from mpidist.checkpoint.plan import Kind
from mpidist.checkpoint.worker import done_here
from mpidist.checkpoint.writing import Piece, Written
from mpidist.collectives import all_reduce, barrier
from mpidist.errors import BackendUnavailableError
from mpidist.group import ProcessGroup

__all__ = ["SINGLE_FILE", "check_single_file", "write_together"]

SINGLE_FILE = "arrays.h5"

_BLOCK = 1 << 23
"""Most bytes that a rank gives to one write; they are copied if they do not lie side by side."""


def check_single_file(group: ProcessGroup) -> None:
    """Raise BackendUnavailableError unless the ranks of a group can write one file."""
    _ = group.mpi_comm  # raises
    if not hdf5.has_mpi():
        found = " and ".join(f"{name} {version}" for name, version in hdf5.versions().items())
        raise BackendUnavailableError(
            f"single_file=True: this h5py was built without MPI ({found}); build one with the MPI "
            "library of the job (CC=mpicc HDF5_MPI=ON pip install --no-binary=h5py h5py), or save "
            "one file per rank"
        )


def write_together(
    path: Path,
    taken: Future[list[Piece]],
    kinds: Mapping[str, Kind],
    attributes: Mapping[str, str | int],
    group: ProcessGroup,
) -> Written:
    """Write one file with the pieces of all ranks.

    Parameters
    ----------
    path : Path
        Its directory must exist.
    taken : Future of list of Piece
        What this rank writes, or why it cannot; over.
    kinds : mapping of str to Kind
        All arrays, the same on all ranks, in the same order.
    attributes : mapping of str to (str or int)
        Of the file; the same on all ranks.
    group : ProcessGroup
        The ranks.

    Returns
    -------
    Written
        When the file is closed on all ranks and synced on this one; on rank 0, which tells of the
        file itself, when it also has its name.

    Raises
    ------
    OSError
        Perhaps on one rank only, if it could not write. All the others return.
    Exception
        What `taken` holds, after the others have written their parts.

    Notes
    -----
    Collective over `group`. Memory: one block of 8 MiB, and what the MPI library takes. See
    [Note: the same calls].
    """
    pieces = [] if taken.exception() else [p for p in taken.result() if not p.box.empty]
    blocks: dict[str, list[tuple[Box, Piece]]] = {name: [] for name in kinds}
    for piece in pieces:
        blocks[piece.name] += [(b, piece) for b in _blocks(piece.box, piece.dtype.itemsize)]
    rounds = all_reduce(np.array([len(mine) for mine in blocks.values()], np.int64), group, op=MAX)
    part = temporary(path)
    filled = done_here(_fill, part, blocks, rounds, kinds, attributes, group.mpi_comm)
    barrier(group)  # from here on nobody needs the temporary name
    begins, size = filled.result()
    taken.result()
    boxes = [(piece.name, _stored(piece, kinds[piece.name].shape)) for piece in pieces]
    if group.rank:
        return Written(None, boxes)
    os.replace(part, path)  # noqa: PTH105  # beside os.fsync: the calls that must come in this order
    sync_directory(path.parent)
    datasets = {
        name: StoredDataset(begins[name], kind.shape)
        for name, kind in kinds.items()
        if 0 not in kind.shape  # no box lies in the others
    }
    datasets[ID_DATASET] = StoredDataset(begins[ID_DATASET], (len(str(attributes["id"])),))
    return Written(StoredFile(path.name, size, datasets), boxes)


def _fill(
    path: Path,
    blocks: Mapping[str, Sequence[tuple[Box, Piece]]],
    rounds: Array,
    kinds: Mapping[str, Kind],
    attributes: Mapping[str, str | int],
    comm: Any,
) -> tuple[dict[str, int], int]:
    """Make, write, close and sync the file; return where the datasets begin, and its size."""
    datasets = [(name, kind.shape, dtype_of(kind.dtype)) for name, kind in kinds.items()]
    identity = np.frombuffer(str(attributes["id"]).encode(), np.uint8)
    made_too = (ID_DATASET, identity.shape, identity.dtype)
    problem: BaseException | None = None
    with hdf5.shared_file(path, comm, [*datasets, made_too], attributes) as file:
        for (name, _, dtype), count in zip(datasets, rounds, strict=True):
            for _, block in zip_longest(range(count), blocks[name]):
                cut = done_here(_cut_out, block, dtype)
                box, data = (None, np.empty(1, dtype)) if cut.exception() else cut.result()
                made = done_here(file.write, name, box, data)
                problem = problem or cut.exception() or made.exception()
    if problem is not None:
        raise problem
    descriptor = os.open(path, os.O_RDWR)
    try:
        if comm.rank == 0:
            write_at(descriptor, identity, file.begins[ID_DATASET])
        os.fsync(descriptor)
        return file.begins, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _blocks(box: Box, itemsize: int) -> Iterator[Box]:
    """Cut a box into parts of at most a block, in C order."""
    nbytes = box.count * itemsize
    if nbytes <= _BLOCK:
        yield box
        return
    cut = next(d for d, size in enumerate(box.sizes) if size > 1)
    offset, size = box.offsets[cut], box.sizes[cut]
    step = max(_BLOCK * size // nbytes, 1)
    for start in range(0, size, step):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[cut], sizes[cut] = offset + start, min(step, size - start)
        yield from _blocks(Box(tuple(offsets), tuple(sizes)), itemsize)


def _cut_out(block: tuple[Box, Piece] | None, dtype: DType) -> tuple[Box | None, Array]:
    """Return what to write: a box and its elements as they are stored, or nothing."""
    if block is None:
        return None, np.empty(1, dtype)
    box, piece = block
    index: Any = (*box.relative_to(piece.box).slices, ...)  # a view, also of a 0-d array
    return box, np.ascontiguousarray(piece.data[index], dtype.newbyteorder("<"))


def _stored(piece: Piece, shape: Sequence[int]) -> StoredBox:
    """Return what the manifest says of a piece: a region of the array's dataset."""
    first = int(np.ravel_multi_index(piece.box.offsets, tuple(shape)))
    return StoredBox(piece.box, 0, piece.name, first, piece.digests())
