"""Where full parameters stand while each rank writes its slice: once per node, or once per rank.

[Note: parameters once per node] `Parameter.data` are read-only views of memory that all ranks of
the node see. A rank writes its own slices only, after a barrier (all have read) and before another
(all have written). So whatever writes parameters goes through who holds the store. Over several
nodes the slices are exchanged among ranks with the same local rank. Where memory cannot be shared,
every rank has a copy, and slices are gathered from all; parameters are read-only there, too, so
that a program that works on one machine works on any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from mpidist._types import LAND, MIN, Array
from mpidist.arrays.boxes import split_evenly
from mpidist.collectives import all_gather, all_reduce, barrier
from mpidist.group import ProcessGroup
from mpidist.parallel.sharded.slabs import Slab, SlabLayout

__all__ = ["NodeStore", "ParameterStore", "RankStore", "by_node", "make_store"]


class ParameterStore(ABC):
    """Memory of all parameters.

    Attributes
    ----------
    slabs : tuple of Slab
        The parameters.
    nbytes : int
        This rank's share of the memory.
    """

    slabs: tuple[Slab, ...]
    nbytes: int

    @abstractmethod
    def settle(self) -> None:
        """Return when no rank reads any more what this one is about to write."""

    @abstractmethod
    def publish(self) -> None:
        """Show what this rank has written in its slices to all, and see what they have."""


class NodeStore(ParameterStore):
    """Parameters that stand once on each node.

    [Note: order of slices] The group is ordered by local rank, then by node. So the slices of the
    ranks with one local rank, one on each node, lie side by side, and an all_gather among them
    (`cross_group`) puts them where they belong in the memory of each node. Where nodes have
    different numbers of ranks, those beyond the smallest number have no such group and own nothing.

    Parameters
    ----------
    group : ProcessGroup
        Made by `by_node`.
    layouts : sequence of SlabLayout
        What lies where.
    blocks : sequence of Array
        The memory of each slab, shared by the ranks of this node.

    Notes
    -----
    Collective over `group`.
    """

    def __init__(
        self, group: ProcessGroup, layouts: Sequence[SlabLayout], blocks: Sequence[Array]
    ) -> None:
        self._node = group.node_group()
        self._cross = group.cross_group()
        smallest = int(all_reduce(np.array(group.local_size), group, op=MIN))
        self._first = group.local_rank * group.num_nodes
        owners = smallest * group.num_nodes
        self.slabs = tuple(
            Slab(layout, block, layout.counts(owners, group.size), group.rank)
            for layout, block in zip(layouts, blocks, strict=True)
        )
        total = sum(block.nbytes for block in blocks)
        self.nbytes = split_evenly(total, group.local_size)[group.local_rank][1]

    def settle(self) -> None:
        """Meet the ranks of this node: all have read."""
        barrier(self._node)

    def publish(self) -> None:
        """Fetch the slices of other nodes, and meet the ranks of this node: all have written."""
        cross = self._cross
        if cross is not None and cross.size > 1:
            for slab in self.slabs:
                before = sum(slab.counts[: self._first])
                counts = slab.counts[self._first : self._first + cross.size]
                region = slab.data[before : before + sum(counts)]
                all_gather(slab.own, cross, out=region, counts=counts)
        barrier(self._node)


class RankStore(ParameterStore):
    """Parameters of which every rank has a copy, where ranks share no memory.

    Parameters
    ----------
    group : ProcessGroup
        The ranks.
    layouts : sequence of SlabLayout
        What lies where.
    """

    def __init__(self, group: ProcessGroup, layouts: Sequence[SlabLayout]) -> None:
        self._group = group
        self.slabs = tuple(
            Slab(
                layout,
                np.empty(layout.length, layout.dtype),
                layout.counts(group.size, group.size),
                group.rank,
            )
            for layout in layouts
        )
        self.nbytes = sum(slab.data.nbytes for slab in self.slabs)

    def settle(self) -> None:
        """Do nothing: nobody else reads this rank's copy."""

    def publish(self) -> None:
        """Send this rank's slices to all, and receive theirs."""
        for slab in self.slabs:
            all_gather(slab.own, self._group, out=slab.data, counts=slab.counts)


def by_node(group: ProcessGroup, name: str) -> ProcessGroup:
    """Make a group of the same ranks in the order of [Note: order of slices]; collective."""
    key = group.local_rank * group.num_nodes + group.node_rank
    ordered = group.split(0, key, name=name)
    assert ordered is not None, "every rank gave color 0"
    return ordered


def make_store(group: ProcessGroup, layouts: Sequence[SlabLayout]) -> ParameterStore:
    """Make memory for parameters: once per node if every node can share it, else once per rank.

    Parameters
    ----------
    group : ProcessGroup
        Made by `by_node`.
    layouts : sequence of SlabLayout
        What is to lie in it.

    Returns
    -------
    ParameterStore
        Not initialised.

    Notes
    -----
    Collective over `group`; blocks.
    """
    node = group.node_group()
    blocks: list[Array] = []
    for layout in layouts:
        block = node.shared(layout.length, layout.dtype)
        if block is None:
            break  # on all ranks of this node
        blocks.append(block)
    here = np.array(len(blocks) == len(layouts))
    if all_reduce(here, group, op=LAND):
        return NodeStore(group, layouts, blocks)
    return RankStore(group, layouts)
