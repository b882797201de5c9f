"""Cases of groups made from groups."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mpidist import collectives, point_to_point
from mpidist._types import MAX
from mpidist.errors import GroupBrokenError, InvalidRankError, UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.point_to_point import Receive, Send
from mpidist.testing.contract._memory import Place, with_peers
from mpidist.testing.contract._values import check_that, expect, expect_error
from mpidist.testing.contract._verbs import VERBS, Trial, attempt


def _works(group: ProcessGroup, ranks: tuple[int, ...], device: Place) -> None:
    """Check who is in a group (ranks of the world), and that every verb works on it."""
    check_that(group.ranks == ranks, f"{group}: expected ranks {ranks}, got {group.ranks}")
    check_that(group.size == len(ranks), f"{group}: size {group.size}")
    for rank, world_rank in enumerate(ranks):
        check_that(group.rank_of(world_rank) == rank, f"{group}.rank_of({world_rank})")
    check_that(group.rank_of(10_000) is None, f"{group}.rank_of of a non-member")
    whoami = device.put(np.array([ranks[group.rank]]))
    everyone = device.take(collectives.all_gather(whoami, group))
    expect(everyone, np.array(ranks), f"all_gather on {group}")
    for number, verb in enumerate(VERBS.values()):
        attempt(Trial(verb, rows=2, root=number % group.size, seed=number), group, device)
    if group.size > 1:
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        out = device.put(np.zeros(1, int))
        got = point_to_point.sendrecv(whoami, group, dst=after, src=before, out=out)
        expect(device.take(got), np.array([ranks[before]]), f"sendrecv on {group}")


def _member(made: ProcessGroup | None, what: str) -> ProcessGroup:
    """Return the group that a member of it has got."""
    if made is None:
        raise AssertionError(f"{what} gave None to a member")
    return made


def splits(group: ProcessGroup, device: Place) -> None:
    """Colors, keys that reverse the order, equal keys, and a rank that takes part in none."""
    rank, size = group.rank, group.size
    halves = _member(group.split(rank % 2, -rank), "split")
    _works(halves, tuple(reversed(range(rank % 2, size, 2))), device)
    halves.close()
    together = _member(group.split(7, 0, name="together"), "split")
    check_that(together.name == "together", "split with a name")
    _works(together, tuple(range(size)), device)
    without = group.split(None if rank == size - 1 else 3, rank)
    check_that((without is None) == (rank == size - 1), "split with color None")
    if without is not None:
        _works(without, tuple(range(size - 1)), device)


def new_groups(group: ProcessGroup, device: Place) -> None:
    """Any members in any order; a non-member gets None at once, and need not call at all."""
    rank, size = group.rank, group.size
    backwards = tuple(reversed(range(size)))
    _works(_member(group.new_group(backwards), "new_group"), backwards, device)
    for _ in range(2):  # the same members twice: two groups
        pair = tuple(sorted({0, size - 1}))
        if rank in pair:
            _works(_member(group.new_group(pair), "new_group"), pair, device)
    for other in range(size):
        alone = group.new_group([other], name=f"only {other}")
        check_that((alone is None) == (other != rank), "membership of a group of one")
        if alone is not None:
            _works(alone, (rank,), device)


@with_peers
def overlapping_groups(group: ProcessGroup, device: Place) -> None:
    """Use groups that share ranks at once, and in another order on each rank."""
    rank, size = group.rank, group.size
    lower, upper = tuple(range(size - 1)), tuple(range(1, size))
    groups = [group.new_group(lower), group.new_group(upper), group.duplicate("copy"), group]
    works = []
    for number, one in enumerate(groups):
        if one is not None:
            device.ready(one)
            x = device.put(np.full(500 + number, float(rank)))
            works.append((one, collectives.iall_reduce(x, one)))
            works.append((one, collectives.iall_reduce(x + 1, one, op=MAX)))
    order = np.random.default_rng([5, rank]).permutation(len(works))
    for number in order:
        one, work = works[number]
        result = device.take(work.wait())
        expected = float(max(one.ranks) + 1) if number % 2 else float(sum(one.ranks))
        expect(result, np.full(result.shape, expected), f"operation {number} on {one}")


@with_peers
def nested_groups(group: ProcessGroup, device: Place) -> None:
    """Make groups of groups; ranks of the world are kept."""
    left = _member(group.split(group.rank >= group.size // 2, group.rank), "split")
    half = group.size // 2
    members = tuple(range(half)) if group.rank < half else tuple(range(half, group.size))
    _works(left, members, device)
    flipped = _member(left.new_group(tuple(reversed(range(left.size)))), "new_group")
    _works(flipped, tuple(reversed(members)), device)
    single = _member(flipped.split(flipped.rank), "split")
    _works(single, (group.ranks[group.rank],), device)


@with_peers
def duplicates(group: ProcessGroup, device: Place) -> None:
    """Operations on a duplicate never match those of the original."""
    copy = group.duplicate("copy")
    check_that(copy.ranks == group.ranks and copy.name == "copy", f"{copy}: ranks {copy.ranks}")
    rank, size = group.rank, group.size
    after, before = (rank + 1) % size, (rank - 1) % size
    # On a device each rank has to start the operations of two communicators in the same order.
    swapped = device.on_host and rank % 2
    marks = {id(group): 1.0, id(copy): 2.0}
    sums, rings = {}, {}
    for one in (group, copy):
        device.ready(one)
    for one in (group, copy):
        sums[id(one)] = collectives.iall_reduce(device.put(np.array([marks[id(one)]])), one)
    for one in (copy, group) if swapped else (group, copy):
        sends = [Send(device.put(np.array([marks[id(one)]])), after)]
        receives = [Receive(before, out=device.put(np.zeros(1)))]
        rings[id(one)] = point_to_point.exchange(one, sends=sends, receives=receives)
    for one in (copy, group) if rank % 2 else (group, copy):
        (received,) = rings[id(one)].wait()
        expect(device.take(received), np.array([marks[id(one)]]), f"message on {one}")
        total = device.take(sums[id(one)].wait())
        expect(total, np.array([size * marks[id(one)]]), f"sum on {one}")


def nodes(group: ProcessGroup, device: Place) -> None:
    """Compare the groups of a node and across nodes with the ranks' own numbers."""
    facts = collectives.all_gather_object((group.node_rank, group.local_rank), group)
    check_that(facts[group.rank] == (group.node_rank, group.local_rank), f"{facts}")
    same = [rank for rank, (node, _) in enumerate(facts) if node == group.node_rank]
    check_that(group.local_size == len(same), f"local_size {group.local_size}")
    check_that(same.index(group.rank) == group.local_rank, f"local_rank {group.local_rank}")
    check_that({node for node, _ in facts} == set(range(group.num_nodes)), f"nodes {facts}")
    node_group = group.node_group()
    _works(node_group, tuple(group.ranks[rank] for rank in same), device)
    check_that(group.node_group() is node_group, "a second node_group is another one")
    smallest = min([node for node, _ in facts].count(node) for node in range(group.num_nodes))
    cross_group = group.cross_group()
    is_none = group.local_rank >= smallest
    check_that((cross_group is None) == is_none, f"cross_group {cross_group}")
    if cross_group is not None:
        column = [
            group.ranks[rank] for rank, (_, local) in enumerate(facts) if local == group.local_rank
        ]
        _works(cross_group, tuple(column), device)


