"""Cases of groups that carry host and device arrays at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mpidist import collectives, point_to_point
from mpidist._types import Array
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.point_to_point import Receive, Send
from mpidist.testing.contract._landings import fresh, given
from mpidist.testing.contract._memory import HOST, Place, with_peers
from mpidist.testing.contract._values import check_that, expect, expect_error
from mpidist.testing.contract._verbs import VERBS, Begun, Trial, attempt, begin, call

CALLS = 60


def interleaved(group: ProcessGroup, device: Place) -> None:
    """Host and device arrays in random order, blocking and immediate, waited for in another.

    Results are looked at in the end: who waits for a device with CuPy drives no host operation.
    """
    device.ready(group)
    common, own = np.random.default_rng(7), np.random.default_rng([8, group.rank])
    verbs = tuple(VERBS.values())
    under_way: list[Begun] = []
    checks: list[Callable[[], None]] = []

    def finish(begun: Begun) -> None:
        checks.append(partial(begun.check, begun.work.synchronize()))

    for number in range(CALLS):
        trial = Trial(
            verbs[common.integers(len(verbs))],
            rows=int(common.choice((1, 5, 700))),
            dtype=np.dtype((np.float32, np.float64)[common.integers(2)]),
            root=int(common.integers(group.size)),
            landing=(fresh, given)[common.integers(2)],
            seed=number,
        )
        where = (HOST, device)[common.integers(2)]
        if common.random() < 0.3:
            checks.append(call(trial, group, where))
        else:
            under_way.append(begin(trial, group, where))
        if own.random() < 0.3 and under_way:
            finish(under_way.pop(int(own.integers(len(under_way)))))
    for begun in under_way:
        finish(begun)
    for check in checks:
        check()


def both_in_one_call(group: ProcessGroup, device: Place) -> None:
    """Refuse a host array with a device array for its result, and the other way round."""
    for verb in VERBS.values():
        for first, second in ((HOST, device), (device, HOST)):

            def elsewhere(
                x: Array, result: Array | None, second: Place = second
            ) -> tuple[Array, Array | None]:
                """Pass an `out` of the other kind."""
                return x, None if result is None else second.put(np.empty_like(result))

            # The root alone would notice it; so each is the root of its own call.
            trial = Trial(verb, root=group.rank, landing=elsewhere)
            wrong = partial(attempt, trial, group, first)
            expect_error(UnsupportedOperationError, wrong, str(trial), verb.name, "out", str(group))
    for first, second in ((HOST, device), (device, HOST)):
        x, out = first.put(np.ones(3)), second.put(np.ones(3))
        wrong = partial(collectives.all_reduce_coalesced, [x], group, outs=[out])
        expect_error(UnsupportedOperationError, wrong, "coalesced", "outs[0]", str(group))
    check_that(not group.operations.outstanding, "a refused call has left something under way")


def mixed_lists(group: ProcessGroup, device: Place) -> None:
    """Coalesced lists of host and device arrays: each result lies where its array does."""
    size = group.size
    devices = [HOST, device, device, HOST, device]
    own = [np.full(3 + number, number + group.rank) for number in range(len(devices))]
    sums = [np.full(x.shape, sum(range(number, number + size))) for number, x in enumerate(own)]
    arrays = [where.put(x.copy()) for where, x in zip(devices, own, strict=True)]

    def check(results: list[Array], wanted: list[Array], where: str) -> None:
        for number, (lying, got) in enumerate(zip(devices, results, strict=True)):
            expect(lying.take(got), wanted[number], f"{where}, array {number}")

    check(collectives.all_reduce_coalesced(arrays, group), sums, "all_reduce_coalesced")
    work = collectives.iall_gather_coalesced(arrays, group)
    gathered = [np.repeat(np.arange(number, number + size), len(x)) for number, x in enumerate(own)]
    check(work.wait(), gathered, "iall_gather_coalesced")
    collectives.all_reduce_coalesced(arrays, group, outs=arrays)
    check(arrays, sums, "all_reduce_coalesced in place")


@with_peers
def mixed_messages(group: ProcessGroup, device: Place) -> None:
    """Messages of host and device arrays in one exchange, received in the order of the list."""
    device.ready(group)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    devices = [device, HOST, HOST, device]
    sends = [
        Send(where.put(np.full(4, 10 * group.rank + n)), after) for n, where in enumerate(devices)
    ]
    receives = [Receive(before, out=where.put(np.zeros(4, int))) for where in devices]
    got = point_to_point.exchange(group, sends=sends, receives=receives).wait()
    for number, (where, x) in enumerate(zip(devices, got, strict=True)):
        check_that(x is receives[number].out, f"message {number}: the result is not `out`")
        expect(where.take(x), np.full(4, 10 * before + number), f"message {number}")


def mixed_groups(group: ProcessGroup, device: Place) -> None:
    """Carry both on groups made of the group, at the same time."""
    for made in (
        group.duplicate("both"),
        group.split(group.rank % 2, -group.rank),
        group.new_group(tuple(reversed(range(group.size)))),
    ):
        check_that(made is not None, "no group was made")
        if made is None:
            continue
        device.ready(made)
        works: list[tuple[Place, Any]] = []
        for number, where in enumerate((HOST, device, device, HOST)):
            x = where.put(np.full(50, float(number + made.rank)))
            works.append((where, collectives.iall_reduce(x, made)))
        for number, (where, work) in reversed(list(enumerate(works))):
            total = float(sum(number + rank for rank in range(made.size)))
            expect(where.take(work.wait()), np.full(50, total), f"sum {number} on {made}")
        made.close()
