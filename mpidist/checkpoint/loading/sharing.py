"""Who reads what on a node, so that each byte comes from the disk once.

What only one rank of a node needs, it reads into its own arrays. What several need they divide, in
the order of the files. In each round a rank reads one batch into its own slot of memory that all of
them see, and verifies it; they meet; then each copies what it needs out of all slots. There are two
sets of slots, used in turn: when a rank has passed the meeting of a round, all have copied what the
round before brought.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from mpidist._types import MAX, Array
from mpidist.checkpoint.format.manifest import box_of
from mpidist.checkpoint.loading.units import UNIT, Unit, Wanted
from mpidist.collectives import all_gather, all_gather_object, all_reduce
from mpidist.group import ProcessGroup

__all__ = ["SLOT", "Alone", "Node", "Readers", "batches", "readers_of", "room"]

SLOT = 2 * UNIT
"""Bytes of a rank's slot."""


class Readers(ABC):
    """The ranks that read together.

    Attributes
    ----------
    rank, size : int
        This one among them, and their number.
    """

    rank: int
    size: int

    @abstractmethod
    def wants(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[Wanted]]:
        """Return what each of them wants; the same on all."""

    @abstractmethod
    def slots(self) -> Array | None:
        """Return memory that all of them see, or None if there is none: on all or on none.

        Returns
        -------
        Array, shape (2, size, SLOT) uint8, or None
            For each rank two places, used in turn.
        """

    @abstractmethod
    def meet(self, *, failed: bool) -> bool:
        """Return, when all have come, whether any has failed."""


class Alone(Readers):
    """A rank that reads for itself."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def wants(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[Wanted]]:
        """Return what this rank wants."""
        return [wanted]

    def slots(self) -> None:
        """Return that there is nobody to share with."""

    def meet(self, *, failed: bool) -> bool:
        """Return whether this one has failed."""
        return failed


class Node(Readers):
    """The ranks of a node, which share memory.

    Parameters
    ----------
    group : ProcessGroup
        Of one node.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group

    def wants(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[Wanted]]:
        """Return what each of them wants; two all_gathers at most."""
        mine = np.frombuffer(xxhash.xxh3_128_digest(repr(wanted).encode()), np.uint8)
        if (all_gather(mine, self._group).reshape(self.size, -1) == mine).all():
            return [wanted] * self.size  # most often, and shorter to say
        told = [(name, box.offsets, box.sizes) for name, box in wanted]  # shorter than boxes
        return [
            [Wanted(name, box_of(offsets, sizes)) for name, offsets, sizes in some]
            for some in all_gather_object(told, self._group)
        ]

    def slots(self) -> Array | None:
        """Return memory of the node; collective over its ranks."""
        return self._group.shared((2, self.size, SLOT), np.uint8)

    def meet(self, *, failed: bool) -> bool:
        """Return whether any of them has failed; one small all_reduce."""
        return bool(all_reduce(np.array(failed, np.int32), self._group, op=MAX))


def readers_of(group: ProcessGroup) -> Readers:
    """Return who reads together with this rank; collective over the group when first called."""
    node = group.node_group()
    return Alone() if node.size == 1 else Node(node)


def batches(units: Sequence[Unit], size: int) -> list[list[list[Unit]]]:
    """Divide units among readers, and into what each reads at once.

    Parameters
    ----------
    units : sequence of Unit
        In the order of the files.
    size : int
        Number of readers.

    Returns
    -------
    list of list of list of Unit
        For each reader its batches, each of at most `SLOT` bytes. Readers have equal shares of the
        bytes, as nearly as units allow.
    """
    total = sum(unit.nbytes for unit in units)
    shares: list[list[Unit]] = [[] for _ in range(size)]
    before = 0
    for unit in units:
        shares[min(before * size // max(total, 1), size - 1)].append(unit)
        before += unit.nbytes
    return [list(_batched(share)) for share in shares]


def _batched(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    filled = 0
    for unit in units:
        if batch and filled + room(unit) > SLOT:
            yield batch
            batch, filled = [], 0
        batch.append(unit)
        filled += room(unit)
    if batch:
        yield batch


def room(unit: Unit) -> int:
    """Return the bytes that a unit takes in a slot; each begins where any dtype may."""
    return -(-unit.nbytes // 16) * 16
