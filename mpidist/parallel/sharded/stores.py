"""Where the parameters of a sharded model stand: once per node, or once per rank.

[Note: parameters once per node] `Parameter.data` are read-only views of memory that all ranks of
the node see. A rank writes its own slices only, after a barrier (all have read) and before another
(all have written). So all writes go through the owner of the store. Over several nodes the slices
are exchanged among ranks with the same local rank. Where memory cannot be shared, every rank has a
copy, and slices are gathered from all; parameters are read-only there, too, so that a program that
works on one machine works on any. Arrays on a device are such copies, and cannot be made read-only.
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

__all__ = [
    "NodeStore",
    "ParameterStore",
    "RankStore",
    "by_node",
    "make_store",
    "owners_by_node",
    "shared_blocks",
]


class ParameterStore(ABC):
    """Memory of all parameters.

    Attributes
    ----------
    flats : tuple of FlatParameters
        All parameters, a flat array per bucket of gradients.
    whole : dict of str to Array
        The parameters that are whole at any time, by name: views of the memory.
    nbytes : int
        This rank's share of the memory.
    buffers_nbytes : int
        This rank's share of memory for parameters that are whole only in some passes.
    shared : bool
        Whether what is whole is so once per node; if not, once per rank.
    """

    flats: tuple[FlatParameters, ...]
    whole: dict[str, Array]
    nbytes: int
    buffers_nbytes: int = 0
    shared: bool

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
    (`cross_group`) writes them into the memory of each node. Where nodes have different numbers of
    ranks, those beyond the smallest number have no such group and own nothing.

    Parameters
    ----------
    group : ProcessGroup
        The ranks in the order of their slices, as `by_node` makes it.
    layouts : sequence of FlatLayout
        The layout of each flat array.
    blocks : sequence of Array
        The memory of each flat array, of dtype uint8, shared by the ranks of this node.

    Notes
    -----
    Collective over `group`.
    """

    shared = True

    def __init__(
        self, group: ProcessGroup, layouts: Sequence[FlatLayout], blocks: Sequence[Array]
    ) -> None:
        self._node = group.node_group()
        self._peers = group.cross_group()
        self._first = group.local_rank * group.num_nodes
        pairs = zip(layouts, blocks, strict=True)
        self._blocks = [block.view(layout.dtype) for layout, block in pairs]
        owners = owners_by_node(group)
        self.flats = tuple(
            FlatParameters.sliced(layout, block, layout.counts(owners, group.size), group.rank)
            for layout, block in zip(layouts, self._blocks, strict=True)
        )
        self.whole = _views(layouts, self._blocks)
        total = sum(block.nbytes for block in blocks)
        self.nbytes = split_evenly(total, group.local_size)[group.local_rank][1]

    def begin_write(self) -> None:
        """Wait for the ranks of this node: all have read."""
        barrier(self._node)

    def end_write(self) -> None:
        """Fetch other nodes' slices, then wait for the ranks of this node: all have written."""
        peers = self._peers
        if peers is not None and peers.size > 1:
            for flat, block in zip(self.flats, self._blocks, strict=True):
                before = sum(flat.counts[: self._first])
                counts = flat.counts[self._first : self._first + peers.size]
                region = block[before : before + sum(counts)]
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

    shared = False

    def __init__(
        self, group: ProcessGroup, layouts: Sequence[FlatLayout], *, on_device: bool = False
    ) -> None:
        self._group = group
        empty = device_empty if on_device else np.empty
        self._blocks = [empty(layout.length, layout.dtype) for layout in layouts]
        self.flats = tuple(
            FlatParameters.sliced(layout, block, layout.counts(group.size, group.size), group.rank)
            for layout, block in zip(layouts, self._blocks, strict=True)
        )
        self.whole = _views(layouts, self._blocks)
        self.nbytes = sum(block.nbytes for block in self._blocks)

    def begin_write(self) -> None:
        """Do nothing: nobody else reads this rank's copy."""

    def end_write(self) -> None:
        """Send this rank's slices to all, and receive theirs."""
        for flat, block in zip(self.flats, self._blocks, strict=True):
            all_gather(flat.own, self._group, out=block, counts=flat.counts)


def _views(layouts: Sequence[FlatLayout], blocks: Sequence[Array]) -> dict[str, Array]:
    """Return all parameters as views of their flat arrays."""
    pairs = zip(layouts, blocks, strict=True)
    return {n: view for layout, block in pairs for n, view in layout.views(block).items()}


def owners_by_node(group: ProcessGroup) -> int:
    """Return how many ranks own slices by [Note: order of slices]; collective."""
    return int(all_reduce(np.array(group.local_size), group, op=MIN)) * group.num_nodes


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
    blocks = None if on_device else shared_blocks(group, [layout.nbytes for layout in layouts])
    if blocks is None:
        return RankStore(group, layouts, on_device=on_device)
    return NodeStore(group, layouts, blocks)


def shared_blocks(group: ProcessGroup, sizes: Sequence[int]) -> list[Array] | None:
    """Make memory that the ranks of each node share, of these numbers of bytes.

    Returns
    -------
    list of Array, or None
        Of dtype uint8, not initialised. None on all ranks of the group if some node has no such
        memory.

    Notes
    -----
    Collective over `group`; blocks.
    """
    node = group.node_group()
    blocks: list[Array] = []
    for nbytes in sizes:
        block = node.shared(nbytes, np.uint8)
        if block is None:
            break  # on all ranks of this node
        blocks.append(block)
    shared = np.array(len(blocks) == len(sizes))
    return blocks if all_reduce(shared, group, op=LAND) else None
