"""Cases of operations that are under way together."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidist import collectives, point_to_point
from mpidist.arrays import BFLOAT16
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.testing.contract._values import check_that, expect
from mpidist.testing.contract._verbs import VERBS, Trial, begin

OUTSTANDING = 20

Check = Callable[[Any], None]


def _nothing(_: Any) -> None:
    """Accept anything."""


def _start_many(group: ProcessGroup, salt: int) -> list[tuple[Work[Any], Check]]:
    """Start `OUTSTANDING` operations of all kinds, long and short, the same on all ranks."""
    started: list[tuple[Work[Any], Check]] = []
    kinds = [*VERBS.values(), None]
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for number in range(OUTSTANDING):
        verb = kinds[number % len(kinds)]
        rows = (3, 400, 1, 37)[(number + salt) % 4]
        if verb is not None:
            dtype = np.dtype((np.float64, np.float16, np.int32, BFLOAT16)[number % 4])
            root = number % group.size
            begun = begin(Trial(verb, rows=rows, dtype=dtype, root=root, seed=number), group)
            started.append((begun.work, begun.check))
        elif group.size > 1:
            wanted = np.full(rows, before + number)
            started.append((collectives.ibarrier(group), _nothing))
            started.append((point_to_point.irecv(group, src=before, tag=number), _equal(wanted)))
            x = np.full(rows, group.rank + number)
            started.append((point_to_point.isend(x, group, dst=after, tag=number), _nothing))
    return started


def _equal(wanted: Any) -> Check:
    return lambda result: expect(result, wanted, "message among many operations")


def waited_in_any_order(group: ProcessGroup) -> None:
    """Many operations outstanding, waited for in an order of each rank's own."""
    for salt in range(3):
        started = _start_many(group, salt)
        order = np.random.default_rng([salt, group.rank]).permutation(len(started))
        for place in order if salt else range(len(started))[::-1]:
            work, check = started[place]
            check(work.wait())


def polled_at_random(group: ProcessGroup) -> None:
    """Many operations outstanding while each rank polls in its own random pattern."""
    for salt in range(3):
        rng = np.random.default_rng([99, salt, group.rank])
        open_ = _start_many(group, salt)
        while open_:
            place = int(rng.integers(len(open_)))
            work, check = open_[place]
            action = rng.integers(8)
            if action == 0:
                group.progress()
            elif action == 1 and rng.random() < 0.2:
                time.sleep(rng.uniform(0, 0.002))
            elif work.done():
                check(work.wait())
                del open_[place]


def waited_twice(group: ProcessGroup) -> None:
    """Wait twice for the same result; done stays true."""
    work = collectives.iall_reduce(np.ones(5), group)
    first = work.wait()
    check_that(work.done() and work.wait() is first, "a second wait gave another result")
    check_that(work.synchronize() is first, "synchronize gave another result")
    expect(first, np.full(5, float(group.size)), "iall_reduce waited for twice")


def dropped(group: ProcessGroup) -> None:
    """Operations whose Work nobody keeps are completed all the same, at the latest by close."""
    sub = group.duplicate("dropped")
    sums, gathered = np.zeros((3, 1000)), np.zeros((3, group.size))
    for number in range(3):
        collectives.iall_reduce(np.full(1000, float(group.rank)), sub, out=sums[number])
        collectives.iall_gather(np.full(1, float(group.rank)), sub, out=gathered[number])
    pair = [np.zeros(7), np.zeros(7, np.int64)]
    collectives.iall_reduce_coalesced([np.ones(7), np.ones(7, np.int64)], sub, outs=pair)
    gc.collect()
    expect(collectives.all_reduce(np.ones(3), sub), np.full(3, float(group.size)), "after dropping")
    sub.close()
    for number in range(3):
        total = np.full(1000, sum(range(group.size)), np.float64)
        expect(sums[number], total, "a dropped iall_reduce")
        expect(gathered[number], np.arange(float(group.size)), "a dropped iall_gather")
    for out in pair:
        expect(out, np.full_like(out, group.size), "a dropped iall_reduce_coalesced")


def immediate(group: ProcessGroup) -> None:
    """Rank 0 starts a collective, then sends a message; the others start theirs only on it.

    A verb that waits inside its immediate form never comes back from it here.
    """
    token = np.zeros(0)
    for verb in VERBS.values():
        for rows in (2, 900):
            trial = Trial(verb, rows=rows, root=group.size - 1)
            if group.rank == 0:
                begun = begin(trial, group)
                for dst in range(1, group.size):
                    point_to_point.send(token, group, dst=dst)
            else:
                point_to_point.recv(group, src=0)
                begun = begin(trial, group)
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


def progress_is_enough(group: ProcessGroup) -> None:
    """`group.progress()` alone brings operations of several phases to their end."""
    works = [begin(Trial(VERBS["all_reduce"], rows=900, seed=k), group) for k in range(3)]
    deadline = time.monotonic() + min(group.timeout, 30.0)
    while group._outstanding and time.monotonic() < deadline:
        group.progress()
    check_that(not group._outstanding, "progress alone did not complete the operations")
    for begun in works:
        begun.check(begun.work.wait())
