"""Which call of the MPI library performs a collective, and with which arguments.

The functions here prepare; `mpidist.backends.mpi.backend` calls. A verb that the library does not
perform as promised has no call, and goes by the algorithms:

- float16 and bfloat16 are summed in float32 and rounded once; the libraries round at each step;
- MIN and MAX of floats return NaN where any rank has NaN; MPICH loses it;
- logical operations give 0 or 1; the libraries copy the value of a lone rank as it is;
- sums of integers wrap, as numpy's do; Open MPI's saturate for 8 and 16 bits;
- counts are 32 bits wide in libraries without the large-count calls of MPI 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import Array, DType, ReduceOp
from mpidist.arrays.namespaces import HALVES, REDUCTIONS
from mpidist.backends.combine import quietly
from mpidist.backends.verbs import Collective

__all__ = ["LibraryCall", "LibraryCalls"]

_MOST = 2**31 - 1
"""Elements that one call of any MPI library can count."""

_BOOL = np.dtype(np.bool_)

# MPI has no arithmetic on its own type for booleans: they are given as bytes that hold 0 or 1.
_OF_BOOLEANS = {
    ReduceOp.SUM: "BOR",
    ReduceOp.PROD: "BAND",
    ReduceOp.MIN: "BAND",
    ReduceOp.MAX: "BOR",
    ReduceOp.BAND: "BAND",
    ReduceOp.BOR: "BOR",
    ReduceOp.BXOR: "BXOR",
    ReduceOp.LAND: "BAND",
    ReduceOp.LOR: "BOR",
    ReduceOp.LXOR: "BXOR",
}


_LOGICAL = (ReduceOp.LAND, ReduceOp.LOR, ReduceOp.LXOR)


class LibraryCall(NamedTuple):
    """One call, not yet made.

    Attributes
    ----------
    name : str
        Name of the method of the communicator.
    args : tuple
        Its arguments.
    after : callable or None
        What remains to be done when it is complete.
    """

    name: str
    args: tuple[Any, ...]
    after: Callable[[], None] | None = None


def _op_name(op: ReduceOp, dtype: DType) -> str | None:
    """Return the name of the library's operation that does what `op` promises, if any."""
    if dtype == _BOOL:
        return _OF_BOOLEANS.get(op)
    if dtype in HALVES or (dtype.kind == "f" and op in (ReduceOp.MIN, ReduceOp.MAX)):
        return None
    if dtype.kind in "iu" and dtype.itemsize < 4 and op is ReduceOp.SUM:
        return None
    return "SUM" if op is ReduceOp.MEAN else op.name


def _movable(x: Array | None) -> Array | None:
    """Return a view whose dtype every MPI library knows."""
    if x is None:
        return None
    if x.dtype in HALVES:
        return x.view(np.uint16)
    return x.view(np.uint8) if x.dtype == _BOOL else x


def _with(x: Array | None, counts: Sequence[int]) -> Any:
    """Return an array with its counts, as the calls with a `v` take them."""
    return None if x is None else [_movable(x), list(counts)]


class LibraryCalls:
    """The calls of one MPI library, by verb; each returns None where there is none.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    rank, size : int
        Of the communicator.
    """

    def __init__(self, mpi: Any, rank: int, size: int) -> None:
        self._in_place = mpi.IN_PLACE
        self._rank = rank
        self._size = size
        self._ops = {
            pair: getattr(mpi, name) for pair in REDUCTIONS if (name := _op_name(*pair)) is not None
        }

    def _reduction(self, x: Array, op: ReduceOp) -> Any:
        """Return the library's operation, or None."""
        if x.size > _MOST or (self._size == 1 and op in _LOGICAL):
            return None
        return self._ops.get((op, x.dtype))

    def _given(self, x: Array, out: Array | None = None) -> Any:
        """Return what this rank gives to a reduction into `out`."""
        if x.dtype == _BOOL:
            # numpy takes every byte but 0 for True; the library would combine the bits of 1 and 2.
            x = np.not_equal(x.view(np.uint8), 0, out=x if x is out else None)
        return self._in_place if x is out else _movable(x)

    def _mean(self, out: Array | None, op: ReduceOp) -> Callable[[], None] | None:
        """Return what makes a sum a mean."""
        if op is not ReduceOp.MEAN or out is None:
            return None

        def divide() -> None:
            quietly(np.divide, out, self._size, out)

        return divide

    def barrier(self) -> LibraryCall:
        """Prepare a barrier."""
        return LibraryCall("Barrier", ())

    def broadcast(self, x: Array, root: int) -> LibraryCall | None:
        """Prepare a broadcast."""
        return LibraryCall("Bcast", (_movable(x), root)) if x.size <= _MOST else None

    def reduce(self, x: Array, out: Array | None, op: ReduceOp, root: int) -> LibraryCall | None:
        """Prepare a reduction to one rank."""
        library_op = self._reduction(x, op)
        if library_op is None:
            return None
        args = (self._given(x, out), _movable(out), library_op, root)
        return LibraryCall("Reduce", args, self._mean(out, op))

    def all_reduce(self, x: Array, out: Array, op: ReduceOp) -> LibraryCall | None:
        """Prepare a reduction to all ranks."""
        library_op = self._reduction(x, op)
        if library_op is None:
            return None
        args = (self._given(x, out), _movable(out), library_op)
        return LibraryCall("Allreduce", args, self._mean(out, op))

    def gather(
        self, x: Array, out: Array | None, counts: Sequence[int], root: int
    ) -> LibraryCall | None:
        """Prepare a gather."""
        if sum(counts) > _MOST:
            return None
        # The verb copies what overlaps otherwise, so that memory in common is the root's own part.
        in_place = out is not None and np.may_share_memory(x, out)
        source = self._in_place if in_place else _movable(x)
        return LibraryCall("Gatherv", (source, _with(out, counts), root))

    def all_gather(self, x: Array | None, out: Array, counts: Sequence[int]) -> LibraryCall | None:
        """Prepare a gather to all ranks."""
        if out.size > _MOST:
            return None
        source = self._in_place if x is None else _movable(x)
        if _uniform(counts):
            return LibraryCall("Allgather", (source, _movable(out)))
        return LibraryCall("Allgatherv", (source, _with(out, counts)))

    def scatter(
        self, x: Array | None, out: Array, counts: Sequence[int], root: int
    ) -> LibraryCall | None:
        """Prepare a scatter."""
        if sum(counts) > _MOST:
            return None
        return LibraryCall("Scatterv", (_with(x, counts), _movable(out), root))

    def reduce_scatter(
        self, x: Array, out: Array, counts: Sequence[int], op: ReduceOp
    ) -> LibraryCall | None:
        """Prepare a reduction that leaves each rank its part."""
        library_op = self._reduction(x, op)
        if library_op is None:
            return None
        buffers = (self._given(x), _movable(out))
        if _uniform(counts):
            return LibraryCall("Reduce_scatter_block", (*buffers, library_op), self._mean(out, op))
        args = (*buffers, list(counts), library_op)
        return LibraryCall("Reduce_scatter", args, self._mean(out, op))

    def all_to_all(
        self, x: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> LibraryCall | None:
        """Prepare an exchange of all with all."""
        if max(x.size, out.size) > _MOST:
            return None
        return LibraryCall("Alltoallv", (_with(x, send_counts), _with(out, recv_counts)))

    def other(self, collective: Collective) -> LibraryCall | None:
        """Prepare nothing: it goes by messages."""


def _uniform(counts: Sequence[int]) -> bool:
    return min(counts) == max(counts)
