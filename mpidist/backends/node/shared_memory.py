"""Memory that the ranks of one node share: mapped files that have no name.

One rank makes the file and broadcasts an address, under which the others open it. First the file
has no name at any time: it is made with ``O_TMPFILE``, and the address is that of the maker's
descriptor in ``/proc``, which processes of one user may open as they may open each other's files.
So nothing is left behind by a kill at any moment. Where that cannot be, as in containers that have
process numbers or users of their own, it has a name until all have opened it, before it takes any
memory. Of the transport only `NodeExchange` is needed.

The files lie in ``/dev/shm``, not in memory without a file system (``memfd_create``): the size of
that mount is the machine's own limit. Beyond it, memory is refused, and all ranks can agree to go
without; without a limit, the kernel would kill a process instead.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from mpidist._types import Array
from mpidist.backends.work import Waiter
from mpidist.log import logger

__all__ = [
    "NamedFile",
    "NodeExchange",
    "SharedFile",
    "map_part",
    "mappings_of",
    "open_address",
    "share",
    "share_files",
]

T = TypeVar("T")

DIRECTORY = Path("/dev/shm")  # noqa: S108  # only its owner may open what is made here
PREFIX = "mpidist-"

_LONGEST_ADDRESS = 256

_UNKNOWN = 1 << 20
"""Stands for the number of an error that has none."""

_SMALL = "A container may need a larger /dev/shm (docker run --shm-size)"

_CURES = {
    errno.EMFILE: "This process has as many files open as it may: close some, or raise its limit "
    "(ulimit -n)",
    errno.ENFILE: "This machine has as many files open as it may (sysctl fs.file-max)",
    errno.EACCES: "The ranks need to open each other's files in /proc, or to write in /dev/shm",
}
"""By the number of the error."""

_REASONS: set[str] = set()
"""Why there was no memory, so far."""


class NodeExchange(Protocol):
    """What node memory needs of a transport: the ranks of a node exchange a few bytes.

    All but `blocking` are collective, and block.

    Attributes
    ----------
    rank, size : int
        This rank among those of its node, and their number.
    """

    rank: int
    size: int

    def blocking(self, waiter: Waiter) -> AbstractContextManager[None]:
        """Return a context in which the other methods are called, with this deadline."""

    def share(self, nbytes: int) -> memoryview | None:
        """Return memory of all ranks of the node, `nbytes` of each; zero at first.

        It is the function `share`, where ranks are processes. None on all ranks of the node if one
        of them cannot have it.
        """

    def broadcast(self, message: Array, root: int) -> None:
        """Copy the bytes of rank `root` of the node to its other ranks."""

    def highest(self, value: int) -> int:
        """Return the largest value of the ranks of the node."""

    def agree(self, yes: bool) -> bool:  # noqa: FBT001  # a value, not a switch
        """Whether it is so on all ranks of the group, of all its nodes."""


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file in memory that has no name, and nothing in it yet.

    Attributes
    ----------
    descriptor : int
        Open for reading and writing; whoever made the file closes it.
    path : str
        Under which other processes of this user can open it, as long as the descriptor is open.
    """

    descriptor: int
    path: str

    @classmethod
    def make(cls, nbytes: int) -> SharedFile:
        """Make one of this size, readable by its owner alone.

        Raises
        ------
        OSError
            If there is no such memory.
        """
        if not hasattr(os, "O_TMPFILE"):
            raise OSError("this system knows no files without a name")
        flags = os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(DIRECTORY, flags, 0o600)
        return cls(_sized(descriptor, nbytes), f"/proc/{os.getpid()}/fd/{descriptor}")

    def address(self) -> bytes:
        """Return what other processes need in order to open this file, and no other one."""
        status = os.fstat(self.descriptor)
        return f"{status.st_dev}:{status.st_ino}:{self.path}".encode()

    def unlink(self) -> None:
        """Do nothing: it has no name by which another process could open it."""


class NamedFile(SharedFile):
    """One that has a name until `unlink`."""

    __slots__ = ()

    @classmethod
    def make(cls, nbytes: int) -> NamedFile:
        """Make one of this size, readable by its owner alone; see `SharedFile.make`."""
        descriptor, path = tempfile.mkstemp(prefix=PREFIX, dir=DIRECTORY)
        try:
            return cls(_sized(descriptor, nbytes), path)
        except OSError:
            Path(path).unlink()
            raise

    def unlink(self) -> None:
        """Remove its name, so that no other process can open it."""
        Path(self.path).unlink(missing_ok=True)


