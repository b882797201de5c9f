"""Collectives made of messages: what a transport gets for implementing `exchange`.

Each algorithm is a generator that yields every exchange it has to wait for, so that one body
serves the blocking call (which waits) and the immediate one (which is polled). Costs are stated
for p ranks and n bytes, per rank, as messages sent and bytes sent.

References
----------
Thakur, Rabenseifner, Gropp (2005), Optimization of Collective Communication Operations in MPICH.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from mpidist._types import MEAN, SUM, Array, ReduceOp
from mpidist.arrays.boxes import part_slices, split_evenly
from mpidist.arrays.namespaces import HALVES, reduce_in_rank_order
from mpidist.backends.combine import quietly
from mpidist.backends.work import Message, PersistentExchange, Steps, Work

__all__ = [
    "AHEAD",
    "Lane",
    "all_reduce",
    "dissemination_barrier",
    "linear_gather",
    "linear_scatter",
    "pairwise_all_to_all",
    "pairwise_reduce_scatter",
    "pipelined_all_reduce",
    "rank_order_all_reduce",
    "recursive_doubling_all_reduce",
    "reduce",
    "ring_all_gather",
    "ring_all_reduce",
    "tree_broadcast",
    "tree_reduce",
    "undivided",
]

SHORT = 2048
"""Bytes up to which latency, not bandwidth, decides (Thakur et al., section 4.5)."""


AHEAD = 2
"""Pieces of `pipelined_all_reduce` that are being gathered while another one is made."""


class Exchanger(Protocol):
    """What an algorithm needs of a transport."""

    rank: int
    size: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work[Any]:
        """Start sending and receiving."""

    def persistent_exchange(
        self, sent: Array, received: Sequence[Array], peers: Sequence[int], lane: int
    ) -> PersistentExchange:
        """Prepare to send the same short array to some ranks, and to receive one of each."""


class Lane:
    """The messages of one operation among all ranks of a group.

    Parameters
    ----------
    transport : Exchanger
        Who moves the bytes.
    number : int
        The lane; see [Note: phases].
    ranks : sequence of int, optional
        The transport's ranks taking part, of which this is one; all when omitted.

    Attributes
    ----------
    rank, size : int
        This rank among those taking part, and their number.
    """

    def __init__(
        self, transport: Exchanger, number: int, ranks: Sequence[int] | None = None
    ) -> None:
        self._ranks = tuple(range(transport.size) if ranks is None else ranks)
        self.rank = self._ranks.index(transport.rank)
        self.size = len(self._ranks)
        self._transport = transport
        self._number = number

    def neighbours(self, distance: int) -> tuple[int, int]:
        """Return the ranks this far after and before this one, on a ring."""
        return (self.rank + distance) % self.size, (self.rank - distance) % self.size

    def partners(self) -> Iterator[tuple[int, int]]:
        """Yield the destination and the source of each round; each other rank is either once."""
        return map(self.neighbours, range(1, self.size))

    def exchange(
        self,
        sends: Sequence[tuple[Array, int]] = (),
        receives: Sequence[tuple[Array, int]] = (),
    ) -> Work[Any]:
        """Start sending and receiving (array, peer) pairs."""
        return self._transport.exchange(
            [Message(array, self._ranks[peer], self._number) for array, peer in sends],
            [Message(array, self._ranks[peer], self._number) for array, peer in receives],
        )


def undivided(op: ReduceOp) -> ReduceOp:
    """Return how to combine what is divided, if at all, when all has come together."""
    return SUM if op is MEAN else op


def _parts(x: Array, counts: Sequence[int]) -> list[Array]:
    """Cut a flat array into consecutive parts."""
    return [x[part] for part in part_slices(counts)]


def _even_counts(length: int, size: int) -> list[int]:
    return [count for _, count in split_evenly(length, size)]


def dissemination_barrier(lane: Lane) -> Steps:
    """Wait for all: in round k send to the rank 2**k ahead, receive from the one 2**k behind.

    Cost: ceil(log2 p) messages of 1 byte.

    References
    ----------
    Hensgen, Finkel, Manber (1988), Two Algorithms for Barrier Synchronization, section 3.
    """
    token, heard = np.zeros(1, np.uint8), np.empty(1, np.uint8)
    distance = 1
    while distance < lane.size:
        ahead, behind = lane.neighbours(distance)
        yield lane.exchange([(token, ahead)], [(heard, behind)])
        distance *= 2


def _tree(rank: int, size: int, root: int) -> tuple[int | None, list[int]]:
    """Return parent and children in the binomial tree of `root`, the nearest child first."""
    relative = (rank - root) % size
    lowest = relative & -relative if relative else 1 << (size - 1).bit_length()
    parent = (relative - lowest + root) % size if relative else None
    children = []
    distance = 1
    while distance < lowest and relative + distance < size:
        children.append((relative + distance + root) % size)
        distance *= 2
    return parent, children


def tree_broadcast(lane: Lane, x: Array, root: int) -> Steps:
    """Pass `x` down a binomial tree.

    Cost: at most ceil(log2 p) messages and n bytes each.

    References
    ----------
    Thakur et al. (2005), section 4.2.
    """
    parent, children = _tree(lane.rank, lane.size, root)
    if parent is not None:
        yield lane.exchange(receives=[(x, parent)])
    if children:
        # The farthest child has the largest subtree below it and is served first.
        yield lane.exchange([(x, child) for child in reversed(children)])


def tree_reduce(lane: Lane, x: Array, out: Array | None, op: ReduceOp, root: int) -> Steps:
    """Combine `x` up a binomial tree into `out` of `root`.

    Cost: 1 message of n bytes; the root receives ceil(log2 p) of them.

    References
    ----------
    Thakur et al. (2005), section 4.4.
    """
    parent, children = _tree(lane.rank, lane.size, root)
    total = out if parent is None and out is not None else np.empty_like(x)
    contributions = [np.empty_like(x) for _ in children]
    if children:
        yield lane.exchange(receives=list(zip(contributions, children, strict=True)))
    plain = undivided(op)
    reduce_in_rank_order([x, *contributions], plain, total)
    if parent is not None:
        yield lane.exchange([(total, parent)])
    elif op is MEAN:
        quietly(np.divide, total, lane.size, total)


def recursive_doubling_all_reduce(lane: Lane, x: Array, out: Array, op: ReduceOp) -> Steps:
    """Combine with the rank at distance 1, 2, 4, ...: fewest rounds, for short arrays.

    The first `r = p - 2**floor(log2 p)` pairs of ranks join into one before, and hear the result
    after. The lower rank's value is always the first operand, so that all get the same bits.

    Cost: log2 p messages of n bytes, and 2 more where p is no power of two.

    References
    ----------
    Thakur et al. (2005), section 4.5.
    """
    plain = undivided(op)
    power = 1 << (lane.size.bit_length() - 1)
    pairs = lane.size - power
    other = np.empty_like(x)
    reduce_in_rank_order([x], plain, out)
    paired = lane.rank < 2 * pairs
    if paired and lane.rank % 2:
        yield lane.exchange([(out, lane.rank - 1)])
        yield lane.exchange(receives=[(out, lane.rank - 1)])
        return
    if paired:
        yield lane.exchange(receives=[(other, lane.rank + 1)])
        reduce_in_rank_order([out, other], plain, out)
    position = lane.rank // 2 if paired else lane.rank - pairs
    distance = 1
    while distance < power:
        partner = position ^ distance
        peer = 2 * partner if partner < pairs else partner + pairs
        yield lane.exchange([(out, peer)], [(other, peer)])
        lower, higher = (out, other) if position < partner else (other, out)
        # A fresh array: the operand order must not depend on which of the two is `out`.
        combined = np.empty_like(out)
        reduce_in_rank_order([lower, higher], plain, combined)
        out[...] = combined
        distance *= 2
    if op is MEAN:
        quietly(np.divide, out, lane.size, out)
    if paired:
        yield lane.exchange([(out, lane.rank + 1)])


def ring_all_reduce(lane: Lane, x: Array, out: Array, op: ReduceOp) -> Steps:
    """Pass slices round a ring, adding on the first round and copying on the second.

    Cost: 2 (p - 1) messages, 2 (p - 1) / p n bytes, which no algorithm can undercut.

    References
    ----------
    Patarasuk, Yuan (2009), Bandwidth optimal all-reduce algorithms for clusters of workstations,
    section 3.
    """
    plain = undivided(op)
    reduce_in_rank_order([x], plain, out)
    counts = _even_counts(out.size, lane.size)
    slices = _parts(out, counts)
    after, before = lane.neighbours(1)
    arriving = np.empty(max(counts), out.dtype)
    for step in range(lane.size - 1):
        leaving = slices[(lane.rank - step) % lane.size]
        own = slices[(lane.rank - step - 1) % lane.size]
        heard = arriving[: own.size]
        yield lane.exchange([(leaving, after)], [(heard, before)])
        reduce_in_rank_order([own, heard], plain, own)
    complete = slices[after]
    if op is MEAN:
        quietly(np.divide, complete, lane.size, complete)
    yield from _pass_round(lane, slices, after)


def rank_order_all_reduce(lane: Lane, x: Array, out: Array, op: ReduceOp) -> Steps:
    """Exchange slices, combine each in rank order, gather: rounds once, and as numpy would.

    Cost: 2 (p - 1) messages, 2 (p - 1) / p n bytes; the slices of all ranks take n bytes.
    """
    counts = _even_counts(x.size, lane.size)
    own = _parts(out, counts)[lane.rank]
    result = np.empty_like(own)
    yield from pairwise_reduce_scatter(lane, x, result, counts, op)
    own[...] = result
    yield from ring_all_gather(lane, None, out, counts)


def pipelined_all_reduce(
    lane: Lane | None, pieces: Iterable[Array], op: ReduceOp, deliver: Callable[[Array], None]
) -> Steps:
    """Combine pieces of an array in rank order, each in place, several on their way at a time.

    For few ranks, as each sends to all others at once: of two ranks each sends its piece, of more
    each sends their slices, and then the result of its own slice. All ranks start the messages of
    all pieces in the same order, so that they can share a lane.

    Parameters
    ----------
    lane : Lane or None
        The ranks; None for a rank that goes through the pieces in step with others, and sends none.
    pieces : iterable of Array, 1-D
        All ranks give pieces of the same lengths. The next one is asked for while `AHEAD` + 1
        earlier ones may be on their way.
    op : ReduceOp
        How to combine.
    deliver : callable
        Called with each piece, in their order, when it is complete.

    Notes
    -----
    Cost of a piece: 2 (p - 1) messages, 2 (p - 1) / p n bytes; between two ranks 1 message. Memory:
    of a piece as much as this rank receives.
    """
    gathered: deque[_PieceSum] = deque()
    spread: deque[_PieceSum] = deque()

    def advance(to_gather: int, to_spread: int) -> Steps:
        """Go on until no more than so many pieces are being gathered, and spread."""
        while len(gathered) > to_gather:
            yield gathered[0].work
            spread.append(gathered.popleft())
            spread[-1].combine(op)
            while len(spread) > to_spread:
                yield spread[0].work
                deliver(spread.popleft().total)

    for piece in pieces:
        gathered.append(_PieceSum(lane, piece))
        yield from advance(AHEAD, 1)
    yield from advance(0, 0)


class _PieceSum:
    """A piece of an array whose slices are gathered, combined, and spread."""

    def __init__(self, lane: Lane | None, total: Array) -> None:
        self.total = total
        self.work: Work[Any] = Work.all(())
        self._lane = lane
        if lane is None:
            return
        self._others = [rank for rank in range(lane.size) if rank != lane.rank]
        cut = lane.size > 2  # between two ranks it takes one message less to send all of it
        counts = _even_counts(total.size, lane.size)
        self._slices = _parts(total, counts) if cut else [total] * lane.size
        self._own = self._slices[lane.rank]
        self._heard = [np.empty_like(self._own) for _ in self._others]
        self.work = lane.exchange(
            [(self._slices[rank], rank) for rank in self._others],
            list(zip(self._heard, self._others, strict=True)),
        )

    def combine(self, op: ReduceOp) -> None:
        """Combine what has been gathered, and start to spread it."""
        lane = self._lane
        if lane is None:
            return
        own, heard = self._own, self._heard
        # The first sum may overwrite `own` only if that is one of its parts.
        out = own if lane.rank < 2 else heard[0]
        reduce_in_rank_order([*heard[: lane.rank], own, *heard[lane.rank :]], op, out)
        if out is not own:
            own[...] = out
        if lane.size > 2:
            self.work = lane.exchange(
                [(own, rank) for rank in self._others],
                [(self._slices[rank], rank) for rank in self._others],
            )


def all_reduce(lane: Lane, x: Array, out: Array, op: ReduceOp) -> Steps:
    """Combine `x` of all ranks into `out` of all, by the algorithm that fits size and dtype."""
    if x.dtype in HALVES:
        return rank_order_all_reduce(lane, x, out, op)
    if x.nbytes <= SHORT:
        return recursive_doubling_all_reduce(lane, x, out, op)
    return ring_all_reduce(lane, x, out, op)


def reduce(lane: Lane, x: Array, out: Array | None, op: ReduceOp, root: int) -> Steps:
    """Combine `x` of all ranks into `out` of `root`.

    Short arrays climb a tree; for long ones and halves each rank combines its slice in rank order
    and sends it to the root (Thakur et al., section 4.4: Rabenseifner's algorithm).

    Cost of the latter: p messages, about n bytes.
    """
    if x.nbytes <= SHORT and x.dtype not in HALVES:
        yield from tree_reduce(lane, x, out, op, root)
        return
    counts = _even_counts(x.size, lane.size)
    own = np.empty(counts[lane.rank], x.dtype)
    yield from pairwise_reduce_scatter(lane, x, own, counts, op)
    yield from linear_gather(lane, own, out, counts, root)


def linear_gather(
    lane: Lane, x: Array, out: Array | None, counts: Sequence[int], root: int
) -> Steps:
    """Send every part straight to the root.

    Cost: 1 message of n bytes; the root receives p - 1 of them.
    """
    if lane.rank != root or out is None:
        yield lane.exchange([(x, root)])
        return
    parts = _parts(out, counts)
    if not np.shares_memory(parts[root], x):
        parts[root][...] = x
    yield lane.exchange(receives=[(parts[peer], peer) for peer in range(lane.size) if peer != root])


def linear_scatter(
    lane: Lane, x: Array | None, out: Array, counts: Sequence[int], root: int
) -> Steps:
    """Send every part straight from the root.

    Cost: the root sends p - 1 messages, the others none.
    """
    if lane.rank != root or x is None:
        yield lane.exchange(receives=[(out, root)])
        return
    parts = _parts(x, counts)
    yield lane.exchange([(parts[peer], peer) for peer in range(lane.size) if peer != root])
    out[...] = parts[root]


def ring_all_gather(lane: Lane, x: Array | None, out: Array, counts: Sequence[int]) -> Steps:
    """Pass parts round a ring until all have been everywhere.

    Cost: p - 1 messages, the bytes of all parts but one.

    References
    ----------
    Thakur et al. (2005), section 4.1.
    """
    parts = _parts(out, counts)
    if x is not None:
        parts[lane.rank][...] = x
    yield from _pass_round(lane, parts, lane.rank)


def _pass_round(lane: Lane, parts: Sequence[Array], own: int) -> Steps:
    """Pass parts round a ring until all have been everywhere; this rank begins with its own."""
    after, before = lane.neighbours(1)
    for step in range(lane.size - 1):
        leaving, heard = parts[(own - step) % lane.size], parts[(own - step - 1) % lane.size]
        yield lane.exchange([(leaving, after)], [(heard, before)])


def pairwise_reduce_scatter(
    lane: Lane, x: Array, out: Array, counts: Sequence[int], op: ReduceOp
) -> Steps:
    """Send each rank its part and combine the parts received in rank order.

    Cost: p - 1 messages, the bytes of all parts but one; p - 1 parts of memory.

    References
    ----------
    Thakur et al. (2005), section 4.3, pairwise exchange.
    """
    parts = _parts(x, counts)
    heard = [np.empty_like(out) for _ in range(lane.size)]
    heard[lane.rank] = parts[lane.rank]
    for after, before in lane.partners():
        yield lane.exchange([(parts[after], after)], [(heard[before], before)])
    reduce_in_rank_order(heard, op, out)


def pairwise_all_to_all(
    lane: Lane, x: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int]
) -> Steps:
    """Exchange with the ranks at distance 1, 2, 3, ... in turn.

    Cost: p - 1 messages, the bytes of all parts but one.

    References
    ----------
    Thakur et al. (2005), section 4.6, pairwise exchange.
    """
    leaving, arriving = _parts(x, send_counts), _parts(out, recv_counts)
    arriving[lane.rank][...] = leaving[lane.rank]
    for after, before in lane.partners():
        yield lane.exchange([(leaving[after], after)], [(arriving[before], before)])
