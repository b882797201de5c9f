"""The files of a checkpoint: made by HDF5, filled by the system, and given their name when synced.

HDF5 gives each contiguous dataset one place in its file. Here it is asked to choose the places and
to write the structure, so that any tool that knows HDF5 opens the file. The bytes are written and
read at these places by the operating system's calls: h5py holds one lock for all threads and all
files while it moves them. A file that all ranks write together (`parallel_file`) is the exception.

A file is written under a temporary name, so that a kill or a loss of power at any instant leaves
the old or the new one.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.checkpoint.format.manifest import ALIGNMENT, FORMAT, VERSION
from mpidist.errors import CheckpointCorruptError
from mpidist.log import logger

TAG = "mpidist dtype"
"""Attribute of datasets whose elements HDF5 has no type for."""

_BLOCK = 1 << 22
"""Bytes that are written by one call."""


def temporary(path: Path) -> Path:
    """Return the name that a file has until it is complete."""
    return path.with_name(path.name + ".tmp")


def exists(path: Path) -> bool:
    """Return whether there is something at a path; raise OSError if that cannot be determined.

    Not `Path.exists`, which takes what it cannot see for something that is not there.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def open_regular(path: Path) -> int:
    """Open a file for reading, and return its descriptor, which the caller closes.

    Raises CheckpointCorruptError if it is anything but a regular file, such as a FIFO, at which a
    plain `open` waits until somebody writes, and OSError if it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise CheckpointCorruptError(
        f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, and a regular file is "
        "expected; put that file back from a copy, or use another checkpoint"
    )


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a regular file, at most so many bytes; raises as `open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(min(size, most))  # which allocates as much as it is asked for


def write_at(descriptor: int, data: Array, offset: int) -> int:
    """Write bytes at an offset of an open file, and return the offset behind them.

    Notes
    -----
    The system is asked to begin with the disk at once, block by block, so that it works while the
    next block is copied: on Linux "not needed any more" starts that, and what the disk does not
    have yet is never dropped. Left to itself the system would begin at the sync.
    """
    view = data.data
    while view:
        written = os.pwrite(descriptor, view[:_BLOCK], offset)
        with suppress(OSError):  # a hint, which some file systems do not know
            os.posix_fadvise(descriptor, offset, written, os.POSIX_FADV_DONTNEED)
        view, offset = view[written:], offset + written
    return offset


def read_at(descriptor: int, parts: Sequence[Array], offset: int) -> int:
    """Read contiguous bytes of an open file into arrays of uint8, one after the other.

    Returns how many bytes were read: fewer than wanted where the file ends.
    """
    wanted, done = sum(part.nbytes for part in parts), 0
    views = [part.data for part in parts if part.nbytes]
    while done < wanted:
        count = os.preadv(descriptor, views, offset + done)
        if not count:
            break
        done += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if views and count:
            views[0] = views[0][count:]
    return done


@contextmanager
def naming(path: Path, nbytes: int | None = None) -> Iterator[None]:
    """Name the file in what the system raises in the block, and its size if the disk is full.

    The OSError raised has the same number, so it is of the same class.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        text = error.strerror or os.strerror(error.errno)
        if error.errno in _FULL and nbytes is not None and error.filename2 is None:
            text += f" for a file of {nbytes:,} bytes"
        name = path if error.filename is None else error.filename
        raise OSError(error.errno, text, str(name)) from error


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def rename_synced(part: Path, path: Path, *, warn: bool = True) -> None:
    """Give a file that is complete and synced its name, and sync their directory.

    Raises FileExistsError if there is something of that name: another process writes to the same
    directory. Any other OSError if the system refuses to rename or sync.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, "Another process has made this file", str(path))
    os.replace(part, path)  # noqa: PTH105  # as os.fsync: the order of these calls matters
    sync_directory(path.parent, warn=warn)


def sync_directory(directory: Path, *, warn: bool = True) -> None:
    """Make the names in a directory survive a loss of power; raises OSError if that fails.

    CephFS and some file systems that are mounted by FUSE refuse to sync a directory. They have the
    names or do not have them after a loss of power; nothing else can be done about it, and `warn`
    says whether to log a warning then, once in this process.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        if warn and not _reported.is_set():
            _reported.set()
            logger.warning(
                "%s: its file system does not sync directories (%s), so a loss of power may take "
                "the newest checkpoint; this is said once",
                directory,
                error.strerror,
            )
    finally:
        os.close(descriptor)


