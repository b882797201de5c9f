"""Cases of messages between two ranks."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np

from mpidist import collectives, point_to_point
from mpidist._types import Array, DType
from mpidist.arrays import DTYPES
from mpidist.errors import DistributedError, SizeMismatchError
from mpidist.group import ProcessGroup
from mpidist.point_to_point import ANY_SOURCE, Receive, Send
from mpidist.testing.contract._landings import LAYOUTS, strided
from mpidist.testing.contract._values import (
    byte_swapped,
    check_that,
    expect,
    expect_error,
    values,
    with_peers,
)

FLOAT64: DType = np.dtype(np.float64)

SIZES = (0, 1, 3, 490, 520, 20_011)
"""Elements of 8 bytes: none, few, just below and just above what travels in one message, many."""


def _neighbours(group: ProcessGroup) -> tuple[int, int]:
    return (group.rank + 1) % group.size, (group.rank - 1) % group.size


@with_peers
def rings(group: ProcessGroup) -> None:
    """Every dtype, shape and layout round a ring, into fresh arrays of unknown shape."""
    after, before = _neighbours(group)
    shapes: list[tuple[tuple[int, ...], DType]] = [((size,), FLOAT64) for size in SIZES]
    shapes += [((), FLOAT64), ((0, 3), FLOAT64), ((2, 3, 4), FLOAT64), ((1,) * 8, FLOAT64)]
    shapes += [((2, 3), dtype) for dtype in sorted(DTYPES, key=str)]
    for number, (shape, dtype) in enumerate(shapes):
        x, wanted = (values(shape, dtype, number, rank) for rank in (group.rank, before))
        got = point_to_point.sendrecv(x, group, dst=after, src=before)
        expect(got, wanted, f"sendrecv of {shape} {dtype} on {group}")
    for layout in LAYOUTS:
        x, wanted = (layout(values((3, 4), FLOAT64, rank)) for rank in (group.rank, before))
        got = point_to_point.sendrecv(x, group, dst=after, src=before)
        expect(got, wanted, f"sendrecv of a {layout.__name__} array on {group}")


@with_peers
def into_arrays(group: ProcessGroup) -> None:
    """Receives into arrays of the caller, in any layout; what does not fit is refused and lost."""
    after, before = _neighbours(group)
    for number in SIZES:
        x, wanted = (values((number, 2), FLOAT64, rank) for rank in (group.rank, before))
        plain = np.empty_like(wanted)
        for out in (plain, strided(plain), byte_swapped(plain), np.asfortranarray(plain)):
            got = point_to_point.sendrecv(x, group, dst=after, src=before, out=out)
            check_that(got is out, "sendrecv: the result is not `out`")
            expect(out, wanted, f"sendrecv of {number} rows into out on {group}")
        for other in (np.empty((number + 1, 2)), np.empty((number, 2), np.float32)):
            work = point_to_point.irecv(group, src=before, out=other)
            point_to_point.send(x, group, dst=after)
            expect_error(
                SizeMismatchError, work.wait, "recv into an array that does not fit", "out"
            )
            expect_error(SizeMismatchError, work.wait, "waiting for it again", "out")
    got = point_to_point.sendrecv(np.arange(3), group, dst=after, src=before)
    expect(got, np.arange(3), f"sendrecv afterwards on {group}")


@with_peers
def in_order(group: ProcessGroup) -> None:
    """Messages of one tag keep their order, those of different tags can be taken in any."""
    after, before = _neighbours(group)
    tags = (0, 1, 7, group.capabilities.max_tag)
    sizes = (3, 2000, 1)
    works = [
        point_to_point.isend(np.full(size, tag), group, dst=after, tag=tag)
        for size in sizes
        for tag in tags
    ]
    for tag in reversed(tags):
        for size in sizes:
            got = point_to_point.recv(group, src=before, tag=tag)
            expect(got, np.full(size, tag), f"message of tag {tag} on {group}")
    for work in works:
        work.wait()


@with_peers
def any_source(group: ProcessGroup) -> None:
    """Rank 0 takes whatever comes, and knows from whom; each rank's messages keep their order."""
    if not group.capabilities.any_source:
        return
    rounds = 3
    if group.rank != 0:
        for number in range(rounds):
            size = 2 if number % 2 else 5000
            point_to_point.send(np.full(size, 10 * group.rank + number), group, dst=0, tag=5)
        return
    heard: dict[int, list[int]] = {rank: [] for rank in range(1, group.size)}
    for _ in range(rounds * (group.size - 1)):
        work = point_to_point.irecv(group, src=ANY_SOURCE, tag=5)
        first = int(work.wait()[0])
        check_that(work.source == first // 10, f"message {first} came from {work.source}")
        heard[work.source].append(first % 10)
    for rank, numbers in heard.items():
        check_that(numbers == sorted(numbers) and len(numbers) == rounds, f"{rank}: {numbers}")


@with_peers
def nothing_left_behind(group: ProcessGroup) -> None:
    """Nothing of a refused exchange is started: the next message goes to the next receive."""
    after, before = _neighbours(group)
    x, locked = np.full(3, group.rank), np.zeros(3, np.int64)
    locked.flags.writeable = False
    masked: Array = np.ma.masked_array([1, 2])
    good_send, good_receive = Send(x, after), Receive(before)
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
    check_that(not group._outstanding, "something was started")
    work = point_to_point.isend(x, group, dst=after)
    got = point_to_point.recv(group, src=before)
    expect(got, np.full(3, before), "the message after the mistakes")
    work.wait()
    memory = np.zeros((1, 3), np.int64)
    out, grid = memory.view(np.matrix), x.reshape(1, 3).view(np.matrix)
    got = point_to_point.sendrecv(grid, group, dst=after, src=before, out=out)
    check_that(got is out, "sendrecv: the result is not `out`")
    expect(memory, np.full((1, 3), before), "sendrecv of a subclass")


def batches(group: ProcessGroup) -> None:
    """Everybody exchanges with everybody at once, receives posted in another order than sends."""
    others = [rank for rank in range(group.size) if rank != group.rank]
    for size in (2, 3000):
        sends = [
            Send(np.full(size + dst, group.rank), dst, tag) for dst in others for tag in (0, 3)
        ]
        outs = [np.empty(size + group.rank, np.int64) for _ in others]
        receives = [Receive(src, 3) for src in reversed(others)]
        receives += [Receive(src, 0, out) for src, out in zip(others, outs, strict=True)]
        work = point_to_point.exchange(group, sends=sends, receives=receives)
        got = work.wait()
        for receive, x in zip(receives, got, strict=True):
            expect(x, np.full(size + group.rank, receive.src), f"exchange on {group}")
        check_that(work.done(), "exchange: not done after wait")
    check_that(point_to_point.exchange(group, sends=[], receives=[]).wait() == [], "empty exchange")


def messages_of_objects(group: ProcessGroup) -> None:
    """Objects hop along the ranks."""
    payload = {"path": [0], "blob": b"x" * 10_000}
    if group.rank > 0:
        payload = point_to_point.recv_object(group, src=group.rank - 1, tag=2)
        payload["path"].append(group.rank)
    if group.rank < group.size - 1:
        point_to_point.send_object(payload, group, dst=group.rank + 1, tag=2)
    check_that(payload["path"] == list(range(group.rank + 1)), f"{payload['path']}")


@with_peers
def receive_first(group: ProcessGroup) -> None:
    """Post receives long before their messages come; collectives pass meanwhile."""
    after, before = _neighbours(group)
    early = [point_to_point.irecv(group, src=before, tag=tag) for tag in range(3)]
    for _ in range(3):
        collectives.barrier(group)
    for tag in (2, 0, 1):
        point_to_point.send(np.arange(1000 * tag), group, dst=after, tag=tag)
    collectives.barrier(group)
    for tag, work in enumerate(early):
        expect(work.wait(), np.arange(1000 * tag), f"early receive of tag {tag}")
        check_that(work.source == before, f"source {work.source}")


@with_peers
def many_in_a_row(group: ProcessGroup) -> None:
    """Flood the last rank from the first; nothing is lost or exchanged."""
    count = 40
    if group.rank == 0:
        works = [
            point_to_point.isend(np.full(1 + 97 * k, k), group, dst=group.size - 1)
            for k in range(count)
        ]
        for work in works:
            work.wait()
    if group.rank == group.size - 1:
        got = [point_to_point.recv(group, src=0) for _ in range(count)]
        check_that(all(b[0] == a[0] + 1 for a, b in pairwise(got)), "order of a flood")
        check_that([len(x) for x in got] == [1 + 97 * k for k in range(count)], "sizes of a flood")
