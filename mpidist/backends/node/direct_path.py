"""The direct path: collectives on arrays in memory that all ranks of a node share.

Arrays that lie there are worked on where they lie: nothing is packed, sent or received inside the
node. Each rank reads and writes the others' arrays between two barriers: at the first all ranks
have written their array, at the second all have finished.

On one node nothing is sent. On several, each of the node's workers (see `NodeTopology`) handles a
slice of the array: it reads it from, and writes it to, the arrays of its node, and between the two
it exchanges messages with the workers of the same local rank on the other nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpidist._types import MEAN, Array, DType, ReduceOp
from mpidist.arrays.boxes import part_slices
from mpidist.arrays.namespaces import HALVES
from mpidist.backends import algorithms
from mpidist.backends.algorithms import Exchanger, Lane, undivided
from mpidist.backends.combine import (
    combination,
    even_slices,
    in_blocks,
    quietly,
    reduce_into,
    reduce_into_all,
    silent_context,
)
from mpidist.backends.node.registered_memory import RegisteredArray
from mpidist.backends.node.sequencer import Sequencer
from mpidist.backends.node.signatures import ComparedCall, Route
from mpidist.backends.node.topology import NodeTopology
from mpidist.backends.work import ConditionSteps, Steps, conditions

__all__ = [
    "DirectPath",
    "NodeContext",
    "accumulation_dtype",
    "all_gather",
    "all_reduce",
    "broadcast",
    "prepare_all_reduce",
    "reduce_scatter",
    "sum_widely",
    "write_result",
]

_PIPELINED = 512 << 10
"""Bytes of a worker's slice that are one piece of `algorithms.pipelined_all_reduce`."""


@dataclass(frozen=True, slots=True)
class NodeContext:
    """What the collectives of a group on shared memory need to know.

    Attributes
    ----------
    topology : NodeTopology
        The ranks of each node.
    transport : Exchanger
        Carries messages between nodes.
    silent_context : Context
        The context in which blocking sums combine numbers, with numpy's warnings off.
    """

    topology: NodeTopology
    transport: Exchanger
    silent_context: Context

    @property
    def single_node(self) -> bool:
        """Whether all ranks of the group share memory."""
        return len(self.topology.nodes) == 1

    def between_nodes(self, lane: int) -> Lane | None:
        """Return the lane among the workers of this local rank; None if this rank is no worker."""
        peers = self.topology.cross_node_peers
        return Lane(self.transport, lane, peers) if peers else None


def slice_of(topology: NodeTopology, arrays: list[Array]) -> list[Array]:
    """Return the slice of each of a node's arrays that this rank, a worker, combines."""
    first = arrays[0]
    own = even_slices(first.size, first.itemsize, topology.workers)[topology.rank]
    return [array[own] for array in arrays]


