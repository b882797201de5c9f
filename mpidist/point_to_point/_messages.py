"""One message: its envelope, and the checks before it is started, on the host or on a device.

A message between hosts is an envelope of shape and dtype, with the array inside or behind it. An
envelope is little-endian: 4 bytes of magic, the dtype's code, the number of dimensions, 1 if the
array's bytes follow inside the envelope, 1 if the array is the pickle of an object, the number of
the lane in which the bytes follow otherwise (8 bytes), and 8 bytes per dimension.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mpidist._arguments import whole_number
from mpidist._types import Array, DType
from mpidist.arrays.namespaces import DTYPES, as_bytes, as_native, is_device
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.work import ANY_SOURCE, Message, Steps, Work
from mpidist.collectives._checks import (
    check_array,
    check_rank,
    check_writable,
    flat_source,
    land,
    nothing,
)
from mpidist.errors import (
    CollectiveMismatchError,
    SelfSendError,
    SizeMismatchError,
    TransportError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout
from mpidist.group.pending import Peers

CAPACITY = 4096
"""Bytes that a receiver provides for an envelope; an array that fits travels inside."""

_HEAD = struct.Struct("<4sBB??Q")
_MAGIC = b"MpD2"
_BY_CODE: tuple[DType, ...] = tuple(sorted(DTYPES, key=lambda dtype: dtype.name))
_CODES = {dtype: code for code, dtype in enumerate(_BY_CODE)}


class Envelope(NamedTuple):
    """What an envelope says of the array, or of the pickle of an object.

    Its bytes are `content`; None where they follow, in the lane `number`.
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
    """Return the envelope of a contiguous array of native byte order, and whether `x` is inside.

    It has at most `CAPACITY` bytes; an array that does not fit will follow in the lane `number`.
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
    """The array that a receive has received, and the rank that sent it; `ANY_SOURCE` until then."""

    array: Array = field(default_factory=lambda: np.empty(0))
    source: int = ANY_SOURCE


def send_steps(
    backend: Backend, x: Array, dst: int, tag: int, number: int, *, is_object: bool
) -> Steps:
    """Send an array by one message if it fits into its envelope, else by two; see `seal`."""
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
    """Receive an array, or the pickle of an object, into `out` or a fresh array, and the receipt.

    `where` names the verb and the group for errors. These are raised when the message has been
    received: CollectiveMismatchError for an object in place of an array, or the other way round,
    SizeMismatchError where it does not fit `out`.
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


# -- the verbs -----------------------------------------------------------------------------------

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """One message of an `exchange`.

    Attributes
    ----------
    x : Array
        What is sent.
    dst : int
        The rank that receives it.
    tag : int
        Only a receive with the same tag takes it.
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
        The rank that sends it, or `ANY_SOURCE`.
    tag : int
        Only a message with the same tag is taken.
    out : Array or None
        Where to write it; without it any shape is taken, into a fresh array.
    """

    src: int
    tag: int = 0
    out: Array | None = None


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


def _is_any(src: int) -> bool:
    try:
        return whole_number(src) == ANY_SOURCE
    except TypeError:
        return False


def _check_tag(tag: int, verb: str, group: ProcessGroup) -> int:
    largest = group.capabilities.max_tag
    try:
        number = whole_number(tag)
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


def device_send(message: Send, group: ProcessGroup) -> Message:
    """Check the arguments of `send` of a device array."""
    x = check_array(message.x, "send", group)
    dst = _check_peer(message.dst, "send", "dst", group)
    _check_tagless(message.tag, "send", group)
    return Message(flat_source(x), dst, 0)


def device_receive(receive: Receive, group: ProcessGroup) -> tuple[Message, Callable[[], Array]]:
    """Check the arguments of `recv` into a device array; return also what gives the result."""
    out = receive.out
    assert out is not None, "it is for a device because of its array"
    check_array(out, "recv", group)
    if _is_any(receive.src):
        raise UnsupportedOperationError(
            f"recv on {group}: a device array cannot be received from any source; name the rank"
        )
    src = _check_peer(receive.src, "recv", "src", group)
    _check_tagless(receive.tag, "recv", group)
    flat, finish = land(out, out.shape, out, verb="recv", group=group)
    return Message(flat, src, 0), finish


