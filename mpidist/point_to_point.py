"""Messages between two ranks, each verb blocking and immediate.

Every message begins with an envelope that says shape and dtype (`mpidist.envelope`), so that a
receiver may be of unknown shape, and one that expects something else gets an error instead of
wrong numbers. A short array travels inside its envelope, as one message; a longer one follows its
envelope in a lane of its own, numbered by its sender.

Messages of device arrays have no envelopes: both sides pass a device array of the same size, and
messages between two ranks match in the order in which they are sent. The sends and receives of one
`exchange` or `sendrecv` are performed at once. Those of single calls follow each other on one
stream: where each of two ranks sends before it receives, only `exchange` and `sendrecv` are safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from mpidist._types import Array
from mpidist.arrays import array_namespace, as_native, is_device
from mpidist.backends.messages import Receipt, receive_steps, send_steps
from mpidist.backends.work import ANY_SOURCE, Message, Work
from mpidist.collectives._checks import (
    check_array,
    check_rank,
    check_writable,
    flat_source,
    land,
    nothing,
)
from mpidist.collectives._objects import pickled, unpickled
from mpidist.errors import SelfSendError, UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.pending import Peers

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


class ReceiveWork(Work[Array]):
    """A receive under way; see `Work`."""

    def __init__(self, work: Work[Array], receipt: Receipt) -> None:
        self._work = work
        self._receipt = receipt

    @property
    def source(self) -> int:
        """The rank that sent the message; `ANY_SOURCE` while it is unknown."""
        return self._receipt.source

    def done(self) -> bool:
        """Make progress, and return whether the message is there."""
        return self._work.done()

    def wait(self, timeout: float | None = None) -> Array:
        """Wait for the message."""
        return self._work.wait(timeout)

    def synchronize(self, timeout: float | None = None) -> Array:
        """Block the host until the message is there."""
        return self._work.synchronize(timeout)


def _check_peer(peer: int, verb: str, name: str, group: ProcessGroup) -> int:
    peer = check_rank(peer, verb, group, name=name)
    if peer == group.rank:
        raise SelfSendError(
            f"{verb} on {group}: {name} is this rank itself; keep a copy instead of a message"
        )
    return peer


def _check_tag(tag: int, verb: str, group: ProcessGroup) -> int:
    largest = group.capabilities.max_tag
    try:
        number = index(tag)
    except TypeError:
        number = -1
    if not 0 <= number <= largest:
        raise UnsupportedOperationError(
            f"{verb} on {group}: tag must be a whole number from 0 to {largest} on the "
            f"{group.backend} backend, got {tag!r}"
        )
    return number


def _check_tagless(tag: int, verb: str, group: ProcessGroup) -> None:
    if tag != 0:
        raise UnsupportedOperationError(
            f"{verb} on {group}: messages of device arrays have no tags, and match in the order in "
            f"which they are sent; leave tag at 0, got {tag!r}"
        )


def _device_send(message: Send, group: ProcessGroup) -> Message:
    """Check the arguments of `send` of a device array."""
    x = check_array(message.x, "send", group)
    dst = _check_peer(message.dst, "send", "dst", group)
    _check_tagless(message.tag, "send", group)
    return Message(flat_source(x), dst, 0)


def _device_receive(receive: Receive, group: ProcessGroup) -> tuple[Message, Callable[[], Array]]:
    """Check the arguments of `recv` into a device array; return also what gives the result."""
    out = receive.out
    assert out is not None, "only its array tells that it is for a device"
    check_array(out, "recv", group)
    if receive.src == ANY_SOURCE:
        raise UnsupportedOperationError(
            f"recv on {group}: a device array cannot be received from any source; name the rank"
        )
    src = _check_peer(receive.src, "recv", "src", group)
    _check_tagless(receive.tag, "recv", group)
    flat, finish = land(out, out.shape, out, verb="recv", group=group)
    return Message(flat, src, 0), finish


def _prepare_send(message: Send, group: ProcessGroup) -> Callable[[], Work[None]]:
    """Check the arguments of `send`, and return what starts it."""
    if is_device(message.x):
        leaving = _device_send(message, group)
        return lambda: group.start_messages([leaving], [], nothing)
    x = as_native(check_array(message.x, "send", group))
    dst = _check_peer(message.dst, "send", "dst", group)
    tag = _check_tag(message.tag, "send", group)

    def start() -> Work[None]:
        number = group.next_payload()
        return group.start_steps(
            "send",
            lambda backend: send_steps(backend, x, dst, tag, number),
            nothing,
            peers=Peers(frozenset({dst})),
        )

    return start


def _prepare_receive(receive: Receive, group: ProcessGroup) -> Callable[[], ReceiveWork]:
    """Check the arguments of `recv`, and return what starts it."""
    if is_device(receive.out):
        arriving, finish = _device_receive(receive, group)
        receipt = Receipt(source=arriving.peer)
        return lambda: ReceiveWork(group.start_messages([], [arriving], finish), receipt)
    src = receive.src
    if src != ANY_SOURCE:
        src = _check_peer(src, "recv", "src", group)
    elif not group.capabilities.any_source:
        raise UnsupportedOperationError(
            f"recv on {group}: the {group.backend} backend cannot receive from any source; "
            "name the rank"
        )
    tag = _check_tag(receive.tag, "recv", group)
    out = None if receive.out is None else check_writable(receive.out, "recv", group)
    receipt, where = Receipt(), f"recv on {group}"

    def start() -> ReceiveWork:
        work = group.start_steps(
            "recv",
            lambda backend: receive_steps(backend, receipt, out, src=src, tag=tag, where=where),
            lambda: receipt.array if receive.out is None else receive.out,
            peers=_senders(src, group),
        )
        return ReceiveWork(work, receipt)

    return start


def _senders(src: int, group: ProcessGroup) -> Peers:
    """Return whom a receive depends on: of any source, one other rank that is left is enough."""
    if src != ANY_SOURCE:
        return Peers(frozenset({src}))
    others = frozenset(range(group.size)) - {group.rank}
    return Peers(others, spare=len(others) - 1)


def isend(x: Array, group: ProcessGroup, *, dst: int, tag: int = 0) -> Work[None]:
    """Start a `send`; `x` belongs to it until the Work is complete."""
    return _prepare_send(Send(x, dst, tag), group)()


def send(x: Array, group: ProcessGroup, *, dst: int, tag: int = 0) -> None:
    """Send an array to one rank.

    Parameters
    ----------
    x : Array, any shape and dtype
        What is sent.
    group : ProcessGroup
        The ranks among which `dst` counts.
    dst : int
        Who receives it.
    tag : int, optional
        Only a receive with the same tag takes it.

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
    isend(x, group, dst=dst, tag=tag).wait()


