"""Registered memory: arrays whose counterparts on the other ranks can be read and written."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidist._types import Array, DType

__all__ = ["Block", "Place", "Registry"]

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Memory with one part per rank, all of which this rank can read and write.

    Attributes
    ----------
    number : int
        The same on all ranks: how many blocks their group had made.
    parts : tuple of Array, uint8
        One per rank, of the same size.
    address : int
        Of this rank's part.
    """

    number: int
    parts: tuple[Array, ...]
    address: int

    @staticmethod
    def stride(nbytes: int) -> int:
        """Return the distance between two parts: whole pages, at least one."""
        return max(-(-nbytes // _PAGE), 1) * _PAGE


class Place:
    """Where an array lies in a block: the same place in every rank's part.

    Parameters
    ----------
    block : Block
        The memory.
    offset : int
        Bytes from the beginning of a part.
    dtype : dtype
        Of the elements.
    count : int
        Number of elements.

    Attributes
    ----------
    arrays : list of Array
        The array of every rank.
    prepared : dict
        What those who work on these arrays want to keep for the next time.
    """

    __slots__ = ("arrays", "block", "count", "dtype", "offset", "prepared")

    def __init__(self, block: Block, offset: int, dtype: DType, count: int) -> None:
        self.block = block
        self.offset = offset
        self.dtype = dtype
        self.count = count
        stop = offset + count * dtype.itemsize
        self.arrays: list[Array] = [part[offset:stop].view(dtype) for part in block.parts]
        self.prepared: dict[Any, Any] = {}


class Registry:
    """The blocks of one group, found by the arrays that lie in them.

    A block lives as long as the last array in this rank's part: the registry forgets it then.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._places: dict[int, tuple[weakref.ref[Array], Place]] = {}
        self._made = 0

    def add(self, parts: Sequence[Any], rank: int, nbytes: int) -> Array:
        """Register memory, and return this rank's part of it.

        Parameters
        ----------
        parts : sequence of buffer
            Writable memory of each rank, of the same size.
        rank : int
            This rank.
        nbytes : int
            Size of the array to return.

        Returns
        -------
        Array, shape (nbytes,), uint8
            Every view of it is found by `place`.
        """
        self._made += 1
        # numpy gives all views of an array made from a buffer that array as their base.
        root: Array = np.frombuffer(parts[rank], np.uint8, nbytes)
        views = tuple(np.frombuffer(part, np.uint8) for part in parts)
        self._blocks[id(root)] = Block(self._made, views, root.ctypes.data)
        weakref.finalize(root, self._blocks.pop, id(root), None)
        return root[:]

    def place(self, x: Array) -> Place | None:
        """Return where a flat array lies, if it is registered."""
        known = self._places.get(id(x))
        if known is not None:
            array, place = known
            # Another array may have got the address of one that is gone, and an array's dtype
            # can be changed in place.
            if array() is x and place.count == x.size and place.dtype == x.dtype:
                return place
        block = self._blocks.get(id(x.base))
        if block is None:
            return None
        place = Place(block, x.ctypes.data - block.address, x.dtype, x.size)
        key, places = id(x), self._places
        places[key] = (weakref.ref(x, lambda _: places.pop(key, None)), place)
        return place