def _sized(descriptor: int, nbytes: int) -> int:
    """Give a file its size, which takes no memory yet."""
    try:
        os.ftruncate(descriptor, nbytes)
    except (OSError, OverflowError) as error:
        os.close(descriptor)
        number = getattr(error, "errno", None) or errno.EFBIG
        raise OSError(number, f"no file of {nbytes} bytes: {error}") from error
    return descriptor


def open_address(address: bytes) -> int:
    """Open a file that another process of this node has made, and return the descriptor.

    Parameters
    ----------
    address : bytes
        What `SharedFile.address` returned there.

    Raises
    ------
    OSError
        If it cannot be opened, or another file stands under that path, as where the ranks of one
        node do not see the same processes or the same ``/dev/shm``.
    """
    device, inode, path = address.decode().split(":", 2)
    wanted = int(device), int(inode)
    # Not opened before it is known: it might be a pipe or a device of a stranger.
    status = Path(path).stat()
    if (status.st_dev, status.st_ino) != wanted:
        raise OSError(f"{path} is another file here than for the rank that made it")
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def map_part(descriptor: int, part: slice) -> memoryview:
    """Map a whole file for reading and writing, shared with all who map it.

    Parameters
    ----------
    descriptor : int
        Of the file; may be closed afterwards.
    part : slice
        The bytes of it that this process provides, really allocated, from the memory that is
        nearest to it.

    Returns
    -------
    memoryview
        The whole file, mapped until the last view of it is gone. No descriptor stays open for it:
        the module `mmap` keeps a copy, and a program with a thousand arrays would have none left.

    Raises
    ------
    OSError
        If there is not enough memory for this part.

    Notes
    -----
    Without the allocation a file larger than the memory would be made without an error, and its
    first use would kill the process.
    """
    os.posix_fallocate(descriptor, part.start, part.stop - part.start)
    return _map(descriptor, os.fstat(descriptor).st_size)


def _map(descriptor: int, nbytes: int) -> memoryview:
    """Map the first bytes of a file, as `map_part` does."""
    libc = _libc()
    address = libc.mmap(
        None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0
    )
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_char * nbytes).from_address(address)
    unmap = weakref.finalize(memory, libc.munmap, address, nbytes)
    unmap.atexit = False  # exit handlers and other threads still use it
    return memoryview(memory).cast("B")


def share(exchange: NodeExchange, nbytes: int) -> memoryview | None:
    """Map memory shared by the ranks of a node, or agree to go without.

    Parameters
    ----------
    exchange : NodeExchange
        Connects the ranks.
    nbytes : int
        Bytes of each rank's part, the same on all. Each rank allocates its own, so that it lies in
        the memory nearest to it.

    Returns
    -------
    memoryview or None
        All parts, in rank order, with zeros in them; None on all ranks if one cannot have them.

    Notes
    -----
    Collective over the node; blocks. Three small collectives; six where a file without a name
    cannot be opened by all.
    """
    rank, size = exchange.rank, exchange.size
    descriptor, problem = _open_on_all(exchange, SharedFile, size * nbytes)
    if descriptor is None:
        descriptor, problem = _open_on_all(exchange, NamedFile, size * nbytes)
    memory = None
    if descriptor is not None:
        part = slice(rank * nbytes, (rank + 1) * nbytes)
        memory, problem = _attempt(map_part, descriptor, part)
        os.close(descriptor)
        problem = _agreed(exchange, problem)
    if problem is not None:
        if rank == 0:
            _warn(problem)
        return None
    return memory


