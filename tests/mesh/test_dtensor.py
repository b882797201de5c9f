"""DTensor on simulated ranks: values beside numpy's, bits, messages, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mpidist
from mpidist import (
    BAND,
    MAX,
    MEAN,
    PROD,
    SUM,
    Box,
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
)
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.errors import (
    CollectiveMismatchError,
    InvalidRankError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.mesh import box_at
from mpidist.mesh.transfer import Redistribute, Total
from mpidist.testing import DeliveryMode, run_ranks
from tests.mesh.cases import CHOSEN, check_case, check_deadlines, hand_cut, some_case

EXAMPLES = int(os.environ.get("MPIDIST_TEST_EXAMPLES", "0"))


@pytest.mark.parametrize("case", CHOSEN, ids=repr)
def test_a_redistribution_is_numpys(case):
    run_ranks(4, lambda group: check_case(group, case))


@pytest.mark.parametrize("mode", DeliveryMode, ids=lambda mode: mode.value)
def test_it_may_be_waited_for_later(mode):
    def body(group):
        for case in CHOSEN:
            check_case(group, case, immediate=True)

    run_ranks(4, body, mode=mode, node_memory=True)


@pytest.mark.parametrize(
    "examples", [60, pytest.param(2000, marks=[pytest.mark.full, pytest.mark.timeout(600)])]
)
def test_every_pair_of_placements_on_every_mesh_is_numpys(examples):
    """More of a new seed each time: MPIDIST_TEST_EXAMPLES=5000."""

    @settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def check(random):
        case, immediate = some_case(random), random.random() < 0.3
        run_ranks(4, lambda group: check_case(group, case, immediate=immediate))

    check()


def on_mesh(size, fn, *, node_memory=False, **sizes):
    """Call a function on simulated ranks with the mesh of them."""

    def body(group):
        with DeviceMesh(group, **sizes) as mesh:
            return fn(group, mesh)

    return run_ranks(size, body, node_memory=node_memory)


@pytest.mark.parametrize("root", [0, 2, None])
@pytest.mark.parametrize("shape", [(5, 3), (0, 2), ()], ids=str)
def test_distribute_cuts_the_array_of_a_rank(root, shape):
    x = np.arange(1.0, np.prod(shape) + 1).reshape(shape)

    def body(group, mesh):
        ways = [(Replicate(), Replicate()), (Partial(), Partial()), (Replicate(), Partial(MAX))]
        if shape:
            ways += [(Shard(0), Shard(0)), (Shard(1), Replicate()), (Partial(PROD), Shard(1))]
        for placements in ways:
            holds = root is None or group.rank == root
            y = DTensor.distribute(x if holds else None, mesh, placements, root=root)
            assert (y.shape, y.dtype, y.placements) == (shape, x.dtype, placements)
            assert y.box == box_at(shape, (2, 2), placements, mesh.coordinate)
            if not any(isinstance(one, Partial) for one in placements):
                wanted = hand_cut(x, (2, 2), placements, mesh.coordinate)
                np.testing.assert_array_equal(y.local, wanted)
            assert not np.may_share_memory(y.local, x)
            np.testing.assert_array_equal(y.full(), x)

    on_mesh(4, body, dp=2, tp=2)


def test_partial_sums_are_added_in_the_order_of_the_ranks_whatever_becomes_of_them():
    rng = np.random.default_rng(3)
    for dtype in (np.float32, np.float16, BFLOAT16):
        parts = [(rng.normal(size=(5, 3)) * 10.0**e).astype(dtype) for e in (-2, 2, 0, -1)]
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total = total + part.astype(np.float32)
        total = total.astype(dtype)

        def body(group, mesh, parts=parts, total=total):
            x = DTensor(parts[group.rank], mesh, [Partial(), Partial()])
            for target in [
                (Replicate(), Replicate()),
                (Shard(0), Shard(1)),
                (Shard(1), Replicate()),
            ]:
                y = x.redistribute(target)
                wanted = hand_cut(total, (2, 2), target, mesh.coordinate)
                assert y.local.tobytes() == np.ascontiguousarray(wanted).tobytes()

        for node_memory in (False, True):
            on_mesh(4, body, dp=2, tp=2, node_memory=node_memory)


@pytest.mark.parametrize("node_memory", [False, True])
def test_a_call_may_have_a_deadline_of_its_own(node_memory):
    run_ranks(3, check_deadlines, node_memory=node_memory, timeout=60)


def test_only_what_changes_hands_is_sent(monkeypatch):
    """Bytes that each rank sends of an array of 1,024 on 2 x 2 ranks: the least there can be."""
    sent = [0] * 4

    def counted(steps):
        def counting(call, lane):
            exchange = lane.exchange

            def count(sends=(), receives=()):
                sent[lane.rank] += sum(array.nbytes for array, _ in sends)
                return exchange(sends, receives)

            lane.exchange = count
            return steps(call, lane)

        return counting

    quarter = 256
    pairs = [
        ([Shard(0), Shard(0)], [Shard(0), Shard(0)], [0] * 4),
        ([Replicate()] * 2, [Shard(0), Shard(1)], [0] * 4),
        ([Replicate()] * 2, [Partial(), Partial()], [0] * 4),
        ([Shard(0), Shard(1)], [Replicate(), Partial()], [1, 2, 1, 2]),
        ([Shard(0), Replicate()], [Replicate(), Replicate()], [2] * 4),
        ([Shard(0), Shard(0)], [Replicate(), Replicate()], [3] * 4),
        ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [0, 1, 1, 0]),
        ([Partial(), Partial()], [Shard(0), Shard(0)], [3] * 4),
        ([Partial(), Partial()], [Replicate(), Replicate()], [6] * 4),
        ([Shard(0), Partial()], [Shard(0), Shard(0)], [1] * 4),
    ]

    def body(group, mesh):
        for source, target, expected in pairs:
            x = DTensor.distribute(np.zeros((16, 16), np.float32), mesh, source, root=None)
            sent[group.rank] = 0
            x.redistribute(target)
            assert sent[group.rank] == expected[group.rank] * quarter, (source, target, sent)
        # The root sends each element once, and each rank passes on what it has got.
        sent[group.rank] = 0
        DTensor.distribute(np.zeros((16, 16), np.float32), mesh, [Replicate()] * 2)
        assert sent[group.rank] == (6 if group.rank == 0 else 3) * quarter

    for kind in (Redistribute, Total):
        monkeypatch.setattr(kind, "steps", counted(kind.steps))
    on_mesh(4, body, dp=2, tp=2)


def test_of_several_holders_one_of_the_node_sends():
    def body(group, mesh):
        # Columns of the mesh are replicas, on nodes 0 and 1.
        x = DTensor.distribute(np.arange(8.0), mesh, [Replicate(), Shard(0)], root=None)
        x.local += 100 * group.node_rank  # replicas that differ show who has sent
        return x.redistribute([Replicate(), Replicate()]).local

    def on_nodes(group):
        return body(group, DeviceMesh.by_node(group))

    for rank, array in enumerate(run_ranks(4, on_nodes, ranks_per_node=2)):
        np.testing.assert_array_equal(array, np.arange(8.0) + 100 * (rank // 2))


def test_the_local_array_is_the_one_that_was_given():
    def body(group, mesh):
        strided = np.arange(12.0).reshape(2, 6)[:, ::2]
        x = DTensor(strided, mesh, [Shard(0)])
        assert x.local is strided
        assert x.shape == (4, 3)
        assert x.dtype == np.float64
        swapped = DTensor(np.arange(3, dtype=">f4"), mesh, [Shard(0)])
        assert swapped.dtype == np.float32
        np.testing.assert_array_equal(swapped.full(), [0, 1, 2] * 2)
        np.testing.assert_array_equal(x.full(), np.vstack([strided, strided]))

    on_mesh(2, body, all=2)


def test_a_shape_is_summed_over_uneven_and_empty_parts():
    def body(group, mesh):
        DTensor(np.zeros(([2, 1, 1, 0][group.rank], 3)), mesh, [Shard(0)])

    with pytest.raises(SizeMismatchError, match=r"rank 0 gave a part of shape \(2, 3\)") as info:
        on_mesh(4, body, all=4)
    assert "of an array of shape (4, 3), the sum of all parts, has to have shape (1, 3)" in str(
        info.value
    )

    def uneven(group, mesh):
        rows = [2, 1, 1, 1][group.rank]
        assert DTensor(np.zeros((rows, 3)), mesh, [Shard(0)]).shape == (5, 3)
        rows = [1, 1, 1, 0][group.rank]
        assert DTensor(np.zeros((2, rows)), mesh, [Shard(1)]).shape == (2, 3)

    on_mesh(4, uneven, all=4)


def test_empty_is_as_large_as_this_ranks_part():
    def body(group, mesh):
        x = DTensor.empty((5, 3), mesh, [Shard(0), Replicate()], dtype=np.int32)
        assert x.local.shape == x.box.sizes == ((3, 3), (2, 3))[mesh.coordinate[0]]
        x.local[...] = np.arange(15).reshape(5, 3)[x.box.slices]
        np.testing.assert_array_equal(x.full(), np.arange(15).reshape(5, 3))
        with pytest.raises(UnsupportedOperationError, match="device must be 'cpu' or 'gpu'"):
            DTensor.empty((5,), mesh, [Replicate()] * 2, device="tpu")

    on_mesh(4, body, dp=2, tp=2)


def test_a_sub_mesh_has_arrays_of_its_own():
    def body(group, mesh):
        rows = mesh["tp"]
        x = DTensor(np.full((1, 2), group.rank), rows, [Shard(0)])
        first = group.rank // 2 * 2
        np.testing.assert_array_equal(x.full(), [[first] * 2, [first + 1] * 2])

    on_mesh(4, body, dp=2, tp=2)


def test_it_calculates_nothing():
    def body(group, mesh):
        x = DTensor(np.ones(3), mesh, [Replicate()])
        ways = [
            lambda: x + 1,
            lambda: 1 + x,
            lambda: np.ones(3) * x,
            lambda: x @ np.ones(3),
            lambda: -x,
            lambda: x == 3,
            lambda: x < 3,
            lambda: x[0],
            lambda: list(x),
            lambda: bool(x),
            lambda: np.asarray(x),
        ]
        for way in ways:
            with pytest.raises(
                TypeError, match=r"calculates nothing: use x\.local, .* x\.full\(\)"
            ):
                way()
        with pytest.raises(TypeError, match="does not support ufuncs"):
            np.exp(x)
        with pytest.raises(TypeError, match="connects processes"):
            pickle.dumps(x)
        with pytest.raises(TypeError, match="connects processes"):
            copy.deepcopy(x)
        assert {x: 1}[x] == 1

    on_mesh(1, body, all=1)


def test_it_says_what_it_is():
    def body(group, mesh):
        x = DTensor(np.zeros((2, 3), np.float32), mesh, [Shard(0), Replicate()])
        return repr(x)

    texts = on_mesh(2, body, dp=2, tp=1)
    assert texts[1] == (
        "DTensor(float32[4, 3], [Shard(0), Replicate()], (2, 3) here) on "
        "DeviceMesh(dp=2, tp=1) of group 'world', rank 1 of 2, at (1, 0)"
    )


# -- what is refused -----------------------------------------------------------------------------

ONES = np.ones((2, 3))

DIFFERENT = {
    "placements": (
        lambda mesh, odd: DTensor(ONES, mesh, [Shard(int(odd)), Replicate()]),
        r"different placements: rank 2: \[Shard\(1\), Replicate\(\)\]; rank 0-1, 3: \[Shard\(0\),",
    ),
    "dtype": (
        lambda mesh, odd: DTensor(ONES.astype("f4" if odd else "f8"), mesh, [Shard(0)] * 2),
        "different dtypes: rank 2: float32; rank 0-1, 3: float64",
    ),
    "dimensions": (
        lambda mesh, odd: DTensor(ONES[0] if odd else ONES, mesh, [Shard(0)] * 2),
        "different numbers of dimensions: rank 2: 1; rank 0-1, 3: 2",
    ),
    "shape": (
        lambda mesh, odd: DTensor(ONES, mesh, [Shard(0)] * 2, shape=(8 + odd, 3)),
        r"different shape=: rank 2: \(9, 3\); rank 0-1, 3: \(8, 3\)",
    ),
    "mesh": (
        lambda mesh, odd: DTensor(
            ONES, DeviceMesh(mesh.base, a=1, b=4) if odd else mesh, [Shard(0)] * 2
        ),
        r"different meshes: rank 2: \(a=1, b=4\); rank 0-1, 3: \(dp=2, tp=2\)",
    ),
    "root": (
        lambda mesh, odd: DTensor.distribute(ONES, mesh, [Shard(0)] * 2, root=int(odd)),
        "different roots: rank 2: 1; rank 0-1, 3: 0",
    ),
    "distributed placements": (
        lambda mesh, odd: DTensor.distribute(ONES, mesh, [Shard(int(odd)), Shard(0)]),
        "distribute on .* different placements",
    ),
    "distributed shape": (
        lambda mesh, odd: DTensor.distribute(ONES[odd:], mesh, [Shard(0)] * 2, root=None),
        r"different shapes: rank 2: \(1, 3\); rank 0-1, 3: \(2, 3\)",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_named_on_every_rank(name):
    make, message = DIFFERENT[name]

    def body(group, mesh):
        with pytest.raises(CollectiveMismatchError, match=message):
            make(mesh, group.rank == 2)
        return mpidist.all_reduce(np.array(1), group)  # the group can be used

    assert on_mesh(4, body, dp=2, tp=2) == [4] * 4


@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("node_memory", [False, True])
def test_a_redistribution_to_different_placements_moves_nothing(node_memory, immediate):
    def body(group, mesh):
        x = DTensor(np.full((2, 2), group.rank), mesh, [Shard(0), Partial()])
        target = [Shard(0), Replicate()] if group.rank == 2 else [Shard(1), Replicate()]
        with pytest.raises(CollectiveMismatchError) as info:
            x.iredistribute(target).wait() if immediate else x.redistribute(target)
        np.testing.assert_array_equal(x.local, np.full((2, 2), group.rank))
        if not immediate:  # of simulated ranks an immediate call is under way when it is compared
            np.testing.assert_array_equal(x.full()[:2], np.full((2, 2), 1))
        return str(info.value)

    message = on_mesh(4, body, dp=2, tp=2, node_memory=node_memory)[0]
    what = "redistribute int64[4, 2] of [Shard(0), Partial(SUM)] on (dp=2, tp=2) to"
    assert f"rank 2 called {'i' * immediate}{what} [Shard(0), Replicate()]" in message
    assert f"rank 0-1, 3 called {'i' * immediate}{what} [Shard(1), Replicate()]" in message
    assert "tests/mesh/test_dtensor.py" in message


WRONG_ON_ONE = {
    "a list": (lambda mesh: DTensor([1, 2], mesh, [Shard(0)] * 2), "local: expected a numpy"),
    "None": (lambda mesh: DTensor(None, mesh, [Shard(0)] * 2), "local: expected a numpy"),
    "text": (lambda mesh: DTensor(np.array(["a"]), mesh, [Shard(0)] * 2), "local has dtype <U1"),
    "long double": (
        lambda mesh: DTensor(np.ones(2, np.longdouble), mesh, [Shard(0)] * 2),
        "local has dtype float128",
    ),
    "too few": (lambda mesh: DTensor(ONES, mesh, [Shard(0)]), "mesh's 2 dimensions, got 1"),
    "dimension": (lambda mesh: DTensor(ONES, mesh, [Shard(2)] * 2), r"Shard\(2\) cuts a dim"),
    "no placement": (lambda mesh: DTensor(ONES, mesh, [0, 1]), "placements must be a list"),
    "mean of integers": (
        lambda mesh: DTensor(np.ones(2, int), mesh, [Partial(MEAN)] * 2),
        r"Partial\(MEAN\) of int64 has no meaning; int64 is reduced by SUM, PROD",
    ),
    "bits of floats": (
        lambda mesh: DTensor(ONES, mesh, [Partial(BAND)] * 2),
        r"Partial\(BAND\) of float64 has no meaning; float64 is reduced by SUM, MEAN",
    ),
    "shape of floats": (
        lambda mesh: DTensor(ONES, mesh, [Shard(0)] * 2, shape=(8.0, 3)),
        "shape must hold whole numbers",
    ),
    "negative shape": (
        lambda mesh: DTensor(ONES, mesh, [Shard(0)] * 2, shape=(-8, 3)),
        "none negative",
    ),
    "shape of a boolean": (
        lambda mesh: DTensor(ONES, mesh, [Shard(0)] * 2, shape=(True, 3)),
        "whole numbers",
    ),
    "fewer dimensions": (
        lambda mesh: DTensor(ONES, mesh, [Shard(1)] * 2, shape=(8,)),
        r"as many dimensions as local, 2; got \(8,\)",
    ),
    "distributed list": (
        lambda mesh: DTensor.distribute([1, 2], mesh, [Shard(0)] * 2, root=2),
        "distribute on group 'world', rank 2 of 4: x: expected a numpy or cupy array, got",
    ),
}


@pytest.mark.parametrize("name", WRONG_ON_ONE)
def test_what_is_wrong_on_one_rank_is_raised_on_all(name):
    make, message = WRONG_ON_ONE[name]

    def body(group, mesh):
        right = partial(DTensor, ONES, mesh, [Shard(0)] * 2, shape=(8, 3))
        if "distribute" in name:
            right = partial(DTensor.distribute, None, mesh, [Shard(0)] * 2, root=2)
        with pytest.raises((UnsupportedOperationError, SizeMismatchError), match=message) as info:
            make(mesh) if group.rank == 2 else right()
        assert "rank 2 of 4" in str(info.value)
        return mpidist.all_reduce(np.array(1), group)

    assert on_mesh(4, body, dp=2, tp=2) == [4] * 4


def test_a_part_of_another_shape_is_refused_on_all_ranks():
    def body(group, mesh):
        rows = 3 if group.rank == 1 else 2
        for shape, wanted in ((None, (9, 3)), ((8, 3), (8, 3)), ((2**70, 3), (2**70, 3))):
            with pytest.raises(SizeMismatchError) as info:
                DTensor(np.ones((rows, 3)), mesh, [Shard(0), Shard(0)], shape=shape)
            added = ", the sum of all parts," if shape is None else ""
            assert f"of an array of shape {wanted}{added} has to have" in str(info.value)
            assert "on the mesh (dp=2, tp=2)" in str(info.value)

    on_mesh(4, body, dp=2, tp=2)


def test_arguments_of_a_redistribution_are_checked_before_anything_moves():
    def body(group, mesh):
        x = DTensor(ONES.astype(int), mesh, [Shard(0), Replicate()])
        other = group.new_group([group.rank])
        before = group.operations.begun
        for call, error, message in [
            (lambda: x.redistribute([Shard(0)]), SizeMismatchError, "2 dimensions, got 1"),
            (lambda: x.redistribute([Shard(2)] * 2), SizeMismatchError, "does not have; it has 2"),
            (lambda: x.redistribute(Replicate()), UnsupportedOperationError, "must be a list"),
            (
                lambda: x.iredistribute([Partial(MEAN), Replicate()]),
                UnsupportedOperationError,
                r"Partial\(MEAN\) of int64",
            ),
            (
                lambda: x.redistribute([Partial(SUM), Partial(MAX)]),
                UnsupportedOperationError,
                "MAX and SUM",
            ),
            (
                lambda: x.redistribute([Replicate()], mesh=group),
                UnsupportedOperationError,
                "mesh must be a DeviceMesh",
            ),
            (
                lambda: x.redistribute([Replicate()], mesh=mesh["tp"]),
                UnsupportedOperationError,
                r"same ranks.*ranks 0-3, and is to move to DeviceMesh\(tp=2\)",
            ),
            (
                lambda: x.redistribute([Replicate()], mesh=DeviceMesh(other, all=1)),
                UnsupportedOperationError,
                "made of the same group",
            ),
            (lambda: DTensor(ONES, group, [Shard(0)]), UnsupportedOperationError, "a DeviceMesh"),
            (
                lambda: DTensor.distribute(ONES, mesh, [Shard(0)] * 2, root=4),
                InvalidRankError,
                "root must be a rank from 0 to 3, got 4",
            ),
            (
                lambda: DTensor.empty((2, -1), mesh, [Shard(0)] * 2),
                SizeMismatchError,
                "DTensor.empty: shape must",
            ),
            (
                lambda: DTensor.empty((2,), mesh, [Replicate()] * 2, dtype=object),
                UnsupportedOperationError,
                "DTensor.empty: dtype must be boolean, integer.*; got object",
            ),
            (
                lambda: DTensor.empty((2,), mesh, [Replicate()] * 2, dtype="M8[s]"),
                UnsupportedOperationError,
                r"got datetime64\[s\]",
            ),
        ]:
            with pytest.raises(error, match=message):
                call()
        assert group.operations.begun == before
        other.close()

    on_mesh(4, body, dp=2, tp=2)


def test_an_array_of_another_shape_put_in_its_place_is_refused():
    """Of one that is larger, a part would be taken."""

    def body(group, mesh):
        x = DTensor(ONES, mesh, [Shard(0), Replicate()])
        x.local = np.ones((3, 3))
        for move in (x.full, lambda: x.redistribute([Shard(1)] * 2)):
            with pytest.raises(SizeMismatchError, match=r"\(3, 3\) now, .*has shape \(2, 3\)"):
                move()
        x.local = 2 * ONES
        np.testing.assert_array_equal(x.full(), np.full((4, 3), 2.0))

    on_mesh(4, body, dp=2, tp=2)


def test_a_partial_array_is_no_shard():
    def body(group, mesh):
        x = DTensor(ONES, mesh, [Shard(0), Partial()])
        with pytest.raises(UnsupportedOperationError, match=r"is partial: .*Reduce it before"):
            x.sharded()
        y = x.redistribute([Shard(0), Replicate()]).sharded()
        assert list(y.pieces) == [Box((2 * mesh.coordinate[0], 0), (2, 3))]

    on_mesh(4, body, dp=2, tp=2)
