"""One file for all ranks, written together through HDF5's driver for MPI.

[Note: writing together] HDF5 can also make a file, and write into it, with all ranks at once. But
what fails on one rank then (HDF5 1.10.8 on MPICH 4.0.2, a full disk) is an error there and nowhere
else, and the others wait for that rank for ever. So rank 0 makes the file, with all datasets in
their places, and all ranks open it; then each writes its parts by itself, and they close it. Little
is lost: parts that do not interleave, as parts of rows, an MPI library writes by themselves anyway.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box, boxes_of_at_most, view_of_box
from mpidist.checkpoint.format import files
from mpidist.checkpoint.format.files import naming, rename_synced, temporary
from mpidist.checkpoint.format.manifest import (
    ID_DATASET,
    StoredBox,
    StoredDataset,
    StoredFile,
    dtype_of,
)
from mpidist.checkpoint.saving.plan import ArrayMetadata, SavePlan
from mpidist.checkpoint.saving.writing import HostBox, Written, call_now
from mpidist.collectives import barrier, broadcast_object
from mpidist.errors import BackendUnavailableError
from mpidist.group import ProcessGroup

SINGLE_FILE = "arrays.h5"

_BLOCK = 1 << 23
"""Most bytes that a rank gives to one write; they are copied if they do not lie side by side."""


def check_single_file(group: ProcessGroup) -> None:
    """Raise BackendUnavailableError unless the ranks of a group can write one file."""
    _ = group.mpi_comm  # raises
    if not files.has_mpi():
        versions = " and ".join(map(" ".join, files.hdf5_versions().items()))
        raise BackendUnavailableError(
            f"single_file=True: this h5py was built without MPI ({versions}); build one with the "
            "MPI library of the job (CC=mpicc HDF5_MPI=ON pip install --no-binary=h5py h5py), or "
            "save one file per rank"
        )


def write_together(
    plan: SavePlan,
    taken: Future[list[HostBox]],
    attributes: Mapping[str, str | int],
    group: ProcessGroup,
) -> Written:
    """Write one file with the boxes of all ranks; `taken` holds those of this rank.

    Returns when the file is closed on all ranks and synced on this one; on rank 0, which reports
    the file itself, when it also has its name. Raises OSError on a rank that could not write, while
    the others return, and whatever `taken` raises.

    Notes
    -----
    Collective over `group`. Memory: one block of 8 MiB, and what the MPI library takes. See
    [Note: writing together].
    """
    path = plan.directory / SINGLE_FILE
    part = temporary(path)
    arrays = broadcast_object(plan.coordinator and plan.coordinator[1].arrays, group)
    identity = np.frombuffer(plan.id.encode(), np.uint8)
    made = call_now(_make, part, arrays, identity, attributes) if group.rank == 0 else None
    if broadcast_object(made is not None and made.exception() is not None, group):
        if made is not None:
            made.result()  # raises
        return Written(None, [])
    filled = call_now(_fill, part, taken, identity, group)
    barrier(group)  # from here on nobody needs the temporary name
    filled.result()
    boxes = []
    for source in taken.result():
        if not source.box.empty:  # a region of the array's dataset
            first = int(np.ravel_multi_index(source.box.offsets, arrays[source.name].shape))
            stored = StoredBox(source.box, 0, source.name, first, source.digests())
            boxes.append((source.name, stored))
    if made is None:
        return Written(None, boxes)
    size = part.stat().st_size
    rename_synced(part, path)
    return Written(StoredFile(path.name, size, made.result()), boxes)


def _make(
    path: Path,
    arrays: Mapping[str, ArrayMetadata],
    identity: Array,
    attributes: Mapping[str, str | int],
) -> dict[str, StoredDataset]:
    """Make the file, and return its datasets, but for empty ones, in which no box lies."""
    datasets = [(name, array.shape, dtype_of(array.dtype)) for name, array in arrays.items()]
    datasets.append((ID_DATASET, identity.shape, identity.dtype))
    begins = files.create_file(path, datasets, attributes)
    return {
        name: StoredDataset(begins[name], shape) for name, shape, _ in datasets if 0 not in shape
    }


def _fill(path: Path, taken: Future[list[HostBox]], identity: Array, group: ProcessGroup) -> None:
    """Write, close and sync the file."""
    with files.parallel_file(path, group.mpi_comm) as write:
        if group.rank == 0:
            write(ID_DATASET, Box.whole(identity.shape), identity)
        for source in taken.result():
            if source.box.empty:
                continue
            for box in boxes_of_at_most(source.box, _BLOCK // source.dtype.itemsize):
                part = view_of_box(source.data, source.box, box)
                write(source.name, box, np.ascontiguousarray(part, part.dtype.newbyteorder("<")))
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