_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


_reported = threading.Event()
"""Set when the warning has been given."""


def create_file(
    path: Path,
    datasets: Iterable[tuple[str, Sequence[int], DType]],
    attributes: Mapping[str, str | int],
) -> dict[str, int]:
    """Make a file, which must not exist, with datasets (name, shape, dtype) without values.

    Returns where the bytes of each dataset begin, from the beginning of the file: a multiple of
    `ALIGNMENT` for those of so many bytes. Empty ones have no place, and 0 stands for it. Raises
    OSError if the file cannot be written, or is there already.
    """
    import h5py

    with (
        errors_of_the_system(path),
        h5py.File(
            path,
            "x",
            locking=LOCKING,
            alignment_threshold=ALIGNMENT,
            alignment_interval=ALIGNMENT,
        ) as file,
    ):
        set_attributes(file, {"format": FORMAT, "version": VERSION, **attributes})
        return {name: _create(file, name, shape, dtype) for name, shape, dtype in datasets}


LOCKING = False
"""For every file: none is written by two processes, and where locks are refused (NFS without its
lock daemon, Lustre mounted without flock) HDF5 would not open any."""

_NUMBER = re.compile(r"errno = (\d+)")


@contextmanager
def errors_of_the_system(path: Path) -> Iterator[None]:
    """Replace an error of HDF5 by the error of the system behind it, with the file's name."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        match = _NUMBER.search(str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def parallel_file(path: Path, comm: Any) -> Iterator[Callable[[str, Box, Array], None]]:
    """Open a file made by `create_file`, to be written by all ranks of an mpi4py communicator.

    Yields a function that writes C-contiguous, little-endian elements to a box, which is not empty,
    of a dataset; the boxes of the ranks are disjoint. Needs `has_mpi`. Raises OSError on every
    rank, if the file cannot be opened, and from the function on the rank that cannot write.

    Notes
    -----
    Collective, its end as well, however the block ends; what is done in the block is not. HDF5 has
    no deadline: a rank that does not arrive keeps the others waiting until the job ends.
    """
    import h5py

    def write(name: str, box: Box, data: Array) -> None:
        dataset = h5py.h5d.open(file.id, name.encode())
        space = dataset.get_space()
        if box.sizes:
            space.select_hyperslab(box.offsets, box.sizes)
        # As what they are in the file, so that HDF5 has nothing to convert.
        dataset.write(h5py.h5s.create_simple((data.size,)), space, data, dataset.get_type())

    with (
        errors_of_the_system(path),
        h5py.File(path, "r+", locking=LOCKING, driver="mpio", comm=comm) as file,
    ):
        yield write


def has_mpi() -> bool:
    """Whether h5py was built with MPI."""
    import h5py

    return bool(h5py.get_config().mpi)


def hdf5_versions() -> dict[str, str]:
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
    kind = h5py.h5t.py_create(stored_dtype(dtype), logical=True)
    dataset = h5py.h5d.create(file.id, name.encode(), kind, space, layout, name_links())
    if dtype == BFLOAT16:
        set_attributes(h5py.Dataset(dataset), {TAG: str(dtype)})
    return byte_offset(dataset)


def byte_offset(dataset: Any) -> int:
    """Return where the bytes of a dataset begin in its file; 0 if it has none."""
    return int(dataset.get_offset() or 0)


def name_links() -> Any:
    """Return how names are linked: in UTF-8, the groups on the way to them made."""
    import h5py

    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


def set_attributes(item: Any, attributes: Mapping[str, str | int]) -> None:
    """Set attributes of a file or a dataset.

    Texts have a fixed length, which programs in other languages read more easily.
    """
    for name, value in attributes.items():
        item.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def stored_dtype(dtype: DType) -> DType:
    """Return the dtype by which HDF5 stores elements of this one."""
    return np.dtype("<u2") if dtype == BFLOAT16 else dtype.newbyteorder("<")