def share_files(
    exchange: NodeExchange, descriptor: int, nbytes: int
) -> tuple[list[memoryview], OSError | None]:
    """Map a file of every rank of the node, which the ranks have made themselves.

    Parameters
    ----------
    exchange : NodeExchange
        Connects the ranks.
    descriptor : int
        Of this rank's file, open for reading and writing.
    nbytes : int
        Bytes to map of each file, the same on all ranks.

    Returns
    -------
    (list of memoryview, OSError or None)
        The memory of each rank, in rank order, and None; or what went wrong, on all ranks of the
        node alike.

    Notes
    -----
    Collective over the node; blocks. Two small collectives, and one for each rank.
    """
    own, problem = _attempt(_own_address, descriptor, nbytes)
    addresses = np.zeros((exchange.size, _LONGEST_ADDRESS), np.uint8)
    for rank, row in enumerate(addresses):
        if rank == exchange.rank and own is not None:
            row[: len(own)] = np.frombuffer(own, np.uint8)
        exchange.broadcast(row, rank)
    problem = _agreed(exchange, problem)
    parts: list[memoryview] = []
    if problem is None:
        for row in addresses:
            part, problem = _attempt(_map_address, row.tobytes().rstrip(b"\0"), nbytes)
            if part is None:
                break
            parts.append(part)
        problem = _agreed(exchange, problem)
    return ([] if problem is not None else parts), problem


def mappings_of(descriptor: int, nbytes: int) -> list[tuple[int, int, int]]:
    """Return where this process has mapped a file so that others see what it writes.

    Parameters
    ----------
    descriptor : int
        Of the file.
    nbytes : int
        Bytes at the beginning of the file that matter.

    Returns
    -------
    list of (int, int, int)
        The address, the offset in the file and the bytes of each mapping.
    """
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    mappings = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        addresses, rights, offset, where, inode, *_ = line.split(maxsplit=5)
        if (where, int(inode)) != (device, status.st_ino) or rights[1::2] != "ws":
            continue
        start, stop = (int(address, 16) for address in addresses.split("-"))
        count = min(stop - start, nbytes - int(offset, 16))
        if count > 0:
            mappings.append((start, int(offset, 16), count))
    return mappings


def _own_address(descriptor: int, nbytes: int) -> bytes:
    """Check that other ranks can map a file, and return its address."""
    if nbytes <= 0 or os.fstat(descriptor).st_size < nbytes:
        size = os.fstat(descriptor).st_size
        raise OSError(errno.EINVAL, f"the file has {size} bytes, and {nbytes} are to be registered")
    # Pages that are missing are allocated now: without memory for them, their first use would kill
    # the process.
    os.posix_fallocate(descriptor, 0, nbytes)
    return SharedFile(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}").address()


def _map_address(address: bytes, nbytes: int) -> memoryview:
    descriptor = open_address(address)
    try:
        return _map(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _open_on_all(
    exchange: NodeExchange, kind: type[SharedFile], nbytes: int
) -> tuple[int | None, OSError | None]:
    """Open one file on all ranks, or none; return its descriptor, or what went wrong."""
    first = exchange.rank == 0
    file, problem = _attempt(kind.make, nbytes) if first else (None, None)
    address = np.array([b"" if file is None else file.address()], f"S{_LONGEST_ADDRESS}")
    try:
        exchange.broadcast(address.view(np.uint8), 0)
        if first:
            descriptor = None if file is None else file.descriptor
        else:
            descriptor, problem = _attempt(_opened, address.item())
        problem = _agreed(exchange, problem)
    finally:
        if file is not None:
            file.unlink()
    if problem is not None and descriptor is not None:
        os.close(descriptor)
        descriptor = None
    return descriptor, problem


def _opened(address: bytes) -> int:
    if not address:
        raise OSError("the first rank could not make it")
    return open_address(address)


def _attempt(function: Callable[..., T], *args: object) -> tuple[T | None, OSError | None]:
    """Return what a function returns, or the error that it raises."""
    try:
        return function(*args), None
    except OSError as error:
        return None, error


def _agreed(exchange: NodeExchange, problem: OSError | None) -> OSError | None:
    """Return what went wrong, here or elsewhere, or None if nothing has on any rank; collective."""
    number = exchange.highest(0 if problem is None else problem.errno or _UNKNOWN)
    if not number or problem is not None:
        return problem
    why = "it could not be opened" if number == _UNKNOWN else f"{os.strerror(number)}"
    return OSError(number, f"{why}, on another rank")


def _warn(problem: OSError) -> None:
    """Log it once: a program may ask for memory a thousand times, and see several reasons."""
    if not _REASONS:
        logger.warning(
            "no memory shared by the ranks of this node: %s. They go without: the same results, at "
            "the MPI library's speed. %s",
            problem,
            _CURES.get(problem.errno or 0, _SMALL),
        )
    _REASONS.add(str(problem))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    return libc
