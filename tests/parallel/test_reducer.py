from __future__ import annotations

import threading

import numpy as np
import pytest

from mpidist._types import MAX, MEAN, SUM
from mpidist.collectives import all_reduce
from mpidist.errors import CollectiveTimeoutError, UnsupportedOperationError
from mpidist.group.operations import Operations
from mpidist.parallel import BucketSizes, Compression, GradientReducer
from mpidist.parallel.data import compression
from mpidist.testing import Faults, Mode, run_ranks
from tests.parallel.checks import SHAPES, TINY, check_reduction, likes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("op", [MEAN, SUM])
@pytest.mark.parametrize("sizes", [TINY, BucketSizes()], ids=["tiny", "default"])
def test_ranks_may_finish_their_gradients_in_any_order(size, op, sizes):
    run_ranks(size, check_reduction, op, sizes)


@pytest.mark.parametrize("mode", Mode)
def test_delays_do_no_harm(mode):
    run_ranks(3, check_reduction, MEAN, TINY, mode=mode, faults=Faults(delay=3e-3), seed=7)


def test_buckets_start_in_index_order_as_soon_as_they_are_complete(monkeypatch):
    events: dict[int, list] = {0: [], 1: []}
    lock = threading.Lock()

    start = Operations.start

    def recorded(operations, call, finish, timeout=None):
        assert call.out is call.x
        with lock:
            events[operations.state.rank].append((call.verb, call.x.nbytes))
        return start(operations, call, finish, timeout)

    monkeypatch.setattr(Operations, "start", recorded)
    shapes = {"a": (16,), "b": (8,), "c": (24,)}
    orders = {0: "cba", 1: "acb"}

    def body(group):
        like = {name: np.zeros(shape) for name, shape in shapes.items()}
        with GradientReducer(like, group, sizes=TINY) as reducer:
            for name in orders[group.rank]:
                with lock:
                    events[group.rank].append(name)
                reducer.ready(name)
            reducer.wait()

    run_ranks(2, body)
    c, b, a = ("all_reduce", 192), ("all_reduce", 64), ("all_reduce", 128 + 3 * 8)  # flags
    assert events[0] == ["c", c, "b", b, "a", a]
    assert events[1] == ["a", "c", c, "b", b, a]


def test_a_bucket_is_under_way_before_the_last_gradient_comes():
    def body(group):
        with GradientReducer({"a": np.ones(1), "b": np.ones(1)}, group, sizes=TINY) as reducer:
            reducer.grads["b"][...] = group.rank
            reducer.ready("b")
            assert not reducer.done()
            bucket = reducer._bucket_of["b"]
            while not bucket.work.done():  # although nobody has made "a" ready
                pass
            reducer.grads["a"][...] = 1
            reducer.ready("a")
            while not reducer.done():
                pass
            reducer.wait()
            return reducer.grads["b"][0]

    assert run_ranks(3, body) == [1.0] * 3


@pytest.mark.parametrize("how", [None, Compression.FP16, compression.plain])
def test_skipped_gradients_count_as_zeros_and_are_told(how):
    def body(group):
        with GradientReducer(likes("f4"), group, compression=how) as reducer:
            for name in SHAPES:
                reducer.grads[name][...] = 8
            reducer.skip("a")  # on all
            (reducer.skip if group.rank else reducer.ready)("b")  # on some
            for name in "cde":
                reducer.ready(name)
            assert reducer.wait() == {"b", "c", "d", "e"}
            assert (reducer.grads["a"] == 0).all()
            assert (reducer.grads["b"] == 2).all()
            assert (reducer.grads["d"] == 8).all()
            for name in SHAPES:
                reducer.ready(name)
            assert reducer.wait() == set(SHAPES)

    run_ranks(4, body)


def test_misuse_names_the_gradient_and_does_no_harm():
    def body(group):
        with GradientReducer(likes(), group) as reducer:
            with pytest.raises(ValueError, match="no gradient is named 'z'; known: a, b, c, d, e"):
                reducer.ready("z")
            with pytest.raises(ValueError, match="'z'"):
                reducer.skip("z")
            for name in "abcd":
                reducer.grads[name][...] = 1
                reducer.ready(name)
            with pytest.raises(RuntimeError, match="'b' is complete already"):
                reducer.ready("b")
            with pytest.raises(RuntimeError, match="'b' is complete already"):
                reducer.skip("b")
            with pytest.raises(RuntimeError, match="1 of 5 gradients have not come: e;"):
                reducer.wait()
            reducer.ready("e")
            reducer.wait()
            assert (reducer.grads["b"] == 1).all()

    run_ranks(2, body)


@pytest.mark.parametrize(
    ("arrays", "op", "text"),
    [
        ({"w": np.ones(2)}, MAX, "MEAN or SUM"),
        ({"w": np.ones(2)}, "sum", "MEAN or SUM, got sum"),
        ({"w": np.ones(2, np.int64)}, SUM, "'w' has dtype int64"),
        ({"w": np.ones(2, bool)}, MEAN, "'w' has dtype bool"),
    ],
)
def test_what_cannot_be_averaged_is_refused(arrays, op, text):
    def body(group):
        with pytest.raises(UnsupportedOperationError, match=text):
            GradientReducer(arrays, group, op=op)

    run_ranks(2, body)


def test_dtypes_may_be_mixed():
    dtypes = {"a": np.float16, "b": np.float32, "c": np.complex64, "d": np.float64}

    def body(group):
        like = {name: np.empty(3, dtype) for name, dtype in dtypes.items()}
        with GradientReducer(like, group) as reducer:
            for name in dtypes:
                reducer.grads[name][...] = group.rank
                reducer.ready(name)
            reducer.wait()
            for name, dtype in dtypes.items():
                assert reducer.grads[name].dtype == dtype
                np.testing.assert_array_equal(reducer.grads[name], np.full(3, 1, dtype))

    run_ranks(3, body)


def test_nothing_to_reduce_is_allowed():
    def body(group):
        with GradientReducer({}, group) as reducer:
            assert reducer.done()
            assert reducer.wait() == frozenset()

    run_ranks(2, body)


def test_the_callers_collectives_do_not_meet_the_reducers():
    def body(group):
        with GradientReducer({"a": np.empty(4), "b": np.empty(4)}, group, sizes=TINY) as reducer:
            # Rank 0 starts its first bucket before this all_reduce, rank 1 after it.
            if group.rank == 0:
                reducer.grads["b"][...] = 1
                reducer.ready("b")
            met = all_reduce(np.full(4, 10.0 + group.rank), group)
            if group.rank == 1:
                reducer.grads["b"][...] = 2
                reducer.ready("b")
            reducer.grads["a"][...] = 0
            reducer.ready("a")
            reducer.wait()
            return met[0], reducer.grads["b"][0]

    assert run_ranks(2, body) == [(21.0, 1.5)] * 2


def test_a_rank_that_stays_away_is_a_timeout():
    def body(group):
        reducer = GradientReducer({"a": np.ones(1)}, group)
        if group.rank == 0:
            reducer.ready("a")
            with pytest.raises(CollectiveTimeoutError):
                reducer.wait(timeout=0.1)

    run_ranks(2, body)
