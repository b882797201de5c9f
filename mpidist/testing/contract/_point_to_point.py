"""Cases of messages between two ranks.

Where a receive cannot learn its shape from the message, as on devices, it is given an array. There
a receive also keeps what its rank starts later waiting, so that rings go by `exchange`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np

from mpidist import collectives, point_to_point
from mpidist._types import Array, DType
from mpidist.errors import (
    CollectiveMismatchError,
    DistributedError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.point_to_point import ANY_SOURCE, Receive, Send
from mpidist.testing.contract._landings import fortran, strided
from mpidist.testing.contract._lists import Unrestorable
from mpidist.testing.contract._memory import Place, with_peers
from mpidist.testing.contract._values import (
    byte_swapped,
    check_that,
    expect,
    expect_error,
    values,
)

FLOAT64: DType = np.dtype(np.float64)

SIZES = (0, 1, 3, 490, 520, 20_011)
"""Elements of 8 bytes: none, few, just below and just above what travels in one message, many."""


def _neighbours(group: ProcessGroup) -> tuple[int, int]:
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


def _out_like(wanted: Array, group: ProcessGroup, device: Place) -> Array | None:
    """Return an array for a message, where a receive needs one."""
    if device.capabilities(group).unknown_shapes:
        return None
    return device.put(np.zeros(wanted.shape, wanted.dtype.newbyteorder("=")))


@with_peers
def rings(group: ProcessGroup, device: Place) -> None:
    """Every dtype, shape and layout round a ring, into fresh arrays of unknown shape."""
    after, before = _neighbours(group)
    device.ready(group)
    shapes: list[tuple[tuple[int, ...], DType]] = [((size,), FLOAT64) for size in SIZES]
    shapes += [((), FLOAT64), ((0, 3), FLOAT64), ((2, 3, 4), FLOAT64), ((1,) * 8, FLOAT64)]
    shapes += [((2, 3), dtype) for dtype in device.dtypes]
    for number, (shape, dtype) in enumerate(shapes):
        own, wanted = (values(shape, dtype, number, rank) for rank in (group.rank, before))
        x, out = device.put(own), _out_like(wanted, group, device)
        got = point_to_point.sendrecv(x, group, dst=after, src=before, out=out)
        expect(device.take(got), wanted, f"sendrecv of {shape} {dtype} on {group}")
    for layout in device.layouts:
        x = layout(device.put(values((3, 4), FLOAT64, group.rank)))
        wanted = layout(values((3, 4), FLOAT64, before))
        out = _out_like(wanted, group, device)
        got = point_to_point.sendrecv(x, group, dst=after, src=before, out=out)
        expect(device.take(got), wanted, f"sendrecv of a {layout.__name__} array on {group}")


@with_peers
def into_arrays(group: ProcessGroup, device: Place) -> None:
    """Receives into arrays of the caller, in any layout; what does not fit is refused and lost."""
    after, before = _neighbours(group)
    device.ready(group)
    for number in SIZES:
        own, wanted = (values((number, 2), FLOAT64, rank) for rank in (group.rank, before))
        x, plain = device.put(own), device.put(np.empty_like(wanted))
        outs = [plain, strided(plain), fortran(plain)]
        outs += [byte_swapped(plain)] if device.on_host else []
        for out in outs:
            got = point_to_point.sendrecv(x, group, dst=after, src=before, out=out)
            check_that(got is out, "sendrecv: the result is not `out`")
            expect(device.take(out), wanted, f"sendrecv of {number} rows into out on {group}")
        if device.capabilities(group).unknown_shapes:
            _refused(x, group, device)
    x, wanted = device.put(np.arange(3)), np.arange(3)
    last = _out_like(wanted, group, device)
    got = point_to_point.sendrecv(x, group, dst=after, src=before, out=last)
    expect(device.take(got), wanted, f"sendrecv afterwards on {group}")


def _refused(x: Array, group: ProcessGroup, device: Place) -> None:
    """Receive into arrays that the message does not fit."""
    after, before = _neighbours(group)
    for other in (np.empty((len(x) + 1, 2)), np.empty((len(x), 2), np.float32)):
        work = point_to_point.irecv(group, src=before, out=device.put(other))
        point_to_point.send(x, group, dst=after)
        expect_error(SizeMismatchError, work.wait, "recv into an array that does not fit", "out")
        expect_error(SizeMismatchError, work.wait, "waiting for it again", "out")


@with_peers
def in_order(group: ProcessGroup, device: Place) -> None:
    """Messages of one tag keep their order, those of different tags can be taken in any."""
    after, before = _neighbours(group)
    sizes = (3, 2000, 1)
    largest = device.capabilities(group).max_tag
    if largest < 1:
        _in_order_without_tags(group, device, sizes)
        return
    tags = (0, 1, 7, largest)
    works = [
        point_to_point.isend(device.put(np.full(size, tag)), group, dst=after, tag=tag)
        for size in sizes
        for tag in tags
    ]
    for tag in reversed(tags):
        for size in sizes:
            got = point_to_point.recv(group, src=before, tag=tag)
            expect(device.take(got), np.full(size, tag), f"message of tag {tag} on {group}")
    for work in works:
        work.wait()


def _in_order_without_tags(group: ProcessGroup, device: Place, sizes: tuple[int, ...]) -> None:
    after, before = _neighbours(group)
    x = device.put(np.zeros(3))
    device.ready(group)
    for call in (
        partial(point_to_point.isend, x, group, dst=after, tag=1),
        partial(point_to_point.irecv, group, src=before, tag=1, out=x),
    ):
        expect_error(UnsupportedOperationError, call, "a message with a tag", "tag", str(group))
    sends = [Send(device.put(np.full(size, size)), after) for size in sizes]
    receives = [Receive(before, out=device.put(np.zeros(size, int))) for size in sizes]
    got = point_to_point.exchange(group, sends=sends, receives=receives).wait()
    for size, message in zip(sizes, got, strict=True):
        expect(device.take(message), np.full(size, size), f"message of {size} elements on {group}")


@with_peers
def any_source(group: ProcessGroup, device: Place) -> None:
    """Rank 0 takes whatever comes, and knows from whom; each rank's messages keep their order."""
    if not device.capabilities(group).any_source:
        out = device.put(np.zeros(2))
        receive = partial(point_to_point.irecv, group, src=ANY_SOURCE, out=out)
        expect_error(UnsupportedOperationError, receive, "any source", "any source", str(group))
        return
    rounds = 3
    if group.rank != 0:
        for number in range(rounds):
            size = 2 if number % 2 else 5000
            x = device.put(np.full(size, 10 * group.rank + number))
            point_to_point.send(x, group, dst=0, tag=5)
        return
    heard: dict[int, list[int]] = {rank: [] for rank in range(1, group.size)}
    for _ in range(rounds * (group.size - 1)):
        work = point_to_point.irecv(group, src=ANY_SOURCE, tag=5)
        first = int(device.take(work.wait())[0])
        check_that(work.source == first // 10, f"message {first} came from {work.source}")
        heard[work.source].append(first % 10)
    for rank, numbers in heard.items():
        check_that(numbers == sorted(numbers) and len(numbers) == rounds, f"{rank}: {numbers}")


@with_peers
def nothing_left_behind(group: ProcessGroup, device: Place) -> None:
    """Nothing of a refused exchange is started: the next message goes to the next receive."""
    after, before = _neighbours(group)
    device.ready(group)
    own, wanted = np.full(3, group.rank), np.full(3, before)
    x, locked = device.put(own), np.zeros(3, np.int64)
    locked.flags.writeable = False
    masked: Array = np.ma.masked_array([1, 2])
    good_send, good_receive = Send(x, after), Receive(before, 0, _out_like(wanted, group, device))
    bad: dict[str, tuple[Send, Receive]] = {
        "myself": (Send(x, group.rank), good_receive),
        "nobody": (Send(x, group.size), good_receive),
        "masked": (Send(masked, after), good_receive),
        "tag": (Send(x, after, 0.5), good_receive),  # type: ignore[arg-type]
        "src": (good_send, Receive(group.rank)),
        "out": (good_send, Receive(before, 0, locked)),
    }
    for name, (send, receive) in bad.items():
        expect_error(
            DistributedError,
            partial(
                point_to_point.exchange,
                group,
                sends=[good_send, send],
                receives=[good_receive, receive],
            ),
            f"exchange with a bad {name}",
        )
    expect_error(
        DistributedError,
        partial(point_to_point.sendrecv, x, group, dst=group.rank, src=before),
        "sendrecv with a bad dst",
    )
    check_that(not group.operations.outstanding, "something was started")
    out = _out_like(wanted, group, device)
    got = point_to_point.sendrecv(x, group, dst=after, src=before, out=out)
    expect(device.take(got), wanted, "the message after the mistakes")


@with_peers
def matrices(group: ProcessGroup, _device: Place) -> None:
    """Send and receive arrays of a subclass, here one that stays two-dimensional."""
    after, before = _neighbours(group)
    memory = np.zeros((1, 3), np.int64)
    out, grid = memory.view(np.matrix), np.full((1, 3), group.rank).view(np.matrix)
    got = point_to_point.sendrecv(grid, group, dst=after, src=before, out=out)
    check_that(got is out, "sendrecv: the result is not `out`")
    expect(memory, np.full((1, 3), before), "sendrecv of a subclass")


def batches(group: ProcessGroup, device: Place) -> None:
    """Everybody exchanges with everybody at once, receives posted in another order than sends."""
    others = [rank for rank in range(group.size) if rank != group.rank]
    device.ready(group)
    second = 3 if device.capabilities(group).max_tag >= 3 else 0
    for size in (2, 3000):
        own = np.full(size + group.rank, 0)
        sends = [
            Send(device.put(np.full(size + dst, group.rank)), dst, tag)
            for dst in others
            for tag in (0, second)
        ]
        outs = [device.put(np.zeros_like(own)) for _ in others]
        receives = [Receive(src, second, _out_like(own, group, device)) for src in reversed(others)]
        receives += [Receive(src, 0, out) for src, out in zip(others, outs, strict=True)]
        work = point_to_point.exchange(group, sends=sends, receives=receives)
        got = work.wait()
        for receive, x in zip(receives, got, strict=True):
            expect(device.take(x), np.full(size + group.rank, receive.src), f"exchange on {group}")
        work.synchronize()
        check_that(work.done(), "exchange: not done after synchronize")
    check_that(point_to_point.exchange(group, sends=[], receives=[]).wait() == [], "empty exchange")


def messages_of_objects(group: ProcessGroup, _device: Place) -> None:
    """Objects hop along the ranks."""
    payload = {"path": [0], "blob": b"x" * 10_000}
    if group.rank > 0:
        payload = point_to_point.recv_object(group, src=group.rank - 1, tag=2)
        payload["path"].append(group.rank)
    if group.rank < group.size - 1:
        point_to_point.send_object(payload, group, dst=group.rank + 1, tag=2)
    check_that(payload["path"] == list(range(group.rank + 1)), f"{payload['path']}")


_RECEIVES: dict[str, Callable[[ProcessGroup, int], Any]] = {
    "recv": lambda g, src: point_to_point.recv(g, src=src),
    "recv into": lambda g, src: point_to_point.recv(g, src=src, out=np.zeros(3)),
    "irecv": lambda g, src: point_to_point.irecv(g, src=src).wait(),
    "exchange": lambda g, src: point_to_point.exchange(g, sends=[], receives=[Receive(src)]).wait(),
    "recv_object": lambda g, src: point_to_point.recv_object(g, src=src),
}


@with_peers
def objects_and_arrays(group: ProcessGroup, _device: Place) -> None:
    """Refuse an object for an array and an array for an object, short or long; unpickle neither."""
    last = group.size - 1
    sources = [last] + [ANY_SOURCE] * group.capabilities.any_source
    for length, src in product((10, 10_000), sources):
        obj = [1] * length
        for name, receive in _RECEIVES.items():
            of_object = name == "recv_object"
            if group.rank == last and of_object:
                point_to_point.send(np.frombuffer(pickle.dumps(obj), np.uint8), group, dst=0)
            elif group.rank == last:
                point_to_point.send_object(obj, group, dst=0)
            elif group.rank == 0:
                sent = "an array" if of_object else "an object; receive it with recv_object"
                where = f"recv_object on {group}" if of_object else f"recv on {group}"
                parts = (where, f"rank {last} sent {sent}", "the group can still be used")
                call = partial(receive, group, src)
                expect_error(CollectiveMismatchError, call, f"{name} of {length}", *parts)
    total = collectives.all_reduce(np.array(1), group)
    check_that(total == group.size, f"all_reduce afterwards: {total}")


@with_peers
def objects_that_cannot_be_restored(group: ProcessGroup, _device: Place) -> None:
    """Name who gave an object that cannot be unpickled, and who gave one without a pickle."""
    last = group.size - 1
    if group.rank == last:
        point_to_point.send_object(Unrestorable(), group, dst=0)
        expect_error(
            UnsupportedOperationError,
            lambda: point_to_point.send_object(lambda: None, group, dst=0),
            "send_object",
            f"send_object on {group}: what rank {last} gave cannot be pickled",
        )
        point_to_point.send_object("next", group, dst=0)
    if group.rank == 0:
        expect_error(
            UnsupportedOperationError,
            lambda: point_to_point.recv_object(group, src=last),
            "recv_object",
            f"recv_object on {group}: the object that rank {last} gave cannot be unpickled here",
            "ValueError: not restored",
        )
        check_that(point_to_point.recv_object(group, src=last) == "next", "the next object")


@with_peers
def receive_first(group: ProcessGroup, device: Place) -> None:
    """Post receives long before their messages come; collectives of host arrays pass meanwhile."""
    after, before = _neighbours(group)
    # Where receives keep sends waiting, a ring of them would never end: from the first to the last.
    around = device.capabilities(group).unknown_shapes
    device.ready(group)
    early = []
    for number in range(3 if around or group.rank == group.size - 1 else 0):
        wanted = np.arange(1000 * number)
        src, tag = (before, number) if around else (0, 0)
        out = _out_like(wanted, group, device)
        early.append((point_to_point.irecv(group, src=src, tag=tag, out=out), wanted, src))
    for _ in range(3):
        collectives.barrier(group)
    for number in (2, 0, 1) if around else range(3 if group.rank == 0 else 0):
        dst, tag = (after, number) if around else (group.size - 1, 0)
        point_to_point.send(device.put(np.arange(1000 * number)), group, dst=dst, tag=tag)
    collectives.barrier(group)
    for work, wanted, src in early:
        expect(device.take(work.wait()), wanted, f"early receive of {len(wanted)} elements")
        check_that(work.source == src, f"source {work.source}")


@with_peers
def many_in_a_row(group: ProcessGroup, device: Place) -> None:
    """Flood the last rank from the first; nothing is lost or exchanged."""
    device.ready(group)
    wanted = [np.full(1 + 97 * k, k) for k in range(40)]
    if group.rank == 0:
        works = [point_to_point.isend(device.put(x), group, dst=group.size - 1) for x in wanted]
        for work in works:
            work.wait()
    if group.rank == group.size - 1:
        got = []
        for x in wanted:
            message = point_to_point.recv(group, src=0, out=_out_like(x, group, device))
            got.append(device.take(message))
        check_that(all(b[0] == a[0] + 1 for a, b in pairwise(got)), "order of a flood")
        check_that([x.size for x in got] == [x.size for x in wanted], "sizes of a flood")