def all_reduce(context: NodeContext, lane: int, array: RegisteredArray, op: ReduceOp) -> Steps:
    """Combine the arrays of all ranks, in place: in rank order on one node.

    Each worker combines one slice of its node's arrays and writes the result into all of them: of
    q workers of p ranks of a node each, p / q of an array read and written. Over nodes the slices
    are all-reduced in pieces, 2 (m - 1) / m / q of an array sent per worker for m nodes.
    """
    if context.single_node:
        quietly(*prepare_all_reduce(context, array, op))
        return
    outer = context.between_nodes(lane)
    if outer is None:
        return
    parts, wide = slice_of(context.topology, array.arrays), accumulation_dtype(array.dtype)
    step = max(_PIPELINED // wide.itemsize, 1)
    under_way: deque[list[Array]] = deque()

    def combined() -> Iterator[Array]:
        for start in range(0, parts[0].size, step):
            under_way.append(pieces := [part[start : start + step] for part in parts])
            total = pieces[0] if wide == array.dtype else np.empty(pieces[0].size, wide)
            quietly(sum_widely, pieces, op, total)
            yield total

    def deliver(total: Array) -> None:
        quietly(write_result, total, op, context.transport.size, under_way.popleft())

    yield from algorithms.pipelined_all_reduce(outer, combined(), undivided(op), deliver)


def prepare_all_reduce(
    context: NodeContext, array: RegisteredArray, op: ReduceOp
) -> tuple[Any, ...]:
    """Return the function, and its arguments, that does this rank's share of it on one node."""
    prepared: tuple[Any, ...] | None = array.prepared.get(op)
    if prepared is None:
        blocks = in_blocks(slice_of(context.topology, array.arrays))
        prepared = (reduce_into_all, blocks, combination(op, array.dtype))
        array.prepared[op] = prepared
    return prepared


def broadcast(context: NodeContext, lane: int, arrays: list[Array], root: int) -> Steps:
    """Copy the array of `root` into all.

    On one node each rank copies it into its own. Over nodes each worker passes a slice of it down
    a tree, and writes that into the arrays of its node.
    """
    topology, node = context.topology, context.topology.node_of(root)
    own_node = root in topology.local
    if context.single_node:
        if context.transport.rank != root:
            np.copyto(arrays[topology.rank], arrays[topology.local.index(root)])
        return
    outer = context.between_nodes(lane)
    if outer is None:
        return
    slices = slice_of(topology, arrays)
    source = slices[topology.local.index(root) if own_node else topology.rank]
    yield from algorithms.tree_broadcast(outer, source, node)
    _spread(source, slices)


def all_gather(
    context: NodeContext, lane: int, arrays: list[Array], counts: Sequence[int]
) -> Steps:
    """Copy every rank's own part of the arrays into all.

    On one node each rank copies the others' parts into its own array. Over nodes each worker sends
    its share of its node's parts to the workers of its local rank, and writes those of all nodes
    into the arrays of its node.
    """
    topology, parts = context.topology, part_slices(counts)
    if context.single_node:
        own = arrays[topology.rank]
        for local_rank, rank in enumerate(topology.local):
            if local_rank != topology.rank:
                own[parts[rank]] = arrays[local_rank][parts[rank]]
        return
    outer = context.between_nodes(lane)
    if outer is None:
        return
    shares = [_share(node, topology) for node in topology.nodes]
    own = arrays[topology.rank]
    sources = {rank: arrays[topology.local.index(rank)][parts[rank]] for rank in shares[outer.rank]}
    for after, before in outer.partners():
        received = {rank: own[parts[rank]] for rank in shares[before]}
        yield outer.exchange(
            [(sources[rank], after) for rank in shares[outer.rank]],
            [(received[rank], before) for rank in shares[before]],
        )
        sources |= received
    for rank, source in sources.items():
        _spread(source, [array[parts[rank]] for array in arrays])


def reduce_scatter(
    context: NodeContext,
    lane: int,
    arrays: list[Array],
    out: Array,
    counts: Sequence[int],
    op: ReduceOp,
) -> Steps:
    """Combine this rank's part of the arrays of all ranks into `out`, anywhere.

    On one node in rank order. Over nodes each worker combines its share of every other node's
    parts and sends them to their ranks, which combine what they receive in the order of the nodes.
    """
    topology, parts, me = context.topology, part_slices(counts), context.transport.rank
    own_node = topology.node_of(me)
    if context.single_node:
        own = [array[parts[me]] for array in arrays]
        quietly(reduce_into, own, combination(op, out.dtype), out)
        return
    wide, all_ranks = accumulation_dtype(out.dtype), Lane(context.transport, lane)

    def combined(rank: int) -> Array:
        total = np.empty(counts[rank], wide)
        quietly(sum_widely, [array[parts[rank]] for array in arrays], op, total)
        return total

    sends = [
        (combined(rank), rank)
        for index, node in enumerate(topology.nodes)
        if index != own_node and topology.rank < topology.workers
        for rank in _share(node, topology)
    ]
    worker = topology.rank % topology.workers
    received = [np.empty(counts[me], wide) for _ in topology.nodes]
    received[own_node] = combined(me)
    yield all_ranks.exchange(
        sends,
        [
            (received[index], node[worker])
            for index, node in enumerate(topology.nodes)
            if index != own_node
        ],
    )
    total = np.empty(counts[me], wide)
    quietly(reduce_into, received, combination(undivided(op), wide), total)
    quietly(write_result, total, op, context.transport.size, [out])


def _share(node: tuple[int, ...], topology: NodeTopology) -> list[int]:
    """Return the ranks of a node whose parts the workers of this local rank handle."""
    return [rank for index, rank in enumerate(node) if index % topology.workers == topology.rank]


def _spread(source: Array, targets: list[Array]) -> None:
    for target in targets:
        if target.ctypes.data != source.ctypes.data:
            np.copyto(target, source)


def accumulation_dtype(dtype: DType) -> DType:
    """Return the dtype in which numbers are combined over nodes: half types are rounded once."""
    return np.dtype(np.float32) if dtype in HALVES else dtype


def sum_widely(parts: list[Array], op: ReduceOp, total: Array) -> None:
    """Combine a node's parts, without dividing yet."""
    wide = [part.astype(total.dtype, copy=False) for part in parts]
    reduce_into(wide, combination(undivided(op), total.dtype), total)


def write_result(total: Array, op: ReduceOp, size: int, parts: list[Array]) -> None:
    """Divide the total for MEAN, and copy it to its targets, rounded to their dtype."""
    if op is MEAN:
        total /= size
    for part in parts:
        if part is not total:
            np.copyto(part, total, casting="unsafe")


class InPlace(Protocol):
    """A collective that can work on arrays where they lie."""

    def in_place(self, context: NodeContext, lane: int, array: RegisteredArray) -> Steps:
        """Return what is done between the two barriers."""


class DirectPath:
    """The collectives of one group by way of the memory that the ranks of each node share.

    Parameters
    ----------
    sequencer : Sequencer
        The order of the group's operations.
    transport : Exchanger
        Carries messages to other nodes.
    lane_of : callable
        Returns the lane of the operation with a number.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        transport: algorithms.Exchanger,
        lane_of: Callable[[int], int],
    ) -> None:
        self.sequencer = sequencer
        self.context = NodeContext(sequencer.topology, transport, silent_context())
        self._lane_of = lane_of

    def plan(
        self, collective: InPlace, call: ComparedCall, array: RegisteredArray
    ) -> ConditionSteps[None]:
        """Return the steps of a collective on registered memory: barrier, work, barrier."""
        # By the number of the operation that begins next, which is the same on all ranks.
        lane = self._lane_of(self.sequencer.begun + 1)
        return self._operate(call, array, collective.in_place(self.context, lane, array))

    def _operate(
        self, call: ComparedCall, array: RegisteredArray, work: Steps
    ) -> ConditionSteps[None]:
        sequencer = self.sequencer
        number = yield from sequencer.arrival_steps(call, Route.REGISTERED, array)
        yield from conditions(work)
        yield from sequencer.finish_steps(number)
