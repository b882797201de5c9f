from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from mpidist import Box, ShardedArray
from mpidist.checkpoint.saving.plan import (
    ArrayMetadata,
    LocalMetadata,
    make_global_plan,
    view_of,
)
from mpidist.errors import CollectiveMismatchError, SizeMismatchError
from tests.checkpoint.cases import WHOLE, boxes_of, small_sizes, some_sharding


def declared(kinds, held, size):
    """What each of the ranks would say."""
    said = [LocalMetadata() for _ in range(size)]
    for name, kind in kinds.items():
        for rank, mine in enumerate(held[name]):
            if mine == WHOLE:
                said[rank].arrays[name] = kind
            elif mine is not None:
                boxes = tuple(boxes_of(mine, kind.shape))
                said[rank].sharded[name] = (kind, boxes)
    return said


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("seed", range(5))
def test_each_element_is_written_once_by_a_rank_that_holds_it(size, seed):
    random = Random(seed)
    kinds = {
        f"x{n}": ArrayMetadata(
            "float32", tuple(random.choice([0, 1, 4, 9, 30]) for _ in range(n % 4))
        )
        for n in range(12)
    }
    held = {name: some_sharding(random, kind.shape, size) for name, kind in kinds.items()}
    with small_sizes(64, 8, 64):
        plan = make_global_plan(declared(kinds, held, size))
    assert plan.arrays == kinds
    times = {name: np.zeros(kind.shape, int) for name, kind in kinds.items()}
    for rank, items in enumerate(plan.local_plans):
        for part in items:
            times[part.name][part.box.slices] += 1
            mine = held[part.name][rank]
            assert part.held in (boxes_of(mine, kinds[part.name].shape) | {part.box})
            assert mine is not None
            part.box.relative_to(part.held)
    for name, painted in times.items():
        assert (painted == 1).all(), name


@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_all_hold_is_shared_out_evenly(size):
    rng = np.random.default_rng(size)
    shapes = [(3000, 1000), (7, 40_000), (1_000_000,), (1, 5, 300_000), (11, 13), ()]
    shapes += [(int(n),) for n in rng.integers(1, 50_000, 60)]
    whole = {f"x{n}": ArrayMetadata("float64", shape) for n, shape in enumerate(shapes)}
    plan = make_global_plan([LocalMetadata(arrays=whole)] * size)
    parts = [[8 * part.box.count for part in items] for items in plan.local_plans]
    sums = [sum(some) for some in parts]
    largest = max(itertools.chain(*parts))
    assert max(sums) <= sum(sums) / size + largest
    # A part that is worth a dataset of its own, but not all of a large array.
    assert largest <= max(2 << 20, 3000 * 1000 * 8 / size * 1.01)


def test_who_holds_a_part_alone_writes_less_of_the_rest():
    kind, alone = ArrayMetadata("float64", (8, 1000)), ArrayMetadata("float64", (2, 1 << 16))
    said = [LocalMetadata(arrays={f"x{n}": kind for n in range(8)}) for _ in range(2)]
    said[1].sharded["alone"] = (alone, (Box((0, 0), (2, 1 << 16)),))
    plan = make_global_plan(said)
    assert [len(items) for items in plan.local_plans] == [8, 1]


def test_a_box_that_several_hold_is_written_by_one_of_them():
    kind = ArrayMetadata("int8", (4,))
    first, second = Box((0,), (2,)), Box((2,), (2,))
    said = [
        LocalMetadata(sharded={"x": (kind, boxes)}) for boxes in [(first,), (first, second), ()]
    ]
    plan = make_global_plan(said)
    assert [[part.box for part in mine] for mine in plan.local_plans] == [[first], [second], []]


def sharded(*boxes, shape=(4, 2), dtype="float32"):
    return LocalMetadata(sharded={"x": (ArrayMetadata(dtype, shape), boxes)})


TOP, LOWER, REST = Box((0, 0), (2, 2)), Box((1, 0), (2, 2)), Box((2, 0), (2, 2))


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (
            [sharded(TOP), sharded(REST, dtype="float64")],
            CollectiveMismatchError,
            r"'x' is float64\[4, 2\] on rank 1 and float32\[4, 2\] on rank 0",
        ),
        (
            [sharded(TOP), LocalMetadata(), sharded(REST, shape=(5, 2))],
            CollectiveMismatchError,
            r"'x' is float32\[5, 2\] on rank 2 and float32\[4, 2\] on rank 0",
        ),
        (
            [sharded(TOP), LocalMetadata(arrays={"x": ArrayMetadata("float32", (2, 2))})],
            CollectiveMismatchError,
            r"'x' is float32\[2, 2\] on rank 1 .*ShardedArray, if each rank",
        ),
        ([sharded(TOP), sharded(LOWER, REST)], SizeMismatchError, "'x': .*overlap"),
        ([sharded(TOP), sharded()], SizeMismatchError, "'x': 4 of 8 elements"),
        ([sharded(), sharded()], SizeMismatchError, "'x': 8 of 8 elements"),
        (
            [sharded(TOP), LocalMetadata(arrays={"x": ArrayMetadata("float32", (4, 2))})],
            SizeMismatchError,
            "'x': .*overlap",
        ),
        (
            [LocalMetadata(values={"a": 1}), LocalMetadata(), LocalMetadata(values={"a": 1.0})],
            CollectiveMismatchError,
            r"'a' is 1\.0 on rank 2 and 1 on rank 0",
        ),
        (
            [LocalMetadata(values={"a": list(range(99))}), LocalMetadata(values={"a": []})],
            CollectiveMismatchError,
            r"'a' is \[\] on rank 1 and \[0, 1, .{,60}\.\.\. on rank 0",
        ),
    ],
)
def test_what_does_not_fit_together(said, error, words):
    with pytest.raises(error, match=words):
        make_global_plan(said)


def test_values_of_all_ranks_are_kept():
    nan = float("nan")
    said = [LocalMetadata(values={"a": nan}), LocalMetadata(values={"a": nan, "b": [2]})]
    values = make_global_plan(said).values
    assert repr(values) == "{'a': nan, 'b': [2]}"


def test_a_part_is_a_view():
    whole = np.arange(24).reshape(4, 6)
    plan = make_global_plan([LocalMetadata(arrays={"x": ArrayMetadata("int64", (4, 6))})])
    (part,) = plan.local_plans[0]
    assert view_of(whole, part).base is not None
    np.testing.assert_array_equal(view_of(whole, part), whole)
    held = ShardedArray((8, 6), int, {Box((4, 0), (4, 6)): whole})
    cut = part._replace(held=Box((4, 0), (4, 6)), box=Box((5, 2), (2, 3)))
    assert np.shares_memory(view_of(held, cut), whole)
    np.testing.assert_array_equal(view_of(held, cut), whole[1:3, 2:5])
