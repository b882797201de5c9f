"""From one sharding to another: which boxes go from whom to whom.

[Note: two exchanges] All that changes hands goes in at most two exchanges of boxes. In the second
each rank gets what it lacks of its box from the nearest rank that holds it. The first one takes
place where ranks divide work among them: each adds up a part of the partial sums, in the order of
the ranks, or gets the part of the root's array that it then passes on. So all ranks that have an
element in the end have the same bits, whatever the transport. A sum for all ranks costs what a
reduce-scatter and an all-gather cost, a broadcast what a scatter and an all-gather cost. Ranks of
one node take a shorter way to a sum for all of them, `Total`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from operator import ne
from typing import NamedTuple

from mpidist._types import ReduceOp
from mpidist.arrays.boxes import Box, even_part
from mpidist.mesh.placements import Partial, Placement, Shard, cut_to

__all__ = ["Phase", "Redistribution", "Sharding", "plan_distribution", "plan_redistribution"]

_NEUTRAL: dict[ReduceOp, int] = {
    ReduceOp.SUM: 0,
    ReduceOp.PROD: 1,
    ReduceOp.BXOR: 0,
    ReduceOp.LXOR: 0,
}
"""What changes no value. The other operations give the value where all ranks have it."""

_KEPT = 512
"""Plans that are remembered: those of a program's arrays."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How an array lies on the ranks of a group.

    Attributes
    ----------
    shape : tuple of int
        Of the whole array.
    sizes : tuple of int
        Of the mesh.
    placements : tuple of Placement
        One per dimension of the mesh.
    ranks : tuple of int
        All ranks of the group, in the row-major order of the mesh.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    placements: tuple[Placement, ...]
    ranks: tuple[int, ...]

    def coordinates(self) -> list[tuple[int, ...]]:
        """Return where each rank of the group is in the mesh."""
        at = dict(zip(self.ranks, product(*map(range, self.sizes)), strict=True))
        return [at[rank] for rank in range(len(at))]

    def boxes(self) -> list[Box]:
        """Return the box of each rank of the group."""
        full = Box.whole(self.shape)
        return [cut_to(full, self.sizes, self.placements, at) for at in self.coordinates()]

    def on_same_mesh(self, other: Sharding) -> bool:
        """Whether both lie on one mesh."""
        return (self.sizes, self.ranks) == (other.sizes, other.ranks)


class Phase(NamedTuple):
    """One exchange of boxes, as one rank sees it.

    Attributes
    ----------
    before, after : Box or None
        What of the whole this rank has before and after; None for nothing.
    sends, receives : tuple of (int, Box)
        Ranks in ascending order, perhaps this one among them, and what goes there or comes from
        there.
    """

    before: Box | None
    after: Box | None
    sends: tuple[tuple[int, Box], ...]
    receives: tuple[tuple[int, Box], ...]


class Redistribution(NamedTuple):
    """What one rank does in [Note: two exchanges].

    Attributes
    ----------
    first : Phase or None
        None where there is nothing to divide.
    op : ReduceOp or None
        How what arrives in the first is combined; None if it comes from one rank.
    second : Phase
        Brings what this rank lacks.
    fill : int or None
        What this rank has everywhere, since another one has the values of a `Partial`.
    """

    first: Phase | None
    op: ReduceOp | None
    second: Phase
    fill: int | None

    @property
    def box(self) -> Box:
        """What this rank has in the end."""
        box = self.second.after
        assert box is not None, "every rank has a box, if an empty one"
        return box


@lru_cache(_KEPT)
def plan_redistribution(
    source: Sharding, target: Sharding, nodes: tuple[int, ...], rank: int
) -> Redistribution:
    """Return what a rank does to have an array in another sharding.

    Parameters
    ----------
    source, target : Sharding
        Of one shape, on the ranks of one group.
    nodes : tuple of int
        The node of each rank.
    rank : int
        The rank.
    """
    pairs = list(zip(source.placements, target.placements, strict=False))
    same = source.on_same_mesh(target)
    partial = [d for d, one in enumerate(source.placements) if isinstance(one, Partial)]
    kept = [d for d in partial if same and pairs[d][0] == pairs[d][1]]
    ending = [d for d in partial if d not in kept]
    coordinates = source.coordinates()
    layers = [tuple(at[d] for d in kept) for at in coordinates]
    held = _present(source.boxes())
    if not ending:
        return _complete(None, None, (held, layers), target, kept, nodes, rank)
    along = {d: to.dim for d, (_, to) in enumerate(pairs) if same and isinstance(to, Shard)}
    pieces = _shares(held, source, ending, along)
    lines = [tuple(i for d, i in enumerate(at) if d not in ending) for at in coordinates]
    mates = [mate for mate, line in enumerate(lines) if line == lines[rank]]
    piece = pieces[rank]
    first = Phase(
        held[rank],
        piece,
        tuple((mate, box) for mate in mates if (box := pieces[mate]) is not None),
        () if piece is None else tuple((mate, piece) for mate in mates),
    )
    op = next(one.op for one in source.placements if isinstance(one, Partial))
    return _complete(first, op, (pieces, layers), target, kept, nodes, rank)


