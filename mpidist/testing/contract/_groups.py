"""Cases of groups made from groups."""

from __future__ import annotations

from functools import partial

import numpy as np

from mpidist import collectives, point_to_point
from mpidist._types import MAX
from mpidist.errors import GroupBrokenError, InvalidRankError
from mpidist.group import ProcessGroup
from mpidist.testing.contract._values import check_that, expect, expect_error, with_peers
from mpidist.testing.contract._verbs import VERBS, Trial, attempt


def _works(group: ProcessGroup, ranks: tuple[int, ...]) -> None:
    """Check who is in a group (ranks of the world), and that every verb works on it."""
    check_that(group.ranks == ranks, f"{group}: expected ranks {ranks}, got {group.ranks}")
    check_that(group.size == len(ranks), f"{group}: size {group.size}")
    for rank, world_rank in enumerate(ranks):
        check_that(group.rank_of(world_rank) == rank, f"{group}.rank_of({world_rank})")
    check_that(group.rank_of(10_000) is None, f"{group}.rank_of of a non-member")
    whoami = np.array([ranks[group.rank]])
    expect(collectives.all_gather(whoami, group), np.array(ranks), f"all_gather on {group}")
    for number, verb in enumerate(VERBS.values()):
        attempt(Trial(verb, rows=2, root=number % group.size, seed=number), group)
    if group.size > 1:
        after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        got = point_to_point.sendrecv(whoami, group, dst=after, src=before)
        expect(got, np.array([ranks[before]]), f"sendrecv on {group}")


def splits(group: ProcessGroup) -> None:
    """Colors, keys that reverse the order, equal keys, and a rank that takes part in none."""
    rank, size = group.rank, group.size
    halves = group.split(rank % 2, -rank)
    check_that(halves is not None, "split gave None to a rank with a color")
    if halves is not None:
        _works(halves, tuple(reversed(range(rank % 2, size, 2))))
        halves.close()
    together = group.split(7, 0, name="together")
    check_that(together is not None and together.name == "together", "split with a name")
    if together is not None:
        _works(together, tuple(range(size)))
    without = group.split(None if rank == size - 1 else 3, rank)
    check_that((without is None) == (rank == size - 1), "split with color None")
    if without is not None:
        _works(without, tuple(range(size - 1)))


def new_groups(group: ProcessGroup) -> None:
    """Any members in any order; a non-member gets None at once, and need not call at all."""
    rank, size = group.rank, group.size
    backwards = tuple(reversed(range(size)))
    made = group.new_group(backwards)
    check_that(made is not None, "new_group gave None to a member")
    if made is not None:
        _works(made, backwards)
    for _ in range(2):  # the same members twice: two groups
        pair = tuple(sorted({0, size - 1}))
        if rank in pair:
            both = group.new_group(pair)
            check_that(both is not None, "new_group gave None to a member")
            if both is not None:
                _works(both, pair)
    for other in range(size):
        alone = group.new_group([other], name=f"only {other}")
        check_that((alone is None) == (other != rank), "membership of a group of one")
        if alone is not None:
            _works(alone, (rank,))


@with_peers
def overlapping_groups(group: ProcessGroup) -> None:
    """Use groups that share ranks at once, and in another order on each rank."""
    rank, size = group.rank, group.size
    lower, upper = tuple(range(size - 1)), tuple(range(1, size))
    groups = [group.new_group(lower), group.new_group(upper), group.duplicate("copy"), group]
    works = []
    for number, one in enumerate(groups):
        if one is not None:
            x = np.full(500 + number, float(rank))
            works.append((one, collectives.iall_reduce(x, one)))
            works.append((one, collectives.iall_reduce(x + 1, one, op=MAX)))
    order = np.random.default_rng([5, rank]).permutation(len(works))
    for place in order:
        one, work = works[place]
        result = work.wait()
        expected = float(max(one.ranks) + 1) if place % 2 else float(sum(one.ranks))
        expect(result, np.full(result.shape, expected), f"operation {place} on {one}")


