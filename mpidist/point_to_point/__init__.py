"""Messages between two ranks, each verb blocking and immediate.

Every message begins with an envelope that says shape and dtype, and whether it is an object
(`mpidist.point_to_point._messages`), so that a receiver need not know the shape, and one that
expects something else gets an error instead of wrong numbers. A short array travels inside its
envelope, as one message; a longer one follows its envelope in a lane of its own, numbered by its
sender.

Messages of device arrays have no envelopes: both sides pass a device array of the same size, and
messages between two ranks match in the order in which they are sent. The sends and receives of one
`exchange` or `sendrecv` are performed at once. Those of single calls follow each other on one
stream: where each of two ranks sends before it receives, only `exchange` and `sendrecv` are safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace, is_device
from mpidist.backends.work import ANY_SOURCE, Work
from mpidist.collectives._objects import pickled, unpickled
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout
from mpidist.point_to_point._messages import (
    Receive,
    ReceiveWork,
    Send,
    prepare_receive,
    prepare_send,
    start_exchange,
)

__all__ = [
    "ANY_SOURCE",
    "Receive",
    "ReceiveWork",
    "Send",
    "exchange",
    "irecv",
    "isend",
    "recv",
    "recv_object",
    "send",
    "send_object",
    "sendrecv",
]


def isend(
    x: Array, group: ProcessGroup, *, dst: int, tag: int = 0, timeout: Timeout = None
) -> Work[None]:
    """Start a `send`; `x` belongs to it until the Work is complete."""
    return prepare_send(Send(x, dst, tag), group, timeout)()


def send(x: Array, group: ProcessGroup, *, dst: int, tag: int = 0, timeout: Timeout = None) -> None:
    """Send an array to one rank.

    Parameters
    ----------
    x : Array, any shape and dtype
        What is sent.
    group : ProcessGroup
        The group of which `dst` is a rank.
    dst : int
        The rank that receives it.
    tag : int, optional
        Only a receive with the same tag takes it.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Raises
    ------
    InvalidRankError, SelfSendError
        If `dst` is not another rank of the group.
    CollectiveTimeoutError
        If the message cannot be delivered within the group's timeout.

    Notes
    -----
    Blocks until `x` may be changed, which may be before, or only when, the receive begins. One
    message up to about 4 KiB, two above.
    """
    isend(x, group, dst=dst, tag=tag, timeout=timeout).wait()


def irecv(
    group: ProcessGroup,
    *,
    src: int,
    tag: int = 0,
    out: Array | None = None,
    timeout: Timeout = None,
) -> ReceiveWork:
    """Start a `recv`; `out` belongs to it until the Work is complete.

    The Work's `source` says who sent the message.
    """
    return prepare_receive(Receive(src, tag, out), group, timeout)()


def recv(
    group: ProcessGroup,
    *,
    src: int,
    tag: int = 0,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array:
    """Receive an array from one rank.

    Parameters
    ----------
    group : ProcessGroup
        The group of which `src` is a rank.
    src : int
        The rank that sends it; `ANY_SOURCE` takes the next message of any rank.
    tag : int, optional
        Only a message with the same tag is taken.
    out : Array, optional
        Where to write it; its shape and dtype must be those of the message. Without it any shape
        is taken, into a fresh array.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array
        The message; `out` itself when given.

    Raises
    ------
    InvalidRankError, SelfSendError
        If `src` is not another rank of the group.
    SizeMismatchError
        If the message does not fit `out`. The message is lost then, and the group stays usable.
    CollectiveMismatchError
        If an object comes, which only `recv_object` takes. It is lost then, too.
    CollectiveTimeoutError
        If no message comes within the group's timeout.

    Notes
    -----
    Blocks. Messages from one rank with one tag are received in the order in which they were sent.
    """
    return irecv(group, src=src, tag=tag, out=out, timeout=timeout).wait()


def sendrecv(
    x: Array,
    group: ProcessGroup,
    *,
    dst: int,
    src: int,
    tag: int = 0,
    out: Array | None = None,
    timeout: Timeout = None,
) -> Array:
    """Send to one rank and receive from one at the same time.

    Parameters
    ----------
    x : Array, any shape and dtype
        What is sent.
    group : ProcessGroup
        The group of which `dst` and `src` are ranks.
    dst, src : int
        The rank that receives, and the one that sends; they may be the same.
    tag : int, optional
        The tag of both messages.
    out : Array, optional
        Where to write what is received. When omitted, a host array of any shape is taken, and a
        device array like `x`.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Array
        What was received; `out` itself when given.

    Raises
    ------
    InvalidRankError, SelfSendError, SizeMismatchError, CollectiveTimeoutError
        As `send` and `recv`.

    Notes
    -----
    Blocks, and cannot deadlock in a ring as a `send` before a `recv` may.
    """
    if out is None and is_device(x):
        out = array_namespace(x).empty_like(x)
    (received,) = exchange(
        group, sends=[Send(x, dst, tag)], receives=[Receive(src, tag, out)], timeout=timeout
    ).wait()
    return received


def exchange(
    group: ProcessGroup,
    *,
    sends: Sequence[Send],
    receives: Sequence[Receive],
    timeout: Timeout = None,
) -> Work[list[Array]]:
    """Start several sends and receives at once.

    Parameters
    ----------
    group : ProcessGroup
        The group of all sources and destinations.
    sends : sequence of Send
        What is sent.
    receives : sequence of Receive
        What is received.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    Work of list of Array
        One array per receive, in their order.

    Raises
    ------
    InvalidRankError, SelfSendError, UnsupportedOperationError
        As `send` and `recv`.

    Notes
    -----
    Immediate. Any set of messages is free of deadlock if each send has a receive.
    """
    return start_exchange(group, sends, receives, timeout)


def send_object(
    obj: Any, group: ProcessGroup, *, dst: int, tag: int = 0, timeout: Timeout = None
) -> None:
    """Send any object that can be pickled to one rank; see `send`.

    Parameters
    ----------
    obj : object
        What is sent.
    group : ProcessGroup
        The group of which `dst` is a rank.
    dst : int
        The rank that receives it.
    tag : int, optional
        Only a receive with the same tag takes it.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Raises
    ------
    UnsupportedOperationError
        If the object cannot be pickled; nothing has been sent then.
    InvalidRankError, SelfSendError, CollectiveTimeoutError
        As `send`.
    """
    message = Send(pickled(obj, "send_object", group), dst, tag)
    prepare_send(message, group, timeout, is_object=True)().wait()


def recv_object(group: ProcessGroup, *, src: int, tag: int = 0, timeout: Timeout = None) -> Any:
    """Receive an object that `send_object` sent; see `recv`.

    Parameters
    ----------
    group : ProcessGroup
        The group of which `src` is a rank.
    src : int
        The rank that sends it; `ANY_SOURCE` takes the next message of any rank.
    tag : int, optional
        Only a message with the same tag is taken.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.

    Returns
    -------
    object
        A copy.

    Raises
    ------
    CollectiveMismatchError
        If an array comes: its bytes are not unpickled. The message is lost then, and the group
        stays usable.
    UnsupportedOperationError
        If the object cannot be unpickled here. The group stays usable.
    InvalidRankError, SelfSendError, CollectiveTimeoutError
        As `recv`.
    """
    work = prepare_receive(Receive(src, tag), group, timeout, is_object=True)()
    data = work.wait()
    return unpickled(data, work.source, "recv_object", group)
