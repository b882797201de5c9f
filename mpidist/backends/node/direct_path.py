"""The direct path: collectives on arrays in memory that all ranks of a node share.

Arrays that lie there are worked on where they lie: nothing is packed, sent or received inside the
node. Each rank reads and writes the others' arrays between two meetings: at the first all have come
with their contribution, at the second all are done.

On one node nothing is sent. On several, each of the node's workers (see `Neighbours`) deals with a
slice of the array: it reads it from, and writes it to, the arrays of its node, and between the two
goes by messages among the workers in its place on the other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidist._types import MEAN, Array, DType, ReduceOp
from mpidist.arrays.namespaces import HALVES
from mpidist.backends import algorithms
from mpidist.backends.algorithms import Exchanger, Lane, part_slices, undivided
from mpidist.backends.combine import (
    combination,
    even_slices,
    in_blocks,
    quiet,
    quietly,
    reduce_into,
    reduce_into_all,
)
from mpidist.backends.node.registered_memory import Place
from mpidist.backends.node.sequencer import Meetings, Sequencer, phases
from mpidist.backends.node.signatures import Route, Signature
from mpidist.backends.node.topology import Neighbours
from mpidist.backends.work import Steps

__all__ = [
    "Direct",
    "Team",
    "all_gather",
    "all_reduce",
    "broadcast",
    "prepare_all_reduce",
    "reduce_scatter",
]


@dataclass(frozen=True, slots=True)
class Team:
    """Who works on an operation.

    Attributes
    ----------
    near : Neighbours
        This rank's node, and the others.
    transport : Exchanger
        Carries messages between nodes.
    quiet : Context
        Where blocking sums combine numbers; others may be driven by another thread meanwhile.
    """

    near: Neighbours
    transport: Exchanger
    quiet: Context

    @property
    def alone(self) -> bool:
        """Whether there is but one node."""
        return len(self.near.nodes) == 1

    def across(self, lane: int) -> Lane | None:
        """Return the lane among the workers in this one's place; None if this is no worker."""
        cross = self.near.cross
        return Lane(self.transport, lane, cross) if cross else None


def slice_of(near: Neighbours, arrays: list[Array]) -> list[Array]:
    """Return the slice of a node's arrays with which this rank deals, if it is a worker."""
    first = arrays[0]
    mine = even_slices(first.size, first.itemsize, near.workers)[near.rank]
    return [array[mine] for array in arrays]


def all_reduce(team: Team, lane: int, place: Place, op: ReduceOp) -> Steps:
    """Combine the arrays of all ranks, in place: in rank order on one node.

    Each worker combines one slice of its node's arrays and writes the result into all of them: of
    q workers of p ranks of a node each, p / q of an array read and written. Over nodes the slices
    are all-reduced, 2 (m - 1) / m / q of an array sent per worker for m nodes.
    """
    if team.alone:
        quietly(*prepare_all_reduce(team, place, op))
        return
    across = team.across(lane)
    if across is None:
        return
    parts, wide = slice_of(team.near, place.arrays), _wide(place.dtype)
    total = parts[0] if wide == place.dtype else np.empty(parts[0].size, wide)
    quietly(_sum_widely, parts, op, total)
    yield from algorithms.all_reduce(across, total, total, undivided(op))
    quietly(_settle, total, op, team.transport.size, parts)


def prepare_all_reduce(team: Team, place: Place, op: ReduceOp) -> tuple[Any, ...]:
    """Return the function, and its arguments, that does this rank's share of it on one node."""
    prepared: tuple[Any, ...] | None = place.prepared.get(op)
    if prepared is None:
        blocks = in_blocks(slice_of(team.near, place.arrays))
        prepared = (reduce_into_all, blocks, combination(op, place.dtype))
        place.prepared[op] = prepared
    return prepared


def broadcast(team: Team, lane: int, arrays: list[Array], root: int) -> Steps:
    """Copy the array of `root` into all.

    On one node each rank copies it into its own. Over nodes each worker passes a slice of it down
    a tree, and writes that into the arrays of its node.
    """
    near, node = team.near, team.near.node_of(root)
    here = root in near.local
    if team.alone:
        if team.transport.rank != root:
            np.copyto(arrays[near.rank], arrays[near.local.index(root)])
        return
    across = team.across(lane)
    if across is None:
        return
    slices = slice_of(near, arrays)
    source = slices[near.local.index(root) if here else near.rank]
    yield from algorithms.tree_broadcast(across, source, node)
    _spread(source, slices)