@lru_cache(_KEPT)
def plan_distribution(
    target: Sharding, root: int, nodes: tuple[int, ...], rank: int
) -> Redistribution:
    """Return what a rank does to have its part of an array that one rank has.

    Parameters
    ----------
    target : Sharding
        On the ranks of the group.
    root : int
        Who has the array.
    nodes, rank
        As for `plan_redistribution`.
    """
    copied = [d for d, one in enumerate(target.placements) if not isinstance(one, Shard)]
    pieces = _shares(_present(target.boxes()), target, copied, {})
    given = tuple((to, box) for to, box in enumerate(pieces) if box is not None)
    piece = pieces[rank]
    first = Phase(
        Box.whole(target.shape) if rank == root else None,
        piece,
        given if rank == root else (),
        () if piece is None else ((root, piece),),
    )
    return _complete(first, None, (pieces, [()] * len(pieces)), target, (), nodes, rank)


def _present(boxes: Sequence[Box]) -> list[Box | None]:
    """Return boxes, None in place of empty ones."""
    return [None if box.empty else box for box in boxes]


def _shares(
    boxes: Sequence[Box | None], on: Sharding, dims: Sequence[int], along: Mapping[int, int]
) -> list[Box | None]:
    """Cut the boxes that ranks have in common among those along some dimensions of the mesh.

    Parameters
    ----------
    boxes : sequence of Box or None
        Of each rank.
    on : Sharding
        Where the ranks are.
    dims : sequence of int
        Dimensions of the mesh along which ranks have the same box.
    along : mapping of int to int
        For a dimension of the mesh, that of the array which is cut; the longest where it is not
        there.
    """
    shares = []
    for box, at in zip(boxes, on.coordinates(), strict=True):
        share = box
        for d in dims:
            share = _share(share, on.sizes[d], at[d], along.get(d))
        shares.append(share)
    return shares


def _share(box: Box | None, parts: int, number: int, dimension: int | None) -> Box | None:
    """Return one of several parts of a box; None if it is empty."""
    if box is None or not box.sizes:
        return box if number == 0 else None
    if dimension is None:
        dimension = box.sizes.index(max(box.sizes))
    part = box.along(dimension, *even_part(box.sizes[dimension], parts, number))
    return None if part.empty else part


def _complete(
    first: Phase | None,
    op: ReduceOp | None,
    held: tuple[Sequence[Box | None], Sequence[tuple[int, ...]]],
    target: Sharding,
    kept: Sequence[int],
    nodes: tuple[int, ...],
    rank: int,
) -> Redistribution:
    """Add the second exchange, by which each rank gets what it lacks.

    Parameters
    ----------
    first, op : Phase or None, ReduceOp or None
        What comes before.
    held : (sequence of Box or None, sequence of tuple)
        For each rank what it has then, and where it is along the dimensions of `kept`. Boxes of two
        ranks are the same, or have no element in common.
    target : Sharding
        What is wanted.
    kept : sequence of int
        Dimensions of the mesh along which arrays stay partial: their ranks give each other nothing.
    nodes, rank
        As for `plan_redistribution`.
    """
    has = list(zip(*held, strict=True))
    holders: dict[tuple[Box | None, tuple[int, ...]], list[int]] = {}
    for holder, held_there in enumerate(has):
        holders.setdefault(held_there, []).append(holder)
    coordinates, wanted = target.coordinates(), target.boxes()

    def nearest(to: int, what: tuple[Box | None, tuple[int, ...]]) -> int:
        """Return who sends: the rank itself, else one of its node, or of its line of the mesh.

        The latter gives all of them equally much to send.
        """

        def distance(holder: int) -> tuple[bool, int, int]:
            steps = sum(map(ne, coordinates[holder], coordinates[to]))
            return nodes[holder] != nodes[to], steps, (holder - to) % len(nodes)

        return to if has[to] == what else min(holders[what], key=distance)

    own, layer = has[rank]
    receives = [
        (nearest(rank, what), common)
        for what in holders
        if what[0] is not None
        and what[1] == layer
        and (common := what[0].intersect(wanted[rank])) is not None
    ]
    sends = [
        (to, common)
        for to, box in enumerate(wanted)
        if own is not None
        and has[to][1] == layer
        and _fill_at(target, kept, coordinates[to]) is None
        and (common := own.intersect(box)) is not None
        and nearest(to, has[rank]) == rank
    ]
    fill = _fill_at(target, kept, coordinates[rank])
    arriving = () if fill is not None else tuple(sorted(receives, key=lambda pair: pair[0]))
    return Redistribution(first, op, Phase(own, wanted[rank], tuple(sends), arriving), fill)


def _fill_at(target: Sharding, kept: Sequence[int], at: tuple[int, ...]) -> int | None:
    """Return what an array holds that becomes partial here; None where it holds the values."""
    for d, placement in enumerate(target.placements):
        if isinstance(placement, Partial) and d not in kept and at[d] and placement.op in _NEUTRAL:
            return _NEUTRAL[placement.op]
    return None
