"""One message: checked before it is started, on the host or on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpidist._arguments import whole_number
from mpidist._types import Array
from mpidist.arrays.namespaces import as_native, is_device
from mpidist.backends.work import ANY_SOURCE, Message, Work
from mpidist.collectives._checks import (
    check_array,
    check_rank,
    check_writable,
    flat_source,
    land,
    nothing,
)
from mpidist.errors import SelfSendError, UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout
from mpidist.group.pending import Peers
from mpidist.point_to_point.envelope import Receipt, receive_steps, send_steps


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
    assert out is not None, "only its array tells that it is for a device"
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
    message: Send, group: ProcessGroup, timeout: Timeout, *, is_object: bool = False
) -> Callable[[], Work[None]]:
    """Check the arguments of `send` or `send_object`, and return what starts it."""
    verb = "send_object" if is_object else "send"
    if is_device(message.x):
        leaving = device_send(message, group)
        return lambda: group.start_messages([leaving], [], nothing, timeout)
    x = as_native(check_array(message.x, verb, group))
    dst = _check_peer(message.dst, verb, "dst", group)
    tag = _check_tag(message.tag, verb, group)

    def start() -> Work[None]:
        number = group.next_payload()
        return group.start_steps(
            verb,
            lambda backend: send_steps(backend, x, dst, tag, number, is_object=is_object),
            nothing,
            peers=Peers(frozenset({dst})),
            timeout=timeout,
        )

    return start


def prepare_receive(
    receive: Receive, group: ProcessGroup, timeout: Timeout, *, is_object: bool = False
) -> Callable[[], ReceiveWork]:
    """Check the arguments of `recv` or `recv_object`, and return what starts it."""
    verb = "recv_object" if is_object else "recv"
    if is_device(receive.out):
        arriving, finish = device_receive(receive, group)
        receipt = Receipt(source=arriving.peer)
        return lambda: ReceiveWork(group.start_messages([], [arriving], finish, timeout), receipt)
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
        work = group.start_steps(
            verb,
            lambda backend: receive_steps(
                backend, receipt, out, src=src, tag=tag, where=where, is_object=is_object
            ),
            lambda: receipt.array if receive.out is None else receive.out,
            peers=_senders(src, group),
            timeout=timeout,
        )
        return ReceiveWork(work, receipt)

    return start


def _senders(src: int, group: ProcessGroup) -> Peers:
    """Return whom a receive depends on: of any source, one other rank that is left is enough."""
    if src != ANY_SOURCE:
        return Peers(frozenset({src}))
    others = frozenset(range(group.size)) - {group.rank}
    return Peers(others, spare=len(others) - 1)


def exchange_on_device(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive], timeout: Timeout
) -> Work[list[Array]]:
    """Start messages of which some are of device arrays: NCCL has to get these at once."""
    leaving = [device_send(message, group) for message in sends if is_device(message.x)]
    order = sorted(range(len(receives)), key=lambda index: not is_device(receives[index].out))
    arriving = [device_receive(receive, group) for receive in receives if is_device(receive.out)]
    host = prepare_batch(
        group,
        [message for message in sends if not is_device(message.x)],
        [receives[index] for index in order[len(arriving) :]],
        timeout,
    )
    landings = [message for message, _ in arriving]
    finish = [end for _, end in arriving]
    device = group.start_messages(leaving, landings, lambda: [end() for end in finish], timeout)

    def in_order(results: list[list[Array]]) -> list[Array]:
        received = dict(zip(order, (x for result in results for x in result), strict=True))
        return [received[index] for index in range(len(received))]

    return Work.all([device, host()]).then(in_order)


def prepare_batch(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive], timeout: Timeout
) -> Callable[[], Work[list[Array]]]:
    """Check several messages of host arrays, and return what starts them."""
    # All are checked before one is started: a receive left behind would take another's message.
    arriving = [prepare_receive(receive, group, timeout) for receive in receives]
    leaving = [prepare_send(message, group, timeout) for message in sends]

    def begin() -> Work[list[Array]]:
        works: list[Work[Any]] = [start() for start in arriving]
        works += [start() for start in leaving]
        return Work.all(works).then(lambda results: results[: len(arriving)])

    return begin
