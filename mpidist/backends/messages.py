"""One message between two ranks: its envelope, and the array inside or behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpidist._types import Array
from mpidist.arrays import as_bytes
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.work import ANY_SOURCE, Message, Steps
from mpidist.envelope import ROOM, open_envelope, seal
from mpidist.errors import SizeMismatchError

__all__ = ["Receipt", "receive_steps", "send_steps"]


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


def send_steps(backend: Backend, x: Array, dst: int, tag: int, number: int) -> Steps:
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
    """
    envelope, inside = seal(x, number)
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
) -> Steps:
    """Receive an array.

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

    Raises
    ------
    SizeMismatchError
        If it does not fit `out`. It has been received all the same.
    """
    frame = np.empty(ROOM, np.uint8)
    arriving = backend.exchange([], [Message(frame, src, backend.lane(Traffic.ENVELOPE, tag))])
    yield arriving
    (receipt.source,) = arriving.wait()
    envelope = open_envelope(frame)
    fits = out is None or (
        out.shape == envelope.shape and out.dtype.newbyteorder("=") == envelope.dtype
    )
    direct = out is not None and fits and out.flags.c_contiguous and out.dtype.isnative
    array = out if direct and out is not None else np.empty(envelope.shape, envelope.dtype)
    if envelope.content is not None:
        as_bytes(array)[...] = envelope.content
    else:
        lane = backend.lane(Traffic.PAYLOAD, envelope.number)
        yield backend.exchange([], [Message(as_bytes(array), receipt.source, lane)])
    # An array that does not fit has been received all the same: its sender must not hang.
    if not fits and out is not None:
        raise SizeMismatchError(
            f"{where}: rank {receipt.source} sent an array of shape {envelope.shape} and dtype "
            f"{envelope.dtype}, out has shape {out.shape} and dtype {out.dtype}; leave out=None to "
            "take what comes"
        )
    if out is not None and not direct:
        np.copyto(out, array)
    receipt.array = array if out is None else out
