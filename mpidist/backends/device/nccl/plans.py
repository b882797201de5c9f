"""The verbs in NCCL's terms: which calls each is made of.

A plan is made on the caller's current stream, where copies and conversions take place; its calls
are put on the side stream behind it, and so is what turns their result into the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpidist._types import Array, ReduceOp
from mpidist.arrays.boxes import part_slices
from mpidist.arrays.namespaces import address_of, array_namespace
from mpidist.backends.device.nccl.communicator import NcclCommunicator
from mpidist.backends.device.nccl.dtypes import (
    REDUCTIONS,
    Wire,
    from_keys,
    needs_keys,
    to_keys,
    wire_of,
)
from mpidist.backends.verbs import Collective
from mpidist.backends.work import Message
from mpidist.errors import UnsupportedOperationError


@dataclass(frozen=True, slots=True)
class Operation:
    """One verb, ready to be put on the side stream.

    Attributes
    ----------
    call : callable
        Makes NCCL's calls.
    several : bool
        Whether they have to begin together.
    after : callable or None
        Puts what comes after them on the same stream.
    temporaries : tuple of Array
        Arrays to be held until it is over, besides its arguments.
    """

    call: Callable[[NcclCommunicator], None]
    several: bool = False
    after: Callable[[], None] | None = None
    temporaries: tuple[Array, ...] = ()


_NOTHING = Operation(lambda _: None)
"""What is done where there are no elements."""


class Plans:
    """How a rank performs each verb; see `mpidist.backends.verbs.Performer`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def direct_sum(self, x: Array, op: ReduceOp) -> Wire | None:
        """Return how `x` is reduced in place; None if that takes more than one call."""
        dtype = x.dtype
        if not (x.size and x.flags.c_contiguous and (op, dtype) in REDUCTIONS):
            return None
        return None if needs_keys(dtype, op) else wire_of(dtype)

    def all_reduce(self, x: Array, out: Array, op: ReduceOp) -> Operation:
        """Combine `x` of all ranks into `out` of all."""
        return _reduction(x, out, op, lambda nccl, x, out, wire: nccl.all_reduce(x, out, wire, op))

    def reduce(self, x: Array, out: Array | None, op: ReduceOp, root: int) -> Operation:
        """Combine `x` of all ranks into `out` of one."""
        return _reduction(
            x, out, op, lambda nccl, x, out, wire: nccl.reduce(x, out, wire, op, root)
        )

    def broadcast(self, x: Array, root: int) -> Operation:
        """Copy `x` of one rank into `x` of the others."""
        return Operation(lambda nccl: nccl.broadcast(x, root)) if x.size else _NOTHING

    def all_gather(self, x: Array | None, out: Array, counts: Sequence[int]) -> Operation:
        """Concatenate the parts of all ranks; where counts differ, by a broadcast of each."""
        parts = _cut(out, counts)
        if x is not None:
            _copy(x, parts[self._rank])
        if len(set(counts)) == 1:
            return Operation(lambda nccl: nccl.all_gather(out)) if out.size else _NOTHING

        def call(nccl: NcclCommunicator) -> None:
            for source, part in enumerate(parts):
                if part.size:
                    nccl.broadcast(part, source)

        return Operation(call, several=True)

    def reduce_scatter(
        self, x: Array, out: Array, counts: Sequence[int], op: ReduceOp
    ) -> Operation:
        """Combine `x` of all ranks, and keep a part; where counts differ, by a reduce of each."""
        source, landing = x, out
        after: Callable[[], None] | None = None
        held: tuple[Array, ...] = ()
        if needs_keys(x.dtype, op) and x.size:
            keys = source = to_keys(x, op)
            landed = landing = array_namespace(x).empty(out.shape, keys.dtype)
            after, held = (lambda: from_keys(landed, out)), (keys, landed)
        wire = wire_of(source.dtype)
        equal = len(set(counts)) == 1
        if equal and not x.size:
            return _NOTHING

        def call(nccl: NcclCommunicator) -> None:
            if equal:
                nccl.reduce_scatter(source, landing, wire, op)
                return
            for root, part in enumerate(_cut(source, counts)):
                if part.size:
                    nccl.reduce(part, landing if root == self._rank else part, wire, op, root)

        return Operation(call, several=not equal, after=after, temporaries=held)

    def gather(self, x: Array, out: Array | None, counts: Sequence[int], root: int) -> Operation:
        """Send `x` of all ranks to one."""
        if out is None:
            return self.messages([Message(x, root, 0)], [])
        parts = _cut(out, counts)
        _copy(x, parts[self._rank])
        return self.messages([], self._with_others(parts))

    def scatter(self, x: Array | None, out: Array, counts: Sequence[int], root: int) -> Operation:
        """Send each rank its part of `x` of one."""
        if x is None:
            return self.messages([], [Message(out, root, 0)])
        parts = _cut(x, counts)
        _copy(parts[self._rank], out)
        return self.messages(self._with_others(parts), [])

    def all_to_all(
        self, x: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Operation:
        """Send part `i` of `x` to rank `i`, and receive part `i` of `out` from it."""
        leaving, arriving = _cut(x, send_counts), _cut(out, recv_counts)
        _copy(leaving[self._rank], arriving[self._rank])
        return self.messages(self._with_others(leaving), self._with_others(arriving))

    def barrier(self) -> Operation:
        """Refuse: a barrier is one of the hosts."""
        raise UnsupportedOperationError("barrier: NCCL has none; it is one of the hosts")

    def other(self, collective: Collective) -> Operation:
        """Refuse what NCCL has no call for."""
        raise UnsupportedOperationError(f"{collective.verb}: the nccl backend does not offer it")

    def messages(self, sends: Sequence[Message], receives: Sequence[Message]) -> Operation:
        """Send and receive several arrays at once; nothing is sent of an empty one."""

        def call(nccl: NcclCommunicator) -> None:
            for message in sends:
                if message.array.size:
                    nccl.send(message.array, message.peer)
            for message in receives:
                if message.array.size:
                    nccl.recv(message.array, message.peer)

        return Operation(call, several=True)

    def _with_others(self, parts: Sequence[Array]) -> list[Message]:
        return [Message(part, peer, 0) for peer, part in enumerate(parts) if peer != self._rank]


def _reduction(
    x: Array,
    out: Array | None,
    op: ReduceOp,
    call: Callable[[NcclCommunicator, Array, Array, Wire], None],
) -> Operation:
    """Return a reduction of whole arrays; `out` is None where this rank gets no result."""
    if not x.size:
        return _NOTHING
    if needs_keys(x.dtype, op):
        keys = to_keys(x, op)
        return Operation(
            lambda nccl: call(nccl, keys, keys, wire_of(keys.dtype)),
            after=None if out is None else (lambda: from_keys(keys, out)),
            temporaries=(keys,),
        )
    # NCCL does not touch what those receive who are not the root.
    into = x if out is None else out
    return Operation(lambda nccl: call(nccl, x, into, wire_of(x.dtype)))


def _cut(x: Array, counts: Sequence[int]) -> list[Array]:
    """Return the parts of a flat array, one per rank."""
    return [x[part] for part in part_slices(counts)]


def _copy(x: Array, out: Any) -> None:
    """Copy on the current stream, unless both are the same memory."""
    if x.size and address_of(x) != address_of(out):
        out[...] = x
