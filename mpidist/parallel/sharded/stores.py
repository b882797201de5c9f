"""Where the parameters of a sharded model stand: once per node, or once per rank.

[Note: parameters once per node] `Parameter.data` are read-only views of memory that all ranks of
the node see. A rank writes its own slices only, after a barrier (all have read) and before another
(all have written). So all writes go through the owner of the store. Over several
nodes the slices are exchanged among ranks with the same local rank. Where memory cannot be shared,
every rank has a copy, and slices are gathered from all; parameters are read-only there, too, so
that a program that works on one machine works on any. Arrays on a device are such copies, and
cannot be made read-only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from mpidist._types import LAND, MIN, Array
from mpidist.arrays.boxes import split_evenly
from mpidist.arrays.namespaces import device_empty
from mpidist.collectives import all_gather, all_reduce, barrier
from mpidist.group import ProcessGroup
from mpidist.parallel.sharded.flat_parameters import FlatLayout, FlatParameters

__all__ = ["NodeStore", "ParameterStore", "RankStore", "by_node", "make_store"]


class ParameterStore(ABC):
    """Memory of all parameters.

    Attributes
    ----------
    flats : tuple of FlatParameters
        All parameters, a flat array per bucket of gradients.
    nbytes : int
        This rank's share of the memory.
    """

    flats: tuple[FlatParameters, ...]
    nbytes: int

    @abstractmethod
    def begin_write(self) -> None:
        """Return when no rank reads any more what this one is about to write."""

    @abstractmethod
    def end_write(self) -> None:
        """Make every rank see what all ranks have written in their slices."""


class NodeStore(ParameterStore):
    """Parameters in memory that the ranks of each node share.

    [Note: order of slices] The group is ordered by local rank, then by node. So the slices of the
    ranks with one local rank, one on each node, are neighbours, and an all_gather among them
    (`cross_group`) writes them into the memory of each node. Where nodes have
    different numbers of ranks, those beyond the smallest number have no such group and own nothing.

    Parameters
    ----------
    group : ProcessGroup
        The ranks in the order of their slices, as `by_node` makes it.
    layouts : sequence of FlatLayout
        The layout of each flat array.
    blocks : sequence of Array
        The memory of each flat array, shared by the ranks of this node.

    Notes
    -----
    Collective over `group`.
    """

    def __init__(
        self, group: ProcessGroup, layouts: Sequence[FlatLayout], blocks: Sequence[Array]
    ) -> None:
        self._node = group.node_group()
        self._peers = group.cross_group()
        smallest = int(all_reduce(np.array(group.local_size), group, op=MIN))
        self._first = group.local_rank * group.num_nodes
        owners = smallest * group.num_nodes
        self.flats = tuple(
            FlatParameters(layout, block, layout.counts(owners, group.size), group.rank)
            for layout, block in zip(layouts, blocks, strict=True)
        )
        total = sum(block.nbytes for block in blocks)
        self.nbytes = split_evenly(total, group.local_size)[group.local_rank][1]

    def begin_write(self) -> None:
        """Wait for the ranks of this node: all have read."""
        barrier(self._node)

    def end_write(self) -> None:
        """Fetch other nodes' slices, then wait for the ranks of this node: all have written."""
        peers = self._peers
        if peers is not None and peers.size > 1:
            for flat in self.flats:
                before = sum(flat.counts[: self._first])
                counts = flat.counts[self._first : self._first + peers.size]
                region = flat.data[before : before + sum(counts)]
                all_gather(flat.own, peers, out=region, counts=counts)
        barrier(self._node)


class RankStore(ParameterStore):
    """Parameters of which every rank has a copy, where ranks share no memory.

    Parameters
    ----------
    group : ProcessGroup
        The ranks, in the order of their slices.
    layouts : sequence of FlatLayout
        The layout of each flat array.
    on_device : bool, optional
        Whether they lie on this rank's device.
    """

    def __init__(
        self, group: ProcessGroup, layouts: Sequence[FlatLayout], *, on_device: bool = False
    ) -> None:
        self._group = group
        empty = device_empty if on_device else np.empty
        self.flats = tuple(
            FlatParameters(
                layout,
                empty(layout.length, layout.dtype),
                layout.counts(group.size, group.size),
                group.rank,
            )
            for layout in layouts
        )
        self.nbytes = sum(flat.data.nbytes for flat in self.flats)

    def begin_write(self) -> None:
        """Do nothing: nobody else reads this rank's copy."""

    def end_write(self) -> None:
        """Send this rank's slices to all, and receive theirs."""
        for flat in self.flats:
            all_gather(flat.own, self._group, out=flat.data, counts=flat.counts)


def by_node(group: ProcessGroup, name: str) -> ProcessGroup:
    """Make a group of the same ranks in the order of [Note: order of slices]; collective."""
    key = group.local_rank * group.num_nodes + group.node_rank
    ordered = group.split(0, key, name=name)
    assert ordered is not None, "every rank gave color 0"
    return ordered


def make_store(
    group: ProcessGroup, layouts: Sequence[FlatLayout], *, on_device: bool = False
) -> ParameterStore:
    """Make memory for parameters: once per node if every node can share it, else once per rank.

    Parameters
    ----------
    group : ProcessGroup
        The ranks in the order of their slices, as `by_node` makes it.
    layouts : sequence of FlatLayout
        What is to lie in it.
    on_device : bool, optional
        Whether it is to be memory of this rank's device.

    Returns
    -------
    ParameterStore
        Not initialised.

    Notes
    -----
    Collective over `group`; blocks.
    """
    if on_device:
        return RankStore(group, layouts, on_device=True)
    node = group.node_group()
    blocks: list[Array] = []
    for layout in layouts:
        block = node.shared(layout.length, layout.dtype)
        if block is None:
            break  # on all ranks of this node
        blocks.append(block)
    shared = np.array(len(blocks) == len(layouts))
    if all_reduce(shared, group, op=LAND):
        return NodeStore(group, layouts, blocks)
    return RankStore(group, layouts)
