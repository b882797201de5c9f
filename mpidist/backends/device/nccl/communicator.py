"""One communicator of NCCL on one device: the library's operations on cupy's contiguous arrays."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

from mpidist._types import ReduceOp
from mpidist.backends.device.nccl import calls
from mpidist.backends.device.nccl.dtypes import Wire, wire_of_bytes
from mpidist.backends.device.nccl.unique_id import NcclUniqueId
from mpidist.errors import TransportError

__all__ = ["NcclCommunicator"]


class NcclCommunicator:
    """Some ranks, each on a device of its own, that NCCL has connected.

    The caller gives the identifier to all ranks: by MPI, or to threads of one process.

    Parameters
    ----------
    size, rank : int
        Number of ranks, and this one.
    unique_id : NcclUniqueId
        The same on all ranks.
    device : int
        The current device, on which all arrays lie.
    stream : int
        Handle of the stream on which the operations are put.

    Raises
    ------
    TransportError
        If NCCL cannot connect the ranks.

    Notes
    -----
    Collective over the ranks; blocks until all have arrived, as long as that takes.
    """

    def __init__(
        self, size: int, rank: int, unique_id: NcclUniqueId, device: int, stream: int
    ) -> None:
        self._take(calls.connect(size, rank, unique_id), size, rank, device, stream)

    def _take(self, handle: Any, size: int, rank: int, device: int, stream: int) -> None:
        self.size, self.rank, self.device = size, rank, device
        self._handle = handle
        self._stream = stream
        # Nobody may ask for errors of what another thread is freeing.
        self._ending = threading.Lock()

    def split(self, color: int | None, key: int, stream: int) -> NcclCommunicator | None:
        """Make a communicator per color, ordered by key; collective over the ranks, blocks.

        No operation may be outstanding.
        """
        handle = calls.split(self._handle, color, key)
        if handle is None or color is None:
            return None
        made = NcclCommunicator.__new__(NcclCommunicator)
        made._take(handle, handle.size(), handle.rank_id(), self.device, stream)
        return made

    # -- operations; in place where both arrays are the same memory ------------------------------

    def together(self) -> AbstractContextManager[None]:
        """Let the operations of a block begin as one, at its end."""
        return calls.grouped()

    def all_reduce(self, x: Any, out: Any, wire: Wire, op: ReduceOp) -> None:
        """Combine `x` of all ranks into `out` of all."""
        self._handle.allReduce(
            x.data.ptr,
            out.data.ptr,
            x.size * wire.items,
            wire.code,
            wire.op(op),
            self._stream,
        )

    def reduce(self, x: Any, out: Any, wire: Wire, op: ReduceOp, root: int) -> None:
        """Combine `x` of all ranks into `out` of one; the others' `out` is not touched."""
        self._handle.reduce(
            x.data.ptr,
            out.data.ptr,
            x.size * wire.items,
            wire.code,
            wire.op(op),
            root,
            self._stream,
        )

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
        self._handle.reduceScatter(
            x.data.ptr,
            out.data.ptr,
            out.size * wire.items,
            wire.code,
            wire.op(op),
            self._stream,
        )

    def send(self, x: Any, peer: int) -> None:
        """Send an array to a rank."""
        wire = wire_of_bytes(x.dtype)
        self._handle.send(x.data.ptr, x.size * wire.items, wire.code, peer, self._stream)

    def recv(self, x: Any, peer: int) -> None:
        """Receive an array of just this size from a rank."""
        wire = wire_of_bytes(x.dtype)
        self._handle.recv(x.data.ptr, x.size * wire.items, wire.code, peer, self._stream)

    # -- the end -------------------------------------------------------------------------------

    def problem(self) -> TransportError | None:
        """Return what went wrong since it was made; None if nothing, or at its end.

        From any thread.
        """
        if not self._ending.acquire(blocking=False):
            return None
        try:
            return calls.problem_of(self._handle)
        finally:
            self._ending.release()

    def abort(self) -> None:
        """End all operations, wherever they are; local, from any thread."""
        with self._ending:
            calls.abort(self._handle)

    def destroy(self) -> None:
        """Release it when its operations are over; may wait for the other ranks."""
        with self._ending:
            calls.destroy(self._handle)
