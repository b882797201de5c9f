"""Cases of operations that are under way together."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidist import collectives, point_to_point
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.point_to_point import Receive, Send
from mpidist.testing.contract._memory import Place
from mpidist.testing.contract._values import check_that, expect
from mpidist.testing.contract._verbs import VERBS, Trial, begin

OUTSTANDING = 20

Check = Callable[[Any], None]


def _nothing(_: Any) -> None:
    """Accept anything."""


def _start_many(group: ProcessGroup, device: Place, salt: int) -> list[tuple[Work[Any], Check]]:
    """Start `OUTSTANDING` operations of all kinds, long and short, the same on all ranks."""
    started: list[tuple[Work[Any], Check]] = []
    kinds = [*VERBS.values(), None]
    dtypes = [np.dtype(dtype) for dtype in (np.float64, np.float16, np.int32, BFLOAT16)]
    dtypes = [dtype for dtype in dtypes if dtype in device.dtypes]
    device.ready(group)
    for number in range(OUTSTANDING):
        verb = kinds[number % len(kinds)]
        rows = (3, 400, 1, 37)[(number + salt) % 4]
        if verb is not None:
            dtype, root = dtypes[number % len(dtypes)], number % group.size
            trial = Trial(verb, rows=rows, dtype=dtype, root=root, seed=number)
            begun = begin(trial, group, device)
            started.append((begun.work, begun.check))
        elif group.size > 1:
            started.append((collectives.ibarrier(group), _nothing))
            started += _start_ring(group, device, rows, number)
    return started


def _start_ring(
    group: ProcessGroup, device: Place, rows: int, number: int
) -> list[tuple[Work[Any], Check]]:
    """Start sending to the next rank and receiving from the one before."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    x, wanted = device.put(np.full(rows, group.rank + number)), np.full(rows, before + number)

    def check(received: Any) -> None:
        (result,) = received if isinstance(received, list) else [received]
        expect(device.take(result), wanted, "message among many operations")

    if device.capabilities(group).max_tag >= number:
        receive = point_to_point.irecv(group, src=before, tag=number)
        return [(receive, check), (point_to_point.isend(x, group, dst=after, tag=number), _nothing)]
    sends, receives = [Send(x, after)], [Receive(before, out=device.put(np.zeros_like(wanted)))]
    return [(point_to_point.exchange(group, sends=sends, receives=receives), check)]


def waited_in_any_order(group: ProcessGroup, device: Place) -> None:
    """Many operations outstanding, waited for in an order of each rank's own."""
    for salt in range(3):
        started = _start_many(group, device, salt)
        order = np.random.default_rng([salt, group.rank]).permutation(len(started))
        for number in order if salt else range(len(started))[::-1]:
            work, check = started[number]
            check(work.wait())


def polled_at_random(group: ProcessGroup, device: Place) -> None:
    """Many operations outstanding while each rank polls in its own random pattern."""
    for salt in range(3):
        rng = np.random.default_rng([99, salt, group.rank])
        open_ = _start_many(group, device, salt)
        while open_:
            number = int(rng.integers(len(open_)))
            work, check = open_[number]
            action = rng.integers(8)
            if action == 0:
                group.progress()
            elif action == 1 and rng.random() < 0.2:
                time.sleep(rng.uniform(0, 0.002))
            elif work.done():
                check(work.wait())
                del open_[number]


def waited_twice(group: ProcessGroup, device: Place) -> None:
    """Wait twice for the same result; done stays true."""
    work = collectives.iall_reduce(device.put(np.ones(5)), group)
    first = work.wait()
    check_that(work.wait() is first, "a second wait gave another result")
    expect(device.take(first), np.full(5, float(group.size)), "iall_reduce waited for twice")
    check_that(work.synchronize() is first, "synchronize gave another result")
    check_that(work.done() and work.done(), "not done after synchronize")


def dropped(group: ProcessGroup, device: Place) -> None:
    """Operations whose Work nobody keeps are completed all the same, at the latest by close."""
    sub = group.duplicate("dropped")
    device.ready(sub)
    rank, size = group.rank, group.size
    sums, gathered = device.put(np.zeros((3, 1000))), device.put(np.zeros((3, size)))
    for number in range(3):
        collectives.iall_reduce(device.put(np.full(1000, float(rank))), sub, out=sums[number])
        collectives.iall_gather(device.put(np.full(1, float(rank))), sub, out=gathered[number])
    ones = [np.ones(7), np.ones(7, np.int64)]
    pair = [device.put(np.zeros_like(x)) for x in ones]
    collectives.iall_reduce_coalesced([device.put(x) for x in ones], sub, outs=pair)
    gc.collect()
    after = collectives.all_reduce(device.put(np.ones(3)), sub)
    expect(device.take(after), np.full(3, float(size)), "after dropping")
    sub.close()
    total = np.full((3, 1000), sum(range(size)), np.float64)
    expect(device.take(sums), total, "dropped iall_reduces")
    expect(device.take(gathered), np.tile(np.arange(float(size)), (3, 1)), "dropped iall_gathers")
    for out in pair:
        got = device.take(out)
        expect(got, np.full_like(got, size), "a dropped iall_reduce_coalesced")


def immediate(group: ProcessGroup, device: Place) -> None:
    """Rank 0 starts a collective, then sends a message; the others start theirs only on it.

    A verb that waits inside its immediate form would never return from it here.
    """
    token = np.zeros(0)
    device.ready(group)
    for verb in VERBS.values():
        for rows in (2, 900):
            trial = Trial(verb, rows=rows, root=group.size - 1)
            if group.rank == 0:
                begun = begin(trial, group, device)
                for dst in range(1, group.size):
                    point_to_point.send(token, group, dst=dst)
            else:
                point_to_point.recv(group, src=0)
                begun = begin(trial, group, device)
            begun.check(begun.work.wait())
    if group.rank == 0:
        work = collectives.ibarrier(group)
        check_that(group.size == 1 or not work.done(), "a barrier without the others was complete")
        for dst in range(1, group.size):
            point_to_point.send(token, group, dst=dst)
    else:
        point_to_point.recv(group, src=0)
        work = collectives.ibarrier(group)
    work.wait()


def progress_is_enough(group: ProcessGroup, device: Place) -> None:
    """`group.progress()` alone brings operations of several phases to their end."""
    works = [begin(Trial(VERBS["all_reduce"], rows=900, seed=k), group, device) for k in range(3)]
    deadline = time.monotonic() + min(group.timeout, 30.0)
    while group.operations.outstanding and time.monotonic() < deadline:
        group.progress()
    check_that(not group.operations.outstanding, "progress alone did not complete the operations")
    for begun in works:
        begun.check(begun.work.wait())