@with_peers
def nested_groups(group: ProcessGroup) -> None:
    """Make groups of groups; ranks of the world are kept."""
    left = group.split(group.rank >= group.size // 2, group.rank)
    check_that(left is not None, "split gave None to a rank with a color")
    if left is None:
        return
    half = group.size // 2
    members = tuple(range(half)) if group.rank < half else tuple(range(half, group.size))
    _works(left, members)
    flipped = left.new_group(tuple(reversed(range(left.size))))
    check_that(flipped is not None, "new_group gave None to a member")
    if flipped is not None:
        _works(flipped, tuple(reversed(members)))
        single = flipped.split(flipped.rank)
        if single is not None:
            _works(single, (group.ranks[group.rank],))


@with_peers
def duplicates(group: ProcessGroup) -> None:
    """Operations on a duplicate never meet those of the original."""
    copy = group.duplicate("copy")
    check_that(copy.ranks == group.ranks and copy.name == "copy", f"{copy}: ranks {copy.ranks}")
    rank, size = group.rank, group.size
    after, before = (rank + 1) % size, (rank - 1) % size
    first, second = (group, copy) if rank % 2 else (copy, group)
    marks = {id(group): 1.0, id(copy): 2.0}
    sums = {
        id(one): collectives.iall_reduce(np.array([marks[id(one)]]), one) for one in (group, copy)
    }
    receives = {id(one): point_to_point.irecv(one, src=before) for one in (first, second)}
    sends = [
        point_to_point.isend(np.array([marks[id(one)]]), one, dst=after) for one in (second, first)
    ]
    for one in (second, first):
        expect(receives[id(one)].wait(), np.array([marks[id(one)]]), f"message on {one}")
        expect(sums[id(one)].wait(), np.array([size * marks[id(one)]]), f"sum on {one}")
    for work in sends:
        work.wait()


def nodes(group: ProcessGroup) -> None:
    """Compare the groups of a node and across nodes with the ranks' own numbers."""
    facts = collectives.all_gather_object((group.node_rank, group.local_rank), group)
    check_that(facts[group.rank] == (group.node_rank, group.local_rank), f"{facts}")
    same = [rank for rank, (node, _) in enumerate(facts) if node == group.node_rank]
    check_that(group.local_size == len(same), f"local_size {group.local_size}")
    check_that(same.index(group.rank) == group.local_rank, f"local_rank {group.local_rank}")
    check_that({node for node, _ in facts} == set(range(group.num_nodes)), f"nodes {facts}")
    mine = group.node_group()
    _works(mine, tuple(group.ranks[rank] for rank in same))
    check_that(group.node_group() is mine, "a second node_group is another one")
    smallest = min([node for node, _ in facts].count(node) for node in range(group.num_nodes))
    cross = group.cross_group()
    check_that((cross is None) == (group.local_rank >= smallest), f"cross_group {cross}")
    if cross is not None:
        column = [
            group.ranks[rank] for rank, (_, local) in enumerate(facts) if local == group.local_rank
        ]
        _works(cross, tuple(column))


def closing(group: ProcessGroup) -> None:
    """Close a group, twice: it refuses every verb, others go on."""
    with group.duplicate("short") as short:
        pending = collectives.iall_reduce(np.ones(3), short)
    expect(pending.wait(), np.full(3, float(group.size)), "a Work after close")
    short.close()
    for call in (
        lambda: collectives.barrier(short),
        lambda: collectives.iall_reduce(np.ones(1), short),
        lambda: short.split(0),
        lambda: short.new_group([short.rank]),
        short.progress,
    ):
        expect_error(GroupBrokenError, call, "a verb on a closed group", "short", "closed")
    collectives.barrier(group)


def bad_members(group: ProcessGroup) -> None:
    """Member lists that name no group are refused on all ranks, with nothing sent."""
    for ranks in ([], [0, 0], [group.size], [-1], [0, group.size + 3]):
        expect_error(InvalidRankError, partial(group.new_group, ranks), f"{ranks}", "new_group")
    collectives.barrier(group)
