"""The first bytes of every point-to-point message: shape and dtype, and short arrays themselves.

An envelope is little-endian: 4 bytes of magic, the dtype's code, the number of dimensions, 1 if the
array's bytes follow inside the envelope, 1 if the array is the pickle of an object, the number of
the lane in which the bytes follow otherwise (8 bytes), and 8 bytes per dimension.
"""

from __future__ import annotations

import struct
from math import prod
from typing import NamedTuple

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import DTYPES, as_bytes
from mpidist.errors import TransportError

__all__ = ["ROOM", "Envelope", "open_envelope", "seal"]

ROOM = 4096
"""Bytes that a receiver provides for an envelope; an array that fits travels inside."""

_HEAD = struct.Struct("<4sBB??Q")
_MAGIC = b"MpD2"
_BY_CODE: tuple[DType, ...] = tuple(sorted(DTYPES, key=lambda dtype: dtype.name))
_CODES = {dtype: code for code, dtype in enumerate(_BY_CODE)}


class Envelope(NamedTuple):
    """What an envelope says.

    Attributes
    ----------
    shape : tuple of int
        Of the array.
    dtype : dtype
        Of the array.
    number : int
        The lane in which the array follows, if it does.
    is_object : bool
        Whether it is the pickle of an object.
    content : Array or None
        The array's bytes; None where they follow.
    """

    shape: tuple[int, ...]
    dtype: DType
    number: int
    is_object: bool
    content: Array | None

    def __str__(self) -> str:
        """Return words for what was sent."""
        if self.is_object:
            return "an object"
        return f"an array of shape {self.shape} and dtype {self.dtype}"

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * self.dtype.itemsize


def seal(x: Array, number: int, *, is_object: bool = False) -> tuple[Array, bool]:
    """Write an envelope.

    Parameters
    ----------
    x : Array
        Contiguous and of native byte order.
    number : int
        The lane in which it will follow if it does not fit.
    is_object : bool, optional
        Whether it is the pickle of an object.

    Returns
    -------
    envelope : Array, uint8
        At most `ROOM` bytes.
    inside : bool
        Whether `x` is inside.
    """
    start = _HEAD.size + 8 * x.ndim
    inside = start + x.nbytes <= ROOM
    frame = np.empty(start + x.nbytes if inside else start, np.uint8)
    _HEAD.pack_into(frame.data, 0, _MAGIC, _CODES[x.dtype], x.ndim, inside, is_object, number)
    frame[_HEAD.size : start].view("<i8")[:] = x.shape
    if inside:
        frame[start:] = as_bytes(x)
    return frame, inside


def open_envelope(frame: Array) -> Envelope:
    """Read an envelope; its content shares the memory of `frame`."""
    magic, code, ndim, inside, is_object, number = _HEAD.unpack_from(frame.data)
    start = _HEAD.size + 8 * ndim
    if magic != _MAGIC or code >= len(_BY_CODE) or start > ROOM:
        raise TransportError(
            "recv: a message arrived that no mpidist send has written; other code must not use "
            "this group's communicator for messages of its own",
            code=0,
        )
    shape = tuple(frame[_HEAD.size : start].view("<i8").tolist())
    envelope = Envelope(shape, _BY_CODE[code], number, is_object, None)
    if not inside:
        return envelope
    return envelope._replace(content=frame[start : start + envelope.nbytes])
