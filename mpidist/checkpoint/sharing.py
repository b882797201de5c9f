"""Who reads what on a node, so that each byte comes from the disk once.

The ranks of a node divide what any of them needs, in the order of the files. In each round a rank
reads one batch into its own slot of memory that all of them see, and verifies it; they meet; then
each copies what it needs out of all slots. There are two sets of slots, used in turn: when a rank
has passed the meeting of a round, all have copied what the round before brought.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from mpidist._types import MAX, Array
from mpidist.checkpoint.reading import UNIT, Unit, Wanted
from mpidist.collectives import all_gather, all_gather_object, all_reduce
from mpidist.group import ProcessGroup

__all__ = ["Alone", "Node", "Readers", "batches", "readers_of", "room"]

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
    def union(self, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
        """Return what any of them wants; the same on all."""

    @abstractmethod
    def slot(self, rank: int, turn: int) -> Array:
        """Return the memory, shape (SLOT,) uint8, into which a rank reads in some rounds."""

    @abstractmethod
    def meet(self, *, failed: bool) -> bool:
        """Return, when all have come, whether any has failed."""


class Alone(Readers):
    """A rank that reads for itself."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._slot = np.empty(SLOT, np.uint8)

    def union(self, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
        """Return what this rank wants."""
        return wanted

    def slot(self, rank: int, turn: int) -> Array:
        """Return the one that there is: nobody else reads from it."""
        return self._slot

    def meet(self, *, failed: bool) -> bool:
        """Return whether this one has failed."""
        return failed


class Node(Readers):
    """The ranks of a node, which share memory.

    Parameters
    ----------
    group : ProcessGroup
        Of one node.
    slots : Array, shape (2, group.size, SLOT) uint8
        That all of them see.
    """

    def __init__(self, group: ProcessGroup, slots: Array) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group
        self._slots = slots

    def union(self, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
        """Return what any of them wants."""
        mine = np.frombuffer(xxhash.xxh3_128_digest(repr(wanted).encode()), np.uint8)
        if (all_gather(mine, self._group).reshape(self.size, -1) == mine).all():
            return wanted  # most often, and shorter to say
        lists = all_gather_object(wanted, self._group)
        return list(dict.fromkeys(want for some in lists for want in some))

    def slot(self, rank: int, turn: int) -> Array:
        """Return a rank's slot."""
        return self._slots[turn % 2, rank]  # type: ignore[no-any-return]

    def meet(self, *, failed: bool) -> bool:
        """Return whether any of them has failed; one small all_reduce."""
        return bool(all_reduce(np.array(failed, np.int32), self._group, op=MAX))


def readers_of(group: ProcessGroup) -> Readers:
    """Return who reads together with this rank; collective over the group."""
    node = group.node_group()
    if node.size == 1:
        return Alone()
    slots = node.shared((2, node.size, SLOT), np.uint8)
    return Alone() if slots is None else Node(node, slots)


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