def closing(group: ProcessGroup, device: Place) -> None:
    """Close a group, twice: it refuses every verb, others go on."""
    with group.duplicate("short") as short:
        pending = collectives.iall_reduce(device.put(np.ones(3)), short)
    expect(device.take(pending.wait()), np.full(3, float(group.size)), "a Work after close")
    short.close()
    for call in (
        lambda: collectives.barrier(short),
        lambda: collectives.iall_reduce(device.put(np.ones(1)), short),
        lambda: short.split(0),
        lambda: short.new_group([short.rank]),
        short.progress,
    ):
        expect_error(GroupBrokenError, call, "a verb on a closed group", "short", "closed")
    collectives.barrier(group)


def bad_members(group: ProcessGroup, _device: Place) -> None:
    """Member lists that name no group are refused on all ranks, with nothing sent."""
    mask = [True] * group.size
    lists: list[Any] = [[], [0, 0], [group.size], [-1], [0, group.size + 3]]
    lists += [mask[:1], [*mask[:1], False], np.array(mask), [0.0], [0.9], np.array([0.5]), ["0"], 0]
    for ranks in lists:
        expect_error(InvalidRankError, partial(group.new_group, ranks), f"{ranks}", "new_group")
    number: Any
    for number in (0.0, True, "0"):
        expect_error(InvalidRankError, partial(group.rank_of, number), f"{number}", "rank_of")
    pairs: list[tuple[Any, Any]] = [(0.0, 0), (0, 0.0), (-1, 0), (2**31, 0), ("a", 0), (0, None)]
    for color, key in pairs:
        cut = partial(group.split, color, key)
        parts = ("split", f"color {color!r}, key {key!r}")
        expect_error(UnsupportedOperationError, cut, f"{color}, {key}", *parts)
    collectives.barrier(group)
