"""Communicators of NCCL: every call of the library, through CuPy's binding of it.

Another binding would take this module's place. What the binding raises, `vendor_errors`, becomes a
`TransportError` in `translate`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from mpidist._types import ReduceOp
from mpidist.arrays.namespaces import device_module
from mpidist.backends.base import Backend
from mpidist.backends.device.nccl.dtypes import Wire, wire_of_bytes
from mpidist.backends.verbs import Broadcast
from mpidist.backends.work import Waiter
from mpidist.errors import BackendUnavailableError, TransportError

DEVICE_FAILED = 1
"""The code of errors of CUDA: ``ncclUnhandledCudaError``."""

_SUCCESS, _INTERNAL, _IN_PROGRESS = 0, 3, 7
"""Codes of ``ncclResult_t``, too."""

_UNIQUE_ID_NBYTES = 128

_BYTES_SINCE = 14
"""The release of CuPy whose unique ids are bytes; before they were tuples of signed characters."""

_SPLITS_SINCE = 21801
"""The release of NCCL that has ``ncclCommSplit``: 2.18.1."""


@cache
def binding() -> ModuleType:
    """Return CuPy's module of NCCL."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns, and says how to install; so do we
            module = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise BackendUnavailableError(
            f"NCCL needs CuPy, which cannot be imported: {error}"
        ) from None
    if not module.available:
        raise BackendUnavailableError(
            "CuPy finds no libnccl.so.2: pip install nvidia-nccl-cu12 (nvidia-nccl-cu13 for "
            "cupy-cuda13x), or put the site's NCCL on LD_LIBRARY_PATH"
        )
    return module


def version() -> int:
    """Return the version of the library that is loaded, such as 22803 for 2.28.3."""
    number: int = binding().get_version()
    return number


def can_split() -> bool:
    """Whether both the library and CuPy have ncclCommSplit."""
    return version() >= _SPLITS_SINCE and hasattr(binding().NcclCommunicator, "commSplit")


def vendor_errors() -> tuple[type[Exception], ...]:
    """Return what the binding raises."""
    # KeyError: CuPy has no words for ncclInProgress, and for results that are newer than it.
    return (binding().NcclError, KeyError)


def translate(what: str, error: BaseException) -> TransportError:
    """Return the package's error for one of `vendor_errors`; `what` was being done."""
    return TransportError(f"{what}: NCCL says {error}", _status_of(error))


def _status_of(error: BaseException) -> int:
    status = getattr(error, "status", None)
    if status is None and error.args and isinstance(error.args[0], int):
        status = error.args[0]
    return _INTERNAL if status is None else int(status)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except vendor_errors() as error:
        raise translate(what, error) from error


def share_unique_id(host: Backend, waiter: Waiter) -> bytes:
    """Make the identifier of a new communicator on rank 0, and give it to all ranks of `host`.

    It says where rank 0 listens, and whoever has it can join: it goes to the ranks of one job only.
    Collective, blocks.
    """
    data = np.zeros(_UNIQUE_ID_NBYTES, np.uint8)
    if host.rank == 0:
        with _translated("ncclGetUniqueId"):
            made = binding().get_unique_id()
        data[:] = np.frombuffer(made, np.uint8) if isinstance(made, bytes) else np.array(made) % 256
    host.run(Broadcast(data, 0), waiter=waiter)
    return data.tobytes()


