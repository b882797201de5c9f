"""Registered memory: arrays whose counterparts on the other ranks can be read and written."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpidist._types import Array, DType

__all__ = ["Block", "RegisteredArray", "Registry"]

_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Memory with one part per rank, all of which this rank can read and write.

    Attributes
    ----------
    number : int
        The same on all ranks: how many blocks their group has made, this one included.
    parts : tuple of Array, uint8
        One per rank, of the same size.
    address : int
        Address of this rank's part in this process.
    """

    number: int
    parts: tuple[Array, ...]
    address: int

    @staticmethod
    def stride(nbytes: int) -> int:
        """Return the distance between two parts: whole pages, at least one."""
        return max(-(-nbytes // _PAGE), 1) * _PAGE


class RegisteredArray:
    """An array in a block: at the same offset in every rank's part.

    Parameters
    ----------
    block : Block
        The memory.
    offset : int
        Bytes from the beginning of a part.
    dtype : dtype
        Of its elements.
    count : int
        Their number.

    Attributes
    ----------
    arrays : list of Array
        The array of every rank.
    prepared : dict
        What a sum or a collective has prepared for these arrays, kept for the next call.
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
        self._known: dict[int, tuple[weakref.ref[Array], RegisteredArray]] = {}
        self._made = 0

    def add(self, parts: Sequence[Any], rank: int, nbytes: int) -> Array:
        """Register memory, and return this rank's part of it.

        Parameters
        ----------
        parts : sequence of buffer
            Writable memory of each rank, of the same size.
        rank : int
            This rank among those of the node.
        nbytes : int
            Size of the array to return.

        Returns
        -------
        Array, shape (nbytes,), uint8
            Every view of it is found by `find`.
        """
        self._made += 1
        # numpy gives all views of an array made from a buffer that array as their base.
        root: Array = np.frombuffer(parts[rank], np.uint8, nbytes)
        views = tuple(np.frombuffer(part, np.uint8) for part in parts)
        self._blocks[id(root)] = Block(self._made, views, root.ctypes.data)
        weakref.finalize(root, self._blocks.pop, id(root), None)
        return root[:]

    def find(self, x: Array) -> RegisteredArray | None:
        """Return the registered array at which a flat array lies, or None."""
        known = self._known.get(id(x))
        if known is not None:
            reference, array = known
            # Another array may have got the address of one that is gone, and an array's dtype
            # can be changed in place.
            if reference() is x and array.count == x.size and array.dtype == x.dtype:
                return array
        block = self._blocks.get(id(x.base))
        if block is None:
            return None
        array = RegisteredArray(block, x.ctypes.data - block.address, x.dtype, x.size)
        key, arrays = id(x), self._known
        arrays[key] = (weakref.ref(x, lambda _: arrays.pop(key, None)), array)
        return array
