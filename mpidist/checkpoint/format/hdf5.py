"""The door to h5py: files are made and described with it, their bytes are moved without it.

HDF5 gives each contiguous dataset one place in its file. Here it is asked to choose the places and
to write the structure, so that any tool that knows HDF5 opens the file. The bytes are written and
read at these places by the operating system's calls: h5py holds one lock for all threads and all
files while it moves them. A file that all ranks write together (`shared_file`) is the exception.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.checkpoint.format.files import open_regular
from mpidist.checkpoint.format.manifest import (
    ALIGNMENT,
    FORMAT,
    VERSION,
    Manifest,
    StoredBox,
    encode,
)

__all__ = [
    "MOST_IN_VIEW",
    "TAG",
    "Contents",
    "Dataset",
    "SharedFile",
    "contents",
    "create_file",
    "create_view",
    "has_mpi",
    "shared_file",
    "stored_as",
    "versions",
]

TAG = "mpidist dtype"
"""Attribute of datasets whose elements HDF5 has no type for."""


MOST_IN_VIEW = 4096
"""Arrays in a view: a virtual dataset takes a fifth of a millisecond to make."""


def create_file(
    path: Path,
    datasets: Iterable[tuple[str, Sequence[int], DType]],
    attributes: Mapping[str, str | int],
) -> dict[str, int]:
    """Make a file with datasets whose elements have places and no values yet.

    Parameters
    ----------
    path : Path
        Must not be there.
    datasets : iterable of (str, sequence of int, dtype)
        Name, shape and dtype of each.
    attributes : mapping of str to (str or int)
        Of the file.

    Returns
    -------
    dict of str to int
        Where the bytes of each dataset begin, from the beginning of the file: a multiple of
        `ALIGNMENT` for those of so many bytes. Empty ones have no place, and 0 stands for it.

    Raises
    ------
    OSError
        If it cannot be written, or is there already.
    """
    import h5py

    with (
        _errors_of_the_system(path),
        h5py.File(
            path,
            "x",
            locking=_LOCKING,
            alignment_threshold=ALIGNMENT,
            alignment_interval=ALIGNMENT,
        ) as file,
    ):
        _describe(file, {"format": FORMAT, "version": VERSION, **attributes})
        return {name: _create(file, name, shape, dtype) for name, shape, dtype in datasets}


_LOCKING = False
"""For every file: none is written by two processes, and where locks are refused (NFS without its
lock daemon, Lustre mounted without flock) HDF5 would not open any."""

_NUMBER = re.compile(r"errno = (\d+)")


@contextmanager
def _errors_of_the_system(path: Path) -> Iterator[None]:
    """Raise what the system has refused, with the file, in the place of HDF5's account of it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        match = _NUMBER.search(str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def shared_file(path: Path, comm: Any) -> Iterator[SharedFile]:
    """Open a file, to be written by all ranks of a communicator; needs `has_mpi`.

    Parameters
    ----------
    path : Path
        Made by one of them with `create_file`.
    comm : mpi4py communicator
        Whose ranks they are.

    Yields
    ------
    SharedFile
        Open until the block ends.

    Raises
    ------
    OSError
        On every rank, if it cannot be opened.

    Notes
    -----
    Collective, its end as well, however the block ends; what is done in the block is not. HDF5 has
    no deadline: a rank that does not come keeps the others waiting until the job ends.
    """
    import h5py

    with (
        _errors_of_the_system(path),
        h5py.File(path, "r+", locking=_LOCKING, driver="mpio", comm=comm) as file,
    ):
        yield SharedFile(file)


class SharedFile:
    """A file that several ranks write; see `shared_file`."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, name: str, box: Box, data: Array) -> None:
        """Write a box of a dataset.

        Parameters
        ----------
        name : str
            Of the dataset.
        box : Box
            Where; not empty. The boxes of the ranks must be disjoint.
        data : Array
            The elements, C-contiguous and little-endian.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        import h5py

        dataset = h5py.h5d.open(self._file.id, name.encode())
        space = dataset.get_space()
        if box.sizes:
            space.select_hyperslab(box.offsets, box.sizes)
        # As what they are in the file, so that HDF5 has nothing to convert.
        dataset.write(h5py.h5s.create_simple((data.size,)), space, data, dataset.get_type())


def has_mpi() -> bool:
    """Whether h5py was built with MPI."""
    import h5py

    return bool(h5py.get_config().mpi)


def versions() -> dict[str, str]:
    """Return the versions of h5py and HDF5."""
    import h5py

    return {"h5py": h5py.version.version, "hdf5": h5py.version.hdf5_version}


def _create(file: Any, name: str, shape: Sequence[int], dtype: DType) -> int:
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(tuple(shape)) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(_stored(dtype), logical=True)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, layout, _links())
    if dtype == BFLOAT16:
        _describe(h5py.Dataset(dataset), {TAG: str(dtype)})
    return _byte_offset(dataset)


def _byte_offset(dataset: Any) -> int:
    return int(dataset.get_offset() or 0)


def _links() -> Any:
    """Return how names are linked: in UTF-8, the groups on the way to them made."""
    import h5py

    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


