"""Registered memory: arrays whose counterparts on the other ranks can be read and written."""

from __future__ import annotations

import weakref
from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import round_up

__all__ = ["Block", "RegisteredArray", "Registry"]

_PAGE = 4096

_KEPT = 256
"""Arrays of a block for which something is kept prepared."""


@dataclass(frozen=True, slots=True)
class Block:
    """Memory with one part per rank of the node, all of which this rank can read and write.

    Attributes
    ----------
    number : int
        The same on all ranks: how many blocks their group has made, this one included.
    parts : tuple of Array, uint8
        One per rank, of the same size.
    arrays : dict of (int, dtype, int) to RegisteredArray
        The arrays used so far, by offset in bytes, dtype and number of elements.
    """

    number: int
    parts: tuple[Array, ...]
    arrays: dict[tuple[int, DType, int], RegisteredArray] = field(default_factory=dict)

    @staticmethod
    def stride(nbytes: int) -> int:
        """Return the distance between two parts: whole pages, at least one."""
        return round_up(max(nbytes, 1), _PAGE)

    def array(self, offset: int, dtype: DType, count: int) -> RegisteredArray:
        """Return an array in this block; the same object for the same memory."""
        key = (offset, dtype, count)
        array = self.arrays.get(key)
        if array is None:
            if len(self.arrays) >= _KEPT:
                self.arrays.clear()
            array = self.arrays[key] = RegisteredArray(self, offset, dtype, count)
        return array


class RegisteredArray:
    """An array in a block: at the same offset in every rank's part.

    Parameters
    ----------
    block : Block
        The memory; not kept, since it keeps its arrays.
    offset : int
        Bytes from the beginning of a part.
    dtype : dtype
        Of its elements.
    count : int
        Their number.

    Attributes
    ----------
    block_number : int
        The number of the block.
    arrays : list of Array
        The array of every rank.
    prepared : dict
        What a sum or a collective has prepared for these arrays, kept for the next call.
    """

    __slots__ = ("arrays", "block_number", "count", "dtype", "offset", "prepared")

    def __init__(self, block: Block, offset: int, dtype: DType, count: int) -> None:
        self.block_number = block.number
        self.offset = offset
        self.dtype = dtype
        self.count = count
        stop = offset + count * dtype.itemsize
        self.arrays: list[Array] = [part[offset:stop].view(dtype) for part in block.parts]
        self.prepared: dict[Any, Any] = {}


class _Range(NamedTuple):
    """Addresses of this process at which a block lies; a block may be mapped several times.

    Attributes
    ----------
    start, stop : int
        The first address, and the one behind the last.
    offset : int
        Bytes from the beginning of the part to the first address.
    number : int
        The number of the block.
    """

    start: int
    stop: int
    offset: int
    number: int


class Registry:
    """The blocks of one group, found by the addresses of arrays.

    A block that `add` made lives as long as the last array in this rank's part; one that `adopt`
    registered, until `remove`.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._ranges: list[_Range] = []
        self._cache: dict[int, tuple[weakref.ref[Array], RegisteredArray]] = {}
        self._made = 0

    def add(self, parts: Sequence[Any], rank: int, nbytes: int) -> Array:
        """Register memory that is not in use yet, and return this rank's part of it.

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
            Every array in this memory is found by `find`.
        """
        # numpy gives all views of an array made from a buffer that array as their base.
        root: Array = np.frombuffer(parts[rank], np.uint8, nbytes)
        number = self.adopt(parts, [(root.ctypes.data, 0, root.nbytes)])
        weakref.finalize(root, self.remove, number)
        return root[:]

    def adopt(self, parts: Sequence[Any], mappings: Sequence[tuple[int, int, int]]) -> int:
        """Register memory that lives on its own, until `remove`.

        Parameters
        ----------
        parts : sequence of buffer
            Writable memory of each rank, of the same size.
        mappings : sequence of (int, int, int)
            Where this rank's part lies in this process: address, offset in the part, bytes.

        Returns
        -------
        int
            The number of the block.
        """
        self._made = number = self._made + 1
        views = tuple(np.frombuffer(part, np.uint8) for part in parts)
        self._blocks[number] = Block(number, views)
        for address, offset, nbytes in mappings:
            # Made first: the garbage collector may call `remove` meanwhile, for a new list.
            entry = _Range(address, address + nbytes, offset, number)
            insort(self._ranges, entry)
        return number

    def remove(self, number: int) -> None:
        """Forget a block; its memory goes when nothing else refers to it."""
        self._blocks.pop(number, None)
        self._ranges = [entry for entry in self._ranges if entry.number != number]
        for key, (_, array) in tuple(self._cache.items()):
            if array.block_number == number:
                self._cache.pop(key, None)

    def find(self, x: Array) -> RegisteredArray | None:
        """Return the registered array at which a flat array lies, or None."""
        known = self._cache.get(id(x))
        if known is not None:
            reference, array = known
            # Another array may have got the identity of one that is gone, and an array's dtype
            # can be changed in place.
            if reference() is x and array.count == x.size and array.dtype == x.dtype:
                return array
        # Asking for the address takes a microsecond. Most arrays, or those of which they are views,
        # own their memory, and so are in no block.
        base = x.base
        if base is None or not self._ranges or (type(base) is np.ndarray and base.base is None):
            return None
        where = self._where(x.ctypes.data, x.nbytes)
        if where is None:
            return None
        number, offset = where
        array = self._blocks[number].array(offset, x.dtype, x.size)
        key, cache = id(x), self._cache
        cache[key] = (weakref.ref(x, lambda _: cache.pop(key, None)), array)
        return array

    def block_of(self, x: Array) -> int | None:
        """Return the number of the block in which a flat array lies, or None."""
        where = self._where(x.ctypes.data, x.nbytes)
        return None if where is None else where[0]

    def _where(self, address: int, nbytes: int) -> tuple[int, int] | None:
        """Return the block with these addresses, and the offset in its part."""
        ranges = self._ranges
        index = bisect_right(ranges, address, key=lambda entry: entry.start) - 1
        if index < 0 or address + nbytes > ranges[index].stop:
            return None
        entry = ranges[index]
        return entry.number, entry.offset + address - entry.start
