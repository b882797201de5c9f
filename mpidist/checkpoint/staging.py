"""Memory into which a state is copied, so that the program may go on while it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mpidist._types import Array
from mpidist.arrays import to_host
from mpidist.checkpoint.plan import Part
from mpidist.checkpoint.writing import Piece

__all__ = ["Staging"]

_ALIGNMENT = 64


class Staging:
    """Blocks of memory that are used again: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._free: list[Array] = []
        self._used: dict[int, Array] = {}

    def copy(self, parts: Mapping[Part, Array]) -> list[Piece]:
        """Copy parts of arrays, from the host or a device.

        Returns
        -------
        list of Piece
            To be given to `release` once they are written.
        """
        need = sum(_round_up(data.nbytes) for data in parts.values())
        block = self._take(need)
        pieces, place = [], 0
        for part, data in parts.items():
            memory = block[place : place + data.nbytes].view(data.dtype).reshape(data.shape)
            to_host(data, out=memory)
            pieces.append(Piece(part.name, part.box, memory))
            place += _round_up(data.nbytes)
        self._used[id(pieces)] = block
        return pieces

    def release(self, pieces: Sequence[Piece]) -> None:
        """Let memory be used for the next copy."""
        self._free.append(self._used.pop(id(pieces)))

    def _take(self, need: int) -> Array:
        """Return a block of at least so many bytes; one that is too small is given back."""
        while self._free:
            block = self._free.pop()
            if block.size >= need:
                return block
        return np.empty(need, np.uint8)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