def _describe(item: Any, attributes: Mapping[str, str | int]) -> None:
    """Set attributes of a file or a dataset.

    Texts have a fixed length, which programs in other languages read more easily.
    """
    for name, value in attributes.items():
        item.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def _stored(dtype: DType) -> DType:
    """Return what HDF5 shall take the elements for."""
    return np.dtype("<u2") if dtype == BFLOAT16 else dtype.newbyteorder("<")


def create_view(path: Path, manifest: Manifest) -> None:
    """Make the file that presents whole arrays as virtual datasets of all files beside it.

    Parameters
    ----------
    path : Path
        Must not be there.
    manifest : Manifest
        What lies where.

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
    # Virtual datasets came with HDF5 1.10, whose groups are smaller and faster than those before.
    with (
        _errors_of_the_system(path),
        h5py.File(path, "x", locking=_LOCKING, libver=("v110", "v110")) as file,
    ):
        shows = f"{len(shown)} of {len(names)}"
        _describe(file, {"format": f"view of {FORMAT}", "arrays": shows, **_attributes(manifest)})
        view = _View(file, manifest)
        for name in shown:
            view.show(name)


def _attributes(manifest: Manifest) -> dict[str, str | int]:
    """Return what a view says of its checkpoint.

    Texts may have more than the 64 KiB that HDF5 once had room for: files of 1.10 keep large
    attributes elsewhere.
    """
    return {
        "id": manifest.id,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "metadata": json.dumps(encode(manifest.metadata), allow_nan=False),
        "values": json.dumps(encode(dict(manifest.values)), allow_nan=False),
    }


class _View:
    """A file of virtual datasets; by h5py's low-level calls, as its others take ten times as long.

    What many arrays have in common is made once.
    """

    def __init__(self, file: Any, manifest: Manifest) -> None:
        self._file = file
        self._manifest = manifest
        self._links = _links()
        self._layouts = cache(_virtual)
        self._spaces = lru_cache(maxsize=1024)(_selected)

    def show(self, name: str) -> None:
        """Make the virtual dataset of an array."""
        import h5py

        array = self._manifest.arrays[name]
        element_type, empty = self._layouts(_stored(array.dtype))
        layout = empty.copy()
        for stored in array.boxes:
            if stored.box.empty:
                continue
            origin = self._manifest.files[stored.file]
            shape = origin.datasets[stored.dataset].shape
            source = stored.dataset.replace("%", "%%")  # "%b" would stand for a block's number
            target = self._spaces(array.shape, stored.box)
            origin_space = _selected(shape, _selection(stored, shape))
            layout.set_virtual(target, origin.name.encode(), source.encode(), origin_space)
        space = self._spaces(array.shape, None)
        shown = h5py.h5d.create(
            self._file.id, name.encode(), element_type, space, layout, self._links
        )
        if array.dtype == BFLOAT16:
            _describe(h5py.Dataset(shown), {TAG: str(array.dtype)})


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


def _selection(stored: StoredBox, shape: tuple[int, ...]) -> Box:
    """Return where in its dataset a box lies."""
    if len(shape) == 1:
        return Box((stored.first,), (stored.box.count,))
    begin = map(int, np.unravel_index(stored.first, shape))
    return Box(tuple(begin), stored.box.sizes)


class Dataset(NamedTuple):
    """A dataset, as a program sees it that knows HDF5 and nothing of manifests.

    Attributes
    ----------
    byte : int
        Where its bytes begin; 0 if it is empty, or they lie elsewhere.
    shape : tuple of int
        Its shape.
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
    """What is in a file.

    Attributes
    ----------
    id : str or None
        Of the save that it is of, if it says.
    datasets : dict of str to Dataset
        By name.
    """

    id: str | None
    datasets: dict[str, Dataset]


def contents(path: Path) -> Contents:
    """Return what is in a file.

    Raises
    ------
    OSError
        If it is no HDF5 file, or is cut off or damaged.
    CheckpointCorruptError
        If it is no regular file.

    Notes
    -----
    The library may end the process where a file is damaged: see `inspecting`.
    """
    import h5py

    datasets: dict[str, Dataset] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sources = item.virtual_sources() if item.is_virtual else ()
            datasets[name] = Dataset(
                _byte_offset(item.id),
                item.shape,
                bytes(item.attrs[TAG]).decode() if TAG in item.attrs else item.dtype.str,
                tuple(sorted({(s.file_name, s.dset_name.replace("%%", "%")) for s in sources})),
            )

    os.close(open_regular(path))  # HDF5 would wait at a FIFO
    try:
        with h5py.File(path, "r", locking=_LOCKING) as file:
            file.visititems(note)
            identity = bytes(file.attrs["id"]).decode() if "id" in file.attrs else None
    except OSError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # where it found damage later
        raise OSError(f"{type(error).__name__}: {error}") from error
    return Contents(identity, datasets)


def stored_as(dtype: DType) -> str:
    """Return the dtype that `contents` gives to elements."""
    return str(dtype) if dtype == BFLOAT16 else _stored(dtype).str
