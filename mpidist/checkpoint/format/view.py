"""What programs that know only HDF5 see: the view of a checkpoint, and what its files contain."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.checkpoint.format.files import (
    LOCKING,
    TAG,
    byte_offset,
    errors_of_the_system,
    name_links,
    open_regular,
    set_attributes,
    stored_dtype,
)
from mpidist.checkpoint.format.manifest import FORMAT, Manifest, StoredBox, encode

VIEW = "view.h5"

MOST_IN_VIEW = 4096
"""Arrays in a view: a virtual dataset takes a fifth of a millisecond to make."""


def create_view(path: Path, manifest: Manifest) -> None:
    """Make the file that shows whole arrays as virtual datasets of the files in its directory.

    Raises
    ------
    OSError
        If it cannot be written, or is there already.

    Notes
    -----
    For people and tools. A virtual dataset whose file is missing reads as its fill value (NaN, or
    0 where there is none) without an error, so nothing here ever reads it. Of more than 4,096
    arrays it shows the largest.
    """
    import h5py

    names = sorted(manifest.arrays, key=lambda name: -manifest.arrays[name].nbytes)
    shown = sorted(names[:MOST_IN_VIEW])
    # Texts may have more than the 64 KiB that HDF5 once had room for: files of 1.10 keep large
    # attributes elsewhere.
    attributes: dict[str, str | int] = {
        "format": f"view of {FORMAT}",
        "arrays": f"{len(shown)} of {len(names)}",
        "id": manifest.id,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "metadata": json.dumps(encode(manifest.metadata), allow_nan=False),
        "values": json.dumps(encode(dict(manifest.values)), allow_nan=False),
    }
    # What many arrays have in common is made once.
    links, layouts, spaces = name_links(), cache(_virtual), lru_cache(maxsize=1024)(_selected)
    # Virtual datasets came with HDF5 1.10, whose groups are smaller and faster than those before.
    with (
        errors_of_the_system(path),
        h5py.File(path, "x", locking=LOCKING, libver=("v110", "v110")) as file,
    ):
        set_attributes(file, attributes)
        # By h5py's low-level calls, as its others take ten times as long.
        for name in shown:
            array = manifest.arrays[name]
            element_type, empty = layouts(stored_dtype(array.dtype))
            layout = empty.copy()
            for stored in array.boxes:
                if not stored.box.empty:
                    origin = manifest.files[stored.file]
                    source = stored.dataset.replace("%", "%%")  # "%b" would be a block's number
                    selected = _selected_in(origin.datasets[stored.dataset].shape, stored)
                    target = spaces(array.shape, stored.box)
                    layout.set_virtual(target, origin.name.encode(), source.encode(), selected)
            space = spaces(array.shape, None)
            made = h5py.h5d.create(file.id, name.encode(), element_type, space, layout, links)
            if array.dtype == BFLOAT16:
                set_attributes(h5py.Dataset(made), {TAG: str(array.dtype)})


def _virtual(dtype: DType) -> tuple[Any, Any]:
    """Return HDF5's type of elements, and the layout of a virtual dataset without sources."""
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.VIRTUAL)
    if dtype.kind in "fc":
        layout.set_fill_value(np.array([np.nan], dtype))
    return h5py.h5t.py_create(dtype, logical=True), layout


def _selected(shape: Sequence[int], box: Box | None) -> Any:
    """Return a data space in which a box is selected, or all."""
    import h5py

    space = h5py.h5s.create_simple(tuple(shape))
    if shape and box is not None:  # the one element of a 0-d array is always selected
        space.select_hyperslab(box.offsets, box.sizes)
    return space


def _selected_in(shape: tuple[int, ...], stored: StoredBox) -> Any:
    """Return the data space of a dataset in which a stored box is selected."""
    if len(shape) == 1:
        return _selected(shape, Box((stored.first,), (stored.box.count,)))
    begin = map(int, np.unravel_index(stored.first, shape))
    return _selected(shape, Box(tuple(begin), stored.box.sizes))


class Dataset(NamedTuple):
    """A dataset, as a program sees it that knows HDF5 and nothing of manifests.

    Attributes
    ----------
    byte : int
        Where its bytes begin; 0 if it is empty, or they lie elsewhere.
    dtype : str
        Of its elements: with their order of bytes; that of the tag where there is one.
    sources : tuple of (str, str)
        Files and their datasets of which a virtual dataset consists, sorted.
    """

    byte: int
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[tuple[str, str], ...]


class Contents(NamedTuple):
    """What is in a file: the id of its save, if it says, and all datasets by their paths."""

    id: str | None
    datasets: dict[str, Dataset]


def contents(path: Path) -> Contents:
    """Return what is in a file.

    Raises OSError if it is no HDF5 file, or is cut off or damaged, and CheckpointCorruptError if it
    is no regular file. The library may end the process where a file is damaged: see
    `mpidist.checkpoint.tools.verifying.inspect`.
    """
    import h5py

    datasets: dict[str, Dataset] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sources = item.virtual_sources() if item.is_virtual else ()
            datasets[name] = Dataset(
                byte_offset(item.id),
                item.shape,
                bytes(item.attrs[TAG]).decode() if TAG in item.attrs else item.dtype.str,
                tuple(sorted({(s.file_name, s.dset_name.replace("%%", "%")) for s in sources})),
            )

    os.close(open_regular(path))  # HDF5 would wait at a FIFO
    try:
        with h5py.File(path, "r", locking=LOCKING) as file:
            file.visititems(note)
            identity = bytes(file.attrs["id"]).decode() if "id" in file.attrs else None
    except OSError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # where it found damage later
        raise OSError(f"{type(error).__name__}: {error}") from error
    return Contents(identity, datasets)


def stored_as(dtype: DType) -> str:
    """Return the dtype that `contents` gives to elements."""
    return str(dtype) if dtype == BFLOAT16 else stored_dtype(dtype).str
