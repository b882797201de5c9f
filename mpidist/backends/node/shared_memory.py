"""Memory that the ranks of one node share: mapped files that have no name.

One rank makes the file and tells the others an address, under which they open it. First the file
has no name at any time: it is made with ``O_TMPFILE``, and the address is that of the maker's
descriptor in ``/proc``, which processes of one user may open as they may open each other's files.
So nothing is left behind by a kill at any moment. Where that cannot be, as in containers that have
process numbers or users of their own, it has a name until all have opened it, before it takes any
memory.

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
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NamedFile", "SharedFile", "map_part", "open_address"]

DIRECTORY = Path("/dev/shm")  # noqa: S108  # only its owner may open what is made here
PREFIX = "mpidist-"


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
        """Let nobody open it any more by its name: it has none."""


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
        """Let nobody open it any more by its name."""
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
    nbytes = os.fstat(descriptor).st_size
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


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    return libc
