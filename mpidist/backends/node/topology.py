"""Which ranks of a group share memory, and which of them send messages to other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NodeTopology"]


@dataclass(frozen=True, slots=True)
class NodeTopology:
    """The nodes of a group, as seen by one of its ranks.

    Attributes
    ----------
    local : tuple of int
        The ranks of this node, in order.
    rank : int
        Index of this rank among them.
    workers : int
        The smallest number of ranks on any node. So many ranks of each node, its workers, exchange
        messages with other nodes.
    nodes : tuple of tuple of int
        The ranks of every node, in the order of their first ranks.
    """

    local: tuple[int, ...]
    rank: int
    workers: int
    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, nodes: Sequence[int], rank: int) -> NodeTopology:
        """Return the topology for a rank, given a number of each rank's node."""
        members: dict[int, list[int]] = {}
        for other, node in enumerate(nodes):
            members.setdefault(node, []).append(other)
        local = tuple(members[nodes[rank]])
        return cls(
            local,
            local.index(rank),
            min(map(len, members.values())),
            tuple(map(tuple, members.values())),
        )

    @property
    def cross_node_peers(self) -> tuple[int, ...]:
        """The ranks with this local rank on every node; none if this rank is no worker."""
        if self.rank >= self.workers:
            return ()
        return tuple(node[self.rank] for node in self.nodes)

    def node_of(self, rank: int) -> int:
        """Return the index of a rank's node."""
        return next(index for index, node in enumerate(self.nodes) if rank in node)