def all_gather(team: Team, lane: int, arrays: list[Array], counts: Sequence[int]) -> Steps:
    """Copy every rank's own part of the arrays into all.

    On one node each rank copies the others' parts into its own array. Over nodes each worker sends
    its share of its node's parts to the workers in its place, and writes those of all nodes into
    the arrays of its node.
    """
    near, parts = team.near, part_slices(counts)
    if team.alone:
        own = arrays[near.rank]
        for place, rank in enumerate(near.local):
            if place != near.rank:
                own[parts[rank]] = arrays[place][parts[rank]]
        return
    across = team.across(lane)
    if across is None:
        return
    shares = [_share(node, near) for node in near.nodes]
    own = arrays[near.rank]
    sources = {rank: arrays[near.local.index(rank)][parts[rank]] for rank in shares[across.rank]}
    for after, before in across.partners():
        heard = {rank: own[parts[rank]] for rank in shares[before]}
        yield across.exchange(
            [(sources[rank], after) for rank in shares[across.rank]],
            [(heard[rank], before) for rank in shares[before]],
        )
        sources |= heard
    for rank, source in sources.items():
        _spread(source, [array[parts[rank]] for array in arrays])


def reduce_scatter(
    team: Team, lane: int, arrays: list[Array], out: Array, counts: Sequence[int], op: ReduceOp
) -> Steps:
    """Combine this rank's part of the arrays of all ranks into `out`, anywhere.

    On one node in rank order. Over nodes each worker combines its share of every other node's
    parts and sends them to where they belong; what comes is combined in the order of the nodes.
    """
    near, parts, me = team.near, part_slices(counts), team.transport.rank
    here = near.node_of(me)
    if team.alone:
        mine = [array[parts[me]] for array in arrays]
        quietly(reduce_into, mine, combination(op, out.dtype), out)
        return
    wide, everybody = _wide(out.dtype), Lane(team.transport, lane)

    def combined(rank: int) -> Array:
        total = np.empty(counts[rank], wide)
        quietly(_sum_widely, [array[parts[rank]] for array in arrays], op, total)
        return total

    sends = [
        (combined(rank), rank)
        for place, node in enumerate(near.nodes)
        if place != here and near.rank < near.workers
        for rank in _share(node, near)
    ]
    worker = near.rank % near.workers
    heard = [np.empty(counts[me], wide) for _ in near.nodes]
    heard[here] = combined(me)
    yield everybody.exchange(
        sends,
        [(heard[place], node[worker]) for place, node in enumerate(near.nodes) if place != here],
    )
    total = np.empty(counts[me], wide)
    quietly(reduce_into, heard, combination(undivided(op), wide), total)
    quietly(_settle, total, op, team.transport.size, [out])


def _share(node: tuple[int, ...], near: Neighbours) -> list[int]:
    """Return the ranks of a node with whose parts this rank's workers deal."""
    return [rank for place, rank in enumerate(node) if place % near.workers == near.rank]


def _spread(source: Array, targets: list[Array]) -> None:
    for target in targets:
        if target.ctypes.data != source.ctypes.data:
            np.copyto(target, source)


def _wide(dtype: DType) -> DType:
    """Return the dtype in which numbers are combined over nodes: halves are rounded once."""
    return np.dtype(np.float32) if dtype in HALVES else dtype


def _sum_widely(parts: list[Array], op: ReduceOp, total: Array) -> None:
    """Combine a node's parts, without dividing yet."""
    wide = [part.astype(total.dtype, copy=False) for part in parts]
    reduce_into(wide, combination(undivided(op), total.dtype), total)


def _settle(total: Array, op: ReduceOp, size: int, parts: list[Array]) -> None:
    """Divide what all ranks have given together, if asked for, and round it to where it belongs."""
    if op is MEAN:
        total /= size
    for part in parts:
        if part is not total:
            np.copyto(part, total, casting="unsafe")


class Direct:
    """The collectives of one group by way of the memory that the ranks of each node share.

    Parameters
    ----------
    sequencer : Sequencer
        The order of its operations.
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
        self.team = Team(sequencer.near, transport, quiet())
        self._lane_of = lane_of

    def plan(
        self, verb: str, args: tuple[Any, ...], signature: Signature, place: Place
    ) -> Meetings[None]:
        """Return the steps of a collective on registered memory: meet, work, meet."""
        # The number of the operation that begins next; the same on all ranks.
        lane, team, arrays = self._lane_of(self.sequencer.begun + 1), self.team, place.arrays
        if verb == "all_reduce":
            work = all_reduce(team, lane, place, args[2])
        elif verb == "reduce_scatter":
            work = reduce_scatter(team, lane, arrays, *args[1:])
        elif verb == "all_gather":
            work = all_gather(team, lane, arrays, args[2])
        else:
            work = broadcast(team, lane, arrays, args[1])
        return self._operate(signature, place, work)

    def _operate(self, signature: Signature, place: Place, work: Steps) -> Meetings[None]:
        sequencer = self.sequencer
        number = yield from sequencer.entering(signature, Route.REGISTERED, place)
        yield from phases(work)
        yield from sequencer.parting(number)