class NcclCommunicator:
    """Some ranks, each on a device of its own, that NCCL has connected.

    Operations take cupy's contiguous arrays, and are in place where both are the same memory.

    Parameters
    ----------
    handle : cupy.cuda.nccl.NcclCommunicator
        The communicator of the binding.
    stream : int
        Handle of the stream on which the operations are put.
    """

    def __init__(self, handle: Any, stream: int) -> None:
        self.size: int = handle.size()
        self.rank: int = handle.rank_id()
        self._handle = handle
        self._stream = stream

    @classmethod
    def connect(cls, size: int, rank: int, unique_id: bytes, stream: int) -> NcclCommunicator:
        """Connect ranks on their current devices; collective over them, blocks until all arrive."""
        encoded: Any = unique_id
        if int(device_module().__version__.partition(".")[0]) < _BYTES_SINCE:
            encoded = tuple(np.frombuffer(unique_id, np.int8).tolist())
        with _translated(f"ncclCommInitRank of rank {rank} of {size}"):
            return cls(binding().NcclCommunicator(size, encoded, rank), stream)

    def split(self, color: int | None, key: int, stream: int) -> NcclCommunicator | None:
        """Make a communicator per color, ordered by key; collective over the ranks, blocks.

        No operation may be outstanding.
        """
        with _translated("ncclCommSplit"):
            handle = self._handle.commSplit(-1 if color is None else color, key)
        return None if handle is None or color is None else NcclCommunicator(handle, stream)

    # -- operations ------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let NCCL begin all operations of the block at its end, as one."""
        nccl = binding()
        nccl.groupStart()
        try:
            yield
        finally:
            nccl.groupEnd()

    def all_reduce(self, x: Any, out: Any, wire: Wire, op: ReduceOp) -> None:
        """Combine `x` of all ranks into `out` of all."""
        count, code = x.size * wire.items, wire.op(op)
        self._handle.allReduce(x.data.ptr, out.data.ptr, count, wire.code, code, self._stream)

    def reduce(self, x: Any, out: Any, wire: Wire, op: ReduceOp, root: int) -> None:
        """Combine `x` of all ranks into `out` of one; the others' `out` is not touched."""
        count, code = x.size * wire.items, wire.op(op)
        self._handle.reduce(x.data.ptr, out.data.ptr, count, wire.code, code, root, self._stream)

    def broadcast(self, x: Any, root: int) -> None:
        """Copy `x` of one rank into `x` of the others."""
        wire = wire_of_bytes(x.dtype)
        at = x.data.ptr
        self._handle.broadcast(at, at, x.size * wire.items, wire.code, root, self._stream)

    def all_gather(self, out: Any) -> None:
        """Gather the parts of all ranks into `out`, which has this rank's part already."""
        wire = wire_of_bytes(out.dtype)
        count = out.size // self.size
        start = out.data.ptr
        own_part = start + self.rank * count * out.dtype.itemsize
        self._handle.allGather(own_part, start, count * wire.items, wire.code, self._stream)

    def reduce_scatter(self, x: Any, out: Any, wire: Wire, op: ReduceOp) -> None:
        """Combine `x` of all ranks and keep this rank's part, of the size of `out`."""
        count, code = out.size * wire.items, wire.op(op)
        self._handle.reduceScatter(x.data.ptr, out.data.ptr, count, wire.code, code, self._stream)

    def send(self, x: Any, peer: int) -> None:
        """Send an array to a rank."""
        wire = wire_of_bytes(x.dtype)
        self._handle.send(x.data.ptr, x.size * wire.items, wire.code, peer, self._stream)

    def recv(self, x: Any, peer: int) -> None:
        """Receive an array of just this size from a rank."""
        wire = wire_of_bytes(x.dtype)
        self._handle.recv(x.data.ptr, x.size * wire.items, wire.code, peer, self._stream)

    # -- the end; from any thread, one at a time ---------------------------------------------------

    def problem(self) -> TransportError | None:
        """Return what went wrong since it was made; None if nothing."""
        try:
            self._handle.check_async_error()
        except vendor_errors() as error:
            harmless = _status_of(error) in (_SUCCESS, _IN_PROGRESS)
            return None if harmless else translate("asynchronously", error)
        return None

    def abort(self) -> None:
        """End all operations, wherever they are; local."""
        self._handle.abort()

    def destroy(self) -> None:
        """Release it when its operations are over; may wait for the other ranks."""
        self._handle.destroy()