def prepare_send(
    message: Send,
    group: ProcessGroup,
    timeout: Timeout,
    *,
    is_object: bool = False,
    name: str | None = None,
) -> Callable[[], Work[None]]:
    """Check the arguments of `send` or `send_object`, and return what starts it.

    `name` is what it is called in errors and records, instead of the verb.
    """
    verb = name or ("send_object" if is_object else "send")
    if is_device(message.x):
        leaving = device_send(message, group)
        return lambda: _start_on_device(group, [leaving], [], nothing, timeout)
    x = as_native(check_array(message.x, verb, group))
    dst = _check_peer(message.dst, verb, "dst", group)
    tag = _check_tag(message.tag, verb, group)

    def start() -> Work[None]:
        number = group.operations.next_payload()
        return group.operations.start_messages(
            verb,
            lambda backend, _: backend.start(
                send_steps(backend, x, dst, tag, number, is_object=is_object)
            ),
            nothing,
            peers=Peers(frozenset({dst})),
            timeout=timeout,
        )

    return start


def prepare_receive(
    receive: Receive,
    group: ProcessGroup,
    timeout: Timeout,
    *,
    is_object: bool = False,
    name: str | None = None,
) -> Callable[[], ReceiveWork]:
    """Check the arguments of `recv` or `recv_object`, and return what starts it.

    `name` is what it is called in errors and records, instead of the verb.
    """
    verb = name or ("recv_object" if is_object else "recv")
    if is_device(receive.out):
        arriving, finish = device_receive(receive, group)
        receipt = Receipt(source=arriving.peer)
        return lambda: ReceiveWork(
            _start_on_device(group, [], [arriving], finish, timeout), receipt
        )
    src = ANY_SOURCE
    if not _is_any(receive.src):
        src = _check_peer(receive.src, verb, "src", group)
    elif not group.capabilities.any_source:
        raise UnsupportedOperationError(
            f"{verb} on {group}: the {group.backend} backend cannot receive from any source; "
            "name the rank"
        )
    tag = _check_tag(receive.tag, verb, group)
    out = None if receive.out is None else check_writable(receive.out, verb, group)
    receipt, where = Receipt(), f"{verb} on {group}"

    def start() -> ReceiveWork:
        work = group.operations.start_messages(
            verb,
            lambda backend, _: backend.start(
                receive_steps(
                    backend, receipt, out, src=src, tag=tag, where=where, is_object=is_object
                )
            ),
            lambda: receipt.array if receive.out is None else receive.out,
            peers=_senders(src, group),
            timeout=timeout,
        )
        return ReceiveWork(work, receipt)

    return start


def _senders(src: int, group: ProcessGroup) -> Peers:
    """Return the ranks that a receive needs: for any source, one of the others is enough."""
    if src != ANY_SOURCE:
        return Peers(frozenset({src}))
    others = frozenset(range(group.size)) - {group.rank}
    return Peers(others, spare=len(others) - 1)


def _start_on_device(
    group: ProcessGroup,
    sends: Sequence[Message],
    receives: Sequence[Message],
    finish: Callable[[], T],
    timeout: Timeout,
) -> Work[T]:
    """Put messages of device arrays behind the current stream, and return at once."""
    device = group.transport.device
    assert device is not None, "the arrays were checked"
    return group.operations.start_messages(
        "exchange",
        lambda _, waiter: device.exchange(sends, receives, waiter),
        finish,
        peers=Peers(frozenset(message.peer for message in (*sends, *receives))),
        detail="on the device",
        timeout=timeout,
    )


def start_exchange(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive], timeout: Timeout
) -> Work[list[Array]]:
    """Start several messages; those of device arrays together, as NCCL has to get them."""
    # All are checked before one is started: a receive left behind would take another's message.
    from_device = [device_send(message, group) for message in sends if is_device(message.x)]
    to_device = {i: device_receive(r, group) for i, r in enumerate(receives) if is_device(r.out)}
    to_host = {
        i: prepare_receive(receive, group, timeout)
        for i, receive in enumerate(receives)
        if i not in to_device
    }
    from_host = [prepare_send(m, group, timeout) for m in sends if not is_device(m.x)]
    works: list[Work[Any]] = []
    if from_device or to_device:
        landings = [message for message, _ in to_device.values()]
        finish = [end for _, end in to_device.values()]
        works.append(
            _start_on_device(
                group, from_device, landings, lambda: [end() for end in finish], timeout
            )
        )
    works += [start() for start in to_host.values()]
    works += [start() for start in from_host]

    def in_order(results: list[Any]) -> list[Array]:
        if from_device or to_device:
            results = [*results[0], *results[1:]]
        received = dict(zip((*to_device, *to_host), results, strict=False))
        return [received[i] for i in range(len(receives))]

    return Work.all(works).then(in_order)
