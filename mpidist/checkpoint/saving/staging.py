"""Memory into which a state is copied, so that the program may go on while it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import is_host, pinned_empty, to_host
from mpidist.checkpoint.saving.plan import Part
from mpidist.checkpoint.saving.writing import Piece

__all__ = ["Staging"]

_ALIGNMENT = 64


class Staging:
    """Blocks of memory that are used again: fresh pages cost more than the copy into them.

    What comes from the host goes into ordinary memory, what comes from a device into pinned memory,
    which a device writes without the help of a processor.
    """

    def __init__(self) -> None:
        self._ordinary = _Blocks(lambda nbytes: np.empty(nbytes, np.uint8))
        self._pinned = _Blocks(pinned_empty)
        self._used: dict[int, list[tuple[_Blocks, Array]]] = {}

    def copy(self, parts: Sequence[tuple[Part, Array]]) -> list[Piece]:
        """Copy parts of arrays, from the host or a device.

        Returns
        -------
        list of Piece
            To be given to `release` once they are written.
        """
        pieces: list[Piece] = []
        taken = []
        for blocks, here in ((self._ordinary, True), (self._pinned, False)):
            some = [(part, data) for part, data in parts if is_host(data) == here]
            if some:
                block = blocks.take(sum(_round_up(data.nbytes) for _, data in some))
                taken.append((blocks, block))
                pieces += _copied(some, block)
        self._used[id(pieces)] = taken
        return pieces

    def release(self, pieces: Sequence[Piece]) -> None:
        """Let memory be used for the next copy."""
        for blocks, block in self._used.pop(id(pieces)):
            blocks.free.append(block)


class _Blocks:
    """Blocks of one kind of memory.

    Parameters
    ----------
    make : callable
        Takes a number of bytes and returns an array of them.
    """

    def __init__(self, make: Callable[[int], Array]) -> None:
        self.free: list[Array] = []
        self._make = make

    def take(self, need: int) -> Array:
        """Return a block of at least so many bytes; one that is too small is given back."""
        while self.free:
            block = self.free.pop()
            if block.size >= need:
                return block
        return self._make(need)


def _copied(parts: Sequence[tuple[Part, Array]], block: Array) -> list[Piece]:
    pieces, place = [], 0
    for part, data in parts:
        memory: Array = np.ndarray(data.shape, data.dtype, block, place)
        pieces.append(Piece(part.name, part.box, to_host(data, out=memory)))
        place += _round_up(data.nbytes)
    return pieces


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
