"""Messages between two ranks: an envelope of shape and dtype, and the array inside or behind it.

An envelope is little-endian: 4 bytes of magic, the dtype's code, the number of dimensions, 1 if the
array's bytes follow inside the envelope, 1 if the array is the pickle of an object, the number of
the lane in which the bytes follow otherwise (8 bytes), and 8 bytes per dimension.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import DTYPES, as_bytes
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.work import ANY_SOURCE, Message, Steps
from mpidist.errors import CollectiveMismatchError, SizeMismatchError, TransportError

CAPACITY = 4096
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
        """Describe what was sent."""
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
        At most `CAPACITY` bytes.
    inside : bool
        Whether `x` is inside.
    """
    start = _HEAD.size + 8 * x.ndim
    inside = start + x.nbytes <= CAPACITY
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
    if magic != _MAGIC or code >= len(_BY_CODE) or start > CAPACITY:
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


@dataclass(slots=True)
class Receipt:
    """What a receive has learnt.

    Attributes
    ----------
    array : Array
        What was received.
    source : int
        Who sent it; `ANY_SOURCE` while it is unknown.
    """

    array: Array = field(default_factory=lambda: np.empty(0))
    source: int = ANY_SOURCE


def send_steps(
    backend: Backend, x: Array, dst: int, tag: int, number: int, *, is_object: bool
) -> Steps:
    """Send an array: one message if it fits into its envelope, else two.

    Parameters
    ----------
    backend : Backend
        Who moves the bytes.
    x : Array
        Contiguous and of native byte order.
    dst, tag : int
        Whom to, and the tag.
    number : int
        The lane in which it follows its envelope, if it does.
    is_object : bool
        Whether it is the pickle of an object.
    """
    envelope, inside = seal(x, number, is_object=is_object)
    messages = [Message(envelope, dst, backend.lane(Traffic.ENVELOPE, tag))]
    if not inside:
        messages.append(Message(as_bytes(x), dst, backend.lane(Traffic.PAYLOAD, number)))
    yield backend.exchange(messages, [])


def receive_steps(
    backend: Backend,
    receipt: Receipt,
    out: Array | None,
    *,
    src: int,
    tag: int,
    where: str,
    is_object: bool,
) -> Steps:
    """Receive an array, or the pickle of an object.

    Parameters
    ----------
    backend : Backend
        Who moves the bytes.
    receipt : Receipt
        Is told what came.
    out : Array or None
        Where to write it; None takes any shape and dtype, into a fresh array.
    src, tag : int
        Whom from, and the tag.
    where : str
        Who receives, for messages.
    is_object : bool
        Whether the pickle of an object is expected.

    Raises
    ------
    CollectiveMismatchError
        If an object came for an array, or the other way round. It has been received all the same.
    SizeMismatchError
        If it does not fit `out`. It has been received all the same.
    """
    frame = np.empty(CAPACITY, np.uint8)
    arriving = backend.exchange([], [Message(frame, src, backend.lane(Traffic.ENVELOPE, tag))])
    yield arriving
    (receipt.source,) = arriving.wait()
    envelope = open_envelope(frame)
    refusal = _refusal(envelope, receipt.source, out, where=where, is_object=is_object)
    direct = refusal is None and out is not None and out.flags.c_contiguous and out.dtype.isnative
    array = out if direct and out is not None else np.empty(envelope.shape, envelope.dtype)
    if envelope.content is not None:
        as_bytes(array)[...] = envelope.content
    else:
        lane = backend.lane(Traffic.PAYLOAD, envelope.number)
        yield backend.exchange([], [Message(as_bytes(array), receipt.source, lane)])
    # What does not fit has been received all the same: its sender must not hang.
    if refusal is not None:
        raise refusal
    if out is not None and not direct:
        np.copyto(out, array)
    receipt.array = array if out is None else out


def _refusal(
    envelope: Envelope, source: int, out: Array | None, *, where: str, is_object: bool
) -> Exception | None:
    """Return what is wrong with a message for this receive, or None."""
    sent = f"{where}: rank {source} sent {envelope}"
    if envelope.is_object != is_object:
        verb = "recv_object" if envelope.is_object else "recv"
        return CollectiveMismatchError(
            f"{sent}; receive it with {verb}. The message is lost, and the group can still be used"
        )
    if out is None or (
        out.shape == envelope.shape and out.dtype.newbyteorder("=") == envelope.dtype
    ):
        return None
    return SizeMismatchError(
        f"{sent}, out has shape {out.shape} and dtype {out.dtype}; leave out=None to take what "
        "comes"
    )
