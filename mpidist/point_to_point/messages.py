"""One message between two ranks: its envelope, and the array inside or behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import as_bytes
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.work import ANY_SOURCE, Message, Steps
from mpidist.errors import CollectiveMismatchError, SizeMismatchError
from mpidist.point_to_point.envelope import ROOM, Envelope, open_envelope, seal

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
    frame = np.empty(ROOM, np.uint8)
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
