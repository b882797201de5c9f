"""Which ranks of a group share memory, and who speaks for a node to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Neighbours"]


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Where one rank stands among the ranks of its node, and its node among the others.

    Attributes
    ----------
    local : tuple of int
        The ranks of this node, in order.
    rank : int
        This rank's place among them.
    workers : int
        The smallest number of ranks on any node: so many of each node take part in what is done
        between nodes.
    nodes : tuple of tuple of int
        The ranks of every node, in the order of their first ranks.
    """

    local: tuple[int, ...]
    rank: int
    workers: int
    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, nodes: Sequence[int], rank: int) -> Neighbours:
        """Return the neighbours of a rank, given a number of each rank's node."""
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
    def cross(self) -> tuple[int, ...]:
        """The ranks in this one's place on every node; none where it is not one of the workers."""
        if self.rank >= self.workers:
            return ()
        return tuple(node[self.rank] for node in self.nodes)

    def node_of(self, rank: int) -> int:
        """Return which node a rank is on."""
        return next(place for place, node in enumerate(self.nodes) if rank in node)
