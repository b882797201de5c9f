"""The collectives as objects: one class per verb, from the front door to the transport.

An object holds what a transport gets, flat arrays and counts of elements, and says everything that
anybody asks of a collective: what has to be the same on all ranks, how it goes by messages, how in
registered memory, and which method of a library performs it. A new verb is one more class here; a
transport that knows nothing of it performs it by its messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeAlias, TypeVar
from zlib import crc32

import numpy as np

from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import is_device, is_host
from mpidist.backends import algorithms
from mpidist.backends.algorithms import Lane
from mpidist.backends.node import direct_path
from mpidist.backends.node.direct_path import NodeContext
from mpidist.backends.node.registered_memory import RegisteredArray
from mpidist.backends.node.signatures import balance_of
from mpidist.backends.work import Steps

__all__ = [
    "AllGather",
    "AllReduce",
    "AllToAll",
    "Barrier",
    "Broadcast",
    "Collective",
    "Gather",
    "Performer",
    "Planned",
    "Reduce",
    "ReduceScatter",
    "Scatter",
    "Together",
]

T = TypeVar("T")
P_co = TypeVar("P_co", covariant=True)

_MOST_COUNTS = 8
"""Counts that are written out one by one; more of them would fill a record."""


class Performer(Protocol[P_co]):
    """What performs collectives by calls of its own, such as an MPI library or NCCL.

    One method per verb. Arrays are flat and contiguous, counts are elements.
    """

    def barrier(self) -> P_co:
        """Complete when all ranks have started it."""

    def broadcast(self, x: Array, root: int) -> P_co:
        """Copy `x` of rank `root` into `x` of the others."""

    def reduce(self, x: Array, out: Array | None, op: ReduceOp, root: int) -> P_co:
        """Combine `x` of all ranks into `out` of rank `root`, which may be its `x`."""

    def all_reduce(self, x: Array, out: Array, op: ReduceOp) -> P_co:
        """Combine `x` of all ranks into `out` of all ranks, which may be `x`."""

    def gather(self, x: Array, out: Array | None, counts: Sequence[int], root: int) -> P_co:
        """Concatenate `x` of all ranks in `out` of rank `root`."""

    def all_gather(self, x: Array | None, out: Array, counts: Sequence[int]) -> P_co:
        """Concatenate `x` of all ranks in `out`; where `x` is None, it is there already."""

    def scatter(self, x: Array | None, out: Array, counts: Sequence[int], root: int) -> P_co:
        """Cut `x` of rank `root` into `out` of all ranks."""

    def reduce_scatter(self, x: Array, out: Array, counts: Sequence[int], op: ReduceOp) -> P_co:
        """Combine `x` of all ranks and keep this rank's part of the result in `out`."""

    def all_to_all(
        self, x: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> P_co:
        """Send part `i` of `x` to rank `i`; part `i` of `out` is what rank `i` sends here."""

    def other(self, collective: Collective) -> P_co:
        """Perform a collective of which the library has no call."""


Arguments: TypeAlias = tuple[ReduceOp | None, int | None, tuple[int, ...] | None]
"""How it combines, which rank gives or gets all, and the elements of each rank's part."""


@dataclass(slots=True, eq=False, repr=False, kw_only=True)
class Collective(ABC):
    """One collective, checked and ready to be performed.

    Nothing is assigned to it once it is made: all fields are `Final`. It is not a frozen dataclass,
    since making one of those takes four times as long, and one is made for every call. It has
    `describe` and no repr: those of all verbs would be almost half of the time of this import.

    Attributes
    ----------
    verb : str
        Name of the verb that makes it.
    shape : tuple of int, optional
        Shape of the caller's array, the same on all ranks; where `rows` are given, of one row.
    rows : tuple of int, optional
        Rows of each rank's part. Empty for all_to_all, whose rows differ by rank.
    listed : str, optional
        Describes all arrays of a list of which these are packed.
    breaks : bool, optional
        Whether it is one of several that were called together, so that a difference between the
        ranks breaks the group: the others are under way.
    """

    verb: ClassVar[str]
    shape: Final[tuple[int, ...] | None] = None
    rows: Final[tuple[int, ...] | None] = None
    listed: Final[str] = ""
    breaks: Final[bool] = False

    # -- what a verb says of itself --------------------------------------------------------------

    @property
    @abstractmethod
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that it reads and writes; the first is the one that `describe` names."""

    @abstractmethod
    def steps(self, lane: Lane) -> Steps:
        """Return how it goes by messages."""

    @property
    def arguments(self) -> Arguments:
        """What else of its arguments is the same on all ranks."""
        return None, None, None

    def by(self, library: Performer[T]) -> T:
        """Let a library perform it, or prepare that: call its method for this verb."""
        return library.other(self)

    @property
    def registrable(self) -> Array | None:
        """The array that is the same size on all ranks, if it can be worked on where it lies."""
        return None

    def in_place(self, context: NodeContext, lane: int, array: RegisteredArray) -> Steps:
        """Return how it is performed in registered memory, where `registrable` lies."""
        raise NotImplementedError(f"{self.verb} is not performed in registered memory")

    def balance(self, rank: int) -> int | None:
        """Return what adds up to 0 over all ranks if their counts fit, where they have to."""
        return None

    @property
    def fits(self) -> str:
        """What may differ by rank, but has to fit, for messages."""
        return ""

    # -- what follows from that ------------------------------------------------------------------

    @property
    def together(self) -> tuple[Collective, ...]:
        """The collectives of which this one is made; itself where it is one."""
        return (self,)

    @property
    def on_device(self) -> bool:
        """Whether its arrays lie on a device."""
        return any(map(is_device, self.arrays))

    def key(self) -> Hashable:
        """Return what makes a difference to `describe`, quickly: it is part of every call."""
        arrays = self.arrays
        x = arrays[0] if arrays else None
        like = None if x is None else _key_of(x)
        return self.verb, like, self.arguments, self.shape, self.rows, self.listed

    def describe(self) -> str:
        """Return what has to be the same on all ranks, such as ``"all_reduce SUM float32[10]"``."""
        parts = [self.describe_call(self.shape, self.rows)]
        if self.listed:
            parts.append(f"of a list of {self.listed}")
        if self.on_device:
            parts.append("on the device")
        return " ".join(parts)

    def describe_call(self, shape: tuple[int, ...] | None, rows: tuple[int, ...] | None) -> str:
        """Return verb, op, dtype, lengths and root."""
        op, root, counts = self.arguments
        parts = [self.verb]
        if op is not None:
            parts.append(op.name)
        if self.arrays:
            x = self.arrays[0]
            parts.append(f"{x.dtype}{_lengths(x, counts, shape, rows)}")
        if root is not None:
            parts.append(f"root {root}")
        return " ".join(parts)


@dataclass(slots=True, eq=False, repr=False)
class Barrier(Collective):
    """Complete when all ranks have started it."""

    verb: ClassVar[str] = "barrier"

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return none."""
        return ()

    def steps(self, lane: Lane) -> Steps:
        """Disseminate."""
        return algorithms.dissemination_barrier(lane)

    def by(self, library: Performer[T]) -> T:
        """Call the library's barrier."""
        return library.barrier()

    def key(self) -> Hashable:
        """Return verb and list: there is no more."""
        return self.verb, self.listed


@dataclass(slots=True, eq=False, repr=False)
class Broadcast(Collective):
    """Copy `x` of rank `root` into `x` of the others.

    Attributes
    ----------
    x : Array, 1-D
        On `root` what is sent, elsewhere where it is received.
    root : int
        The rank whose values are sent.
    """

    verb: ClassVar[str] = "broadcast"
    x: Final[Array]
    root: Final[int]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return the one array."""
        return (self.x,)

    @property
    def arguments(self) -> Arguments:
        """Return the root."""
        return None, self.root, None

    def key(self) -> Hashable:
        """As of any, at less cost."""
        return self.verb, _key_of(self.x), self.root, self.shape, self.listed

    def steps(self, lane: Lane) -> Steps:
        """Pass it down a tree."""
        return algorithms.tree_broadcast(lane, self.x, self.root)

    def by(self, library: Performer[T]) -> T:
        """Call the library's broadcast."""
        return library.broadcast(self.x, self.root)

    @property
    def registrable(self) -> Array | None:
        """Return the array."""
        return self.x

    def in_place(self, context: NodeContext, lane: int, array: RegisteredArray) -> Steps:
        """Copy from the root's memory."""
        return direct_path.broadcast(context, lane, array.arrays, self.root)


@dataclass(slots=True, eq=False, repr=False)
class Reduce(Collective):
    """Combine `x` of all ranks into `out` of rank `root`.

    Attributes
    ----------
    x : Array, 1-D
        What this rank gives.
    out : Array, 1-D, or None
        Where `root` receives the result, which may be its `x`; None elsewhere.
    op : ReduceOp
        How to combine.
    root : int
        The rank that receives the result.
    """

    verb: ClassVar[str] = "reduce"
    x: Final[Array]
    out: Final[Array | None]
    op: Final[ReduceOp]
    root: Final[int]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x`, and `out` on the root."""
        return _present(self.x, self.out)

    @property
    def arguments(self) -> Arguments:
        """Return op and root."""
        return self.op, self.root, None

    def steps(self, lane: Lane) -> Steps:
        """Climb a tree, or combine slices and gather them."""
        return algorithms.reduce(lane, self.x, self.out, self.op, self.root)

    def by(self, library: Performer[T]) -> T:
        """Call the library's reduce."""
        return library.reduce(self.x, self.out, self.op, self.root)


@dataclass(slots=True, eq=False, repr=False)
class AllReduce(Collective):
    """Combine `x` of all ranks into `out` of all ranks.

    Attributes
    ----------
    x : Array, 1-D
        What this rank gives.
    out : Array, 1-D
        Where it receives the result; the same object as `x` in place.
    op : ReduceOp
        How to combine.
    """

    verb: ClassVar[str] = "all_reduce"
    x: Final[Array]
    out: Final[Array]
    op: Final[ReduceOp]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x` and `out`."""
        return self.x, self.out

    @property
    def arguments(self) -> Arguments:
        """Return the op."""
        return self.op, None, None

    def key(self) -> Hashable:
        """As of any, at less cost."""
        return self.verb, _key_of(self.x), self.op, self.shape, self.listed

    def steps(self, lane: Lane) -> Steps:
        """Choose the algorithm by size and dtype."""
        return algorithms.all_reduce(lane, self.x, self.out, self.op)

    def by(self, library: Performer[T]) -> T:
        """Call the library's all_reduce."""
        return library.all_reduce(self.x, self.out, self.op)

    @property
    def registrable(self) -> Array | None:
        """Return the array of a sum in place."""
        return self.x if self.x is self.out else None

    def in_place(self, context: NodeContext, lane: int, array: RegisteredArray) -> Steps:
        """Combine a slice in the arrays of all ranks."""
        return direct_path.all_reduce(context, lane, array, self.op)


@dataclass(slots=True, eq=False, repr=False)
class Gather(Collective):
    """Concatenate `x` of all ranks in `out` of rank `root`.

    Attributes
    ----------
    x : Array, 1-D
        This rank's part.
    out : Array, 1-D, or None
        Where `root` receives all parts; None elsewhere.
    counts : tuple of int
        Elements of each rank's part.
    root : int
        The rank that receives them.
    """

    verb: ClassVar[str] = "gather"
    x: Final[Array]
    out: Final[Array | None]
    counts: Final[tuple[int, ...]]
    root: Final[int]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x`, and `out` on the root."""
        return _present(self.x, self.out)

    @property
    def arguments(self) -> Arguments:
        """Return root and counts."""
        return None, self.root, self.counts

    def steps(self, lane: Lane) -> Steps:
        """Send every part straight to the root."""
        return algorithms.linear_gather(lane, self.x, self.out, self.counts, self.root)

    def by(self, library: Performer[T]) -> T:
        """Call the library's gather."""
        return library.gather(self.x, self.out, self.counts, self.root)


@dataclass(slots=True, eq=False, repr=False)
class AllGather(Collective):
    """Concatenate `x` of all ranks in `out` of all ranks.

    Attributes
    ----------
    x : Array, 1-D, or None
        This rank's part; None where it lies in `out` already.
    out : Array, 1-D
        Where all parts are received.
    counts : tuple of int
        Elements of each rank's part.
    """

    verb: ClassVar[str] = "all_gather"
    x: Final[Array | None]
    out: Final[Array]
    counts: Final[tuple[int, ...]]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x`, if there is one, and `out`."""
        return _present(self.x, self.out)

    @property
    def arguments(self) -> Arguments:
        """Return the counts."""
        return None, None, self.counts

    def steps(self, lane: Lane) -> Steps:
        """Pass the parts round a ring."""
        return algorithms.ring_all_gather(lane, self.x, self.out, self.counts)

    def by(self, library: Performer[T]) -> T:
        """Call the library's all_gather."""
        return library.all_gather(self.x, self.out, self.counts)

    @property
    def registrable(self) -> Array | None:
        """Return `out` if this rank's part is there already."""
        return self.out if self.x is None else None

    def in_place(self, context: NodeContext, lane: int, array: RegisteredArray) -> Steps:
        """Copy the parts from the memory of the others."""
        return direct_path.all_gather(context, lane, array.arrays, self.counts)


@dataclass(slots=True, eq=False, repr=False)
class Scatter(Collective):
    """Cut `x` of rank `root` into `out` of all ranks.

    Attributes
    ----------
    x : Array, 1-D, or None
        All parts, on `root`; None elsewhere.
    out : Array, 1-D
        Where this rank's part is received.
    counts : tuple of int
        Elements of each rank's part.
    root : int
        The rank that sends them.
    """

    verb: ClassVar[str] = "scatter"
    x: Final[Array | None]
    out: Final[Array]
    counts: Final[tuple[int, ...]]
    root: Final[int]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x` on the root, and `out`."""
        return _present(self.x, self.out)

    @property
    def arguments(self) -> Arguments:
        """Return root and counts."""
        return None, self.root, self.counts

    def steps(self, lane: Lane) -> Steps:
        """Send every part straight from the root."""
        return algorithms.linear_scatter(lane, self.x, self.out, self.counts, self.root)

    def by(self, library: Performer[T]) -> T:
        """Call the library's scatter."""
        return library.scatter(self.x, self.out, self.counts, self.root)


@dataclass(slots=True, eq=False, repr=False)
class ReduceScatter(Collective):
    """Combine `x` of all ranks, and keep this rank's part of the result in `out`.

    Attributes
    ----------
    x : Array, 1-D
        What this rank gives: a part for each rank.
    out : Array, 1-D
        Where its part of the result is received.
    counts : tuple of int
        Elements of each rank's part.
    op : ReduceOp
        How to combine.
    """

    verb: ClassVar[str] = "reduce_scatter"
    x: Final[Array]
    out: Final[Array]
    counts: Final[tuple[int, ...]]
    op: Final[ReduceOp]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x` and `out`."""
        return self.x, self.out

    @property
    def arguments(self) -> Arguments:
        """Return op and counts."""
        return self.op, None, self.counts

    def steps(self, lane: Lane) -> Steps:
        """Exchange parts with every rank in turn."""
        return algorithms.pairwise_reduce_scatter(lane, self.x, self.out, self.counts, self.op)

    def by(self, library: Performer[T]) -> T:
        """Call the library's reduce_scatter."""
        return library.reduce_scatter(self.x, self.out, self.counts, self.op)

    @property
    def registrable(self) -> Array | None:
        """Return `x`; `out` may lie anywhere."""
        return self.x

    def in_place(self, context: NodeContext, lane: int, array: RegisteredArray) -> Steps:
        """Combine this rank's part of the arrays of all ranks."""
        return direct_path.reduce_scatter(
            context, lane, array.arrays, self.out, self.counts, self.op
        )


@dataclass(slots=True, eq=False, repr=False)
class AllToAll(Collective):
    """Send part `i` of `x` to rank `i`; part `i` of `out` is what rank `i` sends here.

    Attributes
    ----------
    x, out : Array, 1-D
        What is sent, and where it is received.
    send_counts, recv_counts : tuple of int
        Elements for, and from, each rank.
    """

    verb: ClassVar[str] = "all_to_all"
    x: Final[Array]
    out: Final[Array]
    send_counts: Final[tuple[int, ...]]
    recv_counts: Final[tuple[int, ...]]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return `x` and `out`."""
        return self.x, self.out

    @property
    def arguments(self) -> Arguments:
        """Return nothing that the calls with rows would tell; of the package's own, the counts."""
        return None, None, self.send_counts if self.rows is None else None

    def steps(self, lane: Lane) -> Steps:
        """Exchange parts with every rank in turn."""
        return algorithms.pairwise_all_to_all(
            lane, self.x, self.out, self.send_counts, self.recv_counts
        )

    def by(self, library: Performer[T]) -> T:
        """Call the library's all_to_all."""
        return library.all_to_all(self.x, self.out, self.send_counts, self.recv_counts)

    def balance(self, rank: int) -> int:
        """Return a number that adds up to 0 if all expect what is sent to them."""
        return balance_of(rank, self.send_counts, self.recv_counts)

    @property
    def fits(self) -> str:
        """The counts, of which every rank has its own."""
        sends, receives = _few(self.send_counts), _few(self.recv_counts)
        return f"sends {sends} elements, expects {receives}"


@dataclass(slots=True, eq=False, repr=False)
class Together(Collective):
    """Several collectives on device arrays, performed as one.

    Attributes
    ----------
    calls : tuple of Collective
        At least one.
    """

    verb: ClassVar[str] = "together"
    calls: Final[tuple[Collective, ...]]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return the arrays of all."""
        return tuple(x for call in self.calls for x in call.arrays)

    @property
    def together(self) -> tuple[Collective, ...]:
        """Return them."""
        return self.calls

    @property
    def on_device(self) -> bool:
        """Return True."""
        return True

    def steps(self, lane: Lane) -> Steps:
        """Perform one after the other."""
        for call in self.calls:
            yield from call.steps(lane)

    def key(self) -> Hashable:
        """Return the keys of all."""
        return self.verb, self.listed, tuple(call.key() for call in self.calls)

    def describe(self) -> str:
        """Return all, as flat arrays, and the list of which they are."""
        calls = [f"{call.describe_call(None, None)} on the device" for call in self.calls]
        return f"{' + '.join(calls)} of a list of {self.listed}"


def _key_of(x: Array) -> Hashable:
    """Return what of an array makes a difference to how it is described."""
    return x.dtype, x.size, type(x) is np.ndarray or is_host(x)


def _present(*arrays: Array | None) -> tuple[Array, ...]:
    return tuple(x for x in arrays if x is not None)


Planned: TypeAlias = tuple[Collective, Callable[[], T]]
"""A collective, and what returns the verb's result when it is complete; called once."""


def _lengths(
    x: Array,
    counts: tuple[int, ...] | None,
    shape: tuple[int, ...] | None,
    rows: tuple[int, ...] | None,
) -> str:
    """Return the shape that is the same on all ranks."""
    if rows is None:
        if counts is not None:  # of the package's own calls
            return f" in parts of {_few(counts)}"
        return str(list(x.shape if shape is None else shape))
    row = f" rows of {list(shape)}" if shape else ""
    if not rows:
        return row
    return f" in parts of {rows[0] if min(rows) == max(rows) else _few(rows)}{row}"


def _few(counts: Sequence[int]) -> str:
    """Return numbers in words of bounded length that differ if they do."""
    if len(counts) <= _MOST_COUNTS:
        return f"{list(counts)}"
    digest = crc32(np.array(counts, np.int64).tobytes())
    return f"{counts[0]}, {counts[1]}, ... (sum {sum(counts)}, checksum {digest:08x})"