def irecv(group: ProcessGroup, *, src: int, tag: int = 0, out: Array | None = None) -> ReceiveWork:
    """Start a `recv`; `out` belongs to it until the Work is complete.

    The Work's `source` says who sent the message.
    """
    return _prepare_receive(Receive(src, tag, out), group)()


def recv(group: ProcessGroup, *, src: int, tag: int = 0, out: Array | None = None) -> Array:
    """Receive an array from one rank.

    Parameters
    ----------
    group : ProcessGroup
        The ranks among which `src` counts.
    src : int
        Who sends it; `ANY_SOURCE` takes the next message of any rank.
    tag : int, optional
        Only a message with the same tag is taken.
    out : Array, optional
        Where to write it; its shape and dtype must be those of the message. Without it any shape
        is taken, into a fresh array.

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
    CollectiveTimeoutError
        If no message comes within the group's timeout.

    Notes
    -----
    Blocks. Messages from one rank with one tag are received in the order in which they were sent.
    """
    return irecv(group, src=src, tag=tag, out=out).wait()


def sendrecv(
    x: Array,
    group: ProcessGroup,
    *,
    dst: int,
    src: int,
    tag: int = 0,
    out: Array | None = None,
) -> Array:
    """Send to one rank and receive from one at the same time.

    Parameters
    ----------
    x : Array, any shape and dtype
        What is sent.
    group : ProcessGroup
        The ranks among which `dst` and `src` count.
    dst, src : int
        Who receives, and who sends; they may be the same rank.
    tag : int, optional
        Of both messages.
    out : Array, optional
        Where to write what is received. When omitted, a host array of any shape is taken, and a
        device array like `x`.

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
        group, sends=[Send(x, dst, tag)], receives=[Receive(src, tag, out)]
    ).wait()
    return received


@dataclass(frozen=True, slots=True)
class Send:
    """One message of an `exchange`.

    Attributes
    ----------
    x : Array
        What is sent.
    dst : int
        Who receives it.
    tag : int
        As in `send`.
    """

    x: Array
    dst: int
    tag: int = 0


@dataclass(frozen=True, slots=True)
class Receive:
    """One receive of an `exchange`.

    Attributes
    ----------
    src : int
        Who sends it.
    tag : int
        As in `recv`.
    out : Array or None
        As in `recv`.
    """

    src: int
    tag: int = 0
    out: Array | None = None


class _Batch(Work[list[Array]]):
    """Several sends and receives that are waited for together."""

    def __init__(self, sends: list[Work[None]], receives: list[ReceiveWork]) -> None:
        self._sends = sends
        self._receives = receives

    def done(self) -> bool:
        """Return whether all are complete."""
        received = all(work.done() for work in self._receives)
        return all(work.done() for work in self._sends) and received

    def wait(self, timeout: float | None = None) -> list[Array]:
        """Wait for all."""
        received = [work.wait(timeout) for work in self._receives]
        for work in self._sends:
            work.wait(timeout)
        return received

    def synchronize(self, timeout: float | None = None) -> list[Array]:
        """Block the host until all are there."""
        received = [work.synchronize(timeout) for work in self._receives]
        for work in self._sends:
            work.synchronize(timeout)
        return received


class _DeviceBatch(Work[list[Array]]):
    """The messages of device arrays, which are one operation, and those of the host."""

    def __init__(self, places: Sequence[int], works: tuple[Work[list[Array]], ...]) -> None:
        self._places = places
        self._works = works

    def done(self) -> bool:
        """Return whether all are complete."""
        return all(work.done() for work in self._works)

    def _in_order(self, results: list[list[Array]]) -> list[Array]:
        received = dict(zip(self._places, (x for result in results for x in result), strict=True))
        return [received[place] for place in range(len(received))]

    def wait(self, timeout: float | None = None) -> list[Array]:
        """Wait for all."""
        return self._in_order([work.wait(timeout) for work in self._works])

    def synchronize(self, timeout: float | None = None) -> list[Array]:
        """Block the host until all are there."""
        return self._in_order([work.synchronize(timeout) for work in self._works])


def _exchange_on_device(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive]
) -> Work[list[Array]]:
    """Start messages of which some are of device arrays: NCCL has to get these at once."""
    leaving = [_device_send(message, group) for message in sends if is_device(message.x)]
    places = sorted(range(len(receives)), key=lambda place: not is_device(receives[place].out))
    arriving = [_device_receive(each, group) for each in receives if is_device(each.out)]
    host = _prepare_batch(
        group,
        [message for message in sends if not is_device(message.x)],
        [receives[place] for place in places[len(arriving) :]],
    )
    landings = [message for message, _ in arriving]
    finish = [each for _, each in arriving]
    device = group.start_messages(leaving, landings, lambda: [each() for each in finish])
    return _DeviceBatch(places, (device, host()))


def _prepare_batch(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive]
) -> Callable[[], _Batch]:
    """Check several messages of host arrays, and return what starts them."""
    # All are checked before one is started: a receive left behind would take another's message.
    arriving = [_prepare_receive(receive, group) for receive in receives]
    leaving = [_prepare_send(message, group) for message in sends]

    def begin() -> _Batch:
        received = [start() for start in arriving]
        return _Batch([start() for start in leaving], received)

    return begin


def exchange(
    group: ProcessGroup, *, sends: Sequence[Send], receives: Sequence[Receive]
) -> Work[list[Array]]:
    """Start several sends and receives at once.

    Parameters
    ----------
    group : ProcessGroup
        The ranks among which the messages travel.
    sends : sequence of Send
        What is sent.
    receives : sequence of Receive
        What is received.

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
    Immediate. Any set of messages is free of deadlock if each send meets a receive.
    """
    if any(is_device(each.out) for each in receives) or any(is_device(each.x) for each in sends):
        return _exchange_on_device(group, sends, receives)
    return _prepare_batch(group, sends, receives)()


def send_object(obj: Any, group: ProcessGroup, *, dst: int, tag: int = 0) -> None:
    """Send any object that can be pickled to one rank; see `send`.

    Parameters
    ----------
    obj : object
        What is sent.
    group : ProcessGroup
        The ranks among which `dst` counts.
    dst : int
        Who receives it.
    tag : int, optional
        Only a receive with the same tag takes it.
    """
    send(pickled(obj), group, dst=dst, tag=tag)


def recv_object(group: ProcessGroup, *, src: int, tag: int = 0) -> Any:
    """Receive an object that `send_object` sent; see `recv`.

    Parameters
    ----------
    group : ProcessGroup
        The ranks among which `src` counts.
    src : int
        Who sends it; `ANY_SOURCE` takes the next message of any rank.
    tag : int, optional
        Only a message with the same tag is taken.

    Returns
    -------
    object
        A copy.
    """
    return unpickled(recv(group, src=src, tag=tag))
