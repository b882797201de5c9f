from __future__ import annotations

import time

import numpy as np

from mpidist._types import SUM
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.parallel import BUCKET_BYTES, FIRST_BUCKET_BYTES, BucketSizes
from mpidist.parallel.data.buckets import Bucket, assign_buckets
from mpidist.parallel.data.compression import exchange_for
from mpidist.testing import run_ranks


def arrays_of(*sizes: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {f"p{i}": np.empty(size, dtype) for i, size in enumerate(sizes)}


def test_buckets_are_closed_by_the_array_that_reaches_the_limit():
    arrays = arrays_of(10, 10, 10, 10, 10, 10)  # 40 bytes each
    assert assign_buckets(arrays, BucketSizes(first=40, rest=100)) == [
        ["p5"],
        ["p4", "p3", "p2"],
        ["p1", "p0"],
    ]


def test_default_sizes_are_1_and_25_mib():
    assert (FIRST_BUCKET_BYTES, BUCKET_BYTES) == (2**20, 25 * 2**20)
    quarter = 2**20 // 16  # 256 KiB of float32
    buckets = assign_buckets(arrays_of(*[quarter] * 110), BucketSizes())
    assert [len(bucket) for bucket in buckets] == [4, 100, 6]


def test_each_dtype_has_its_buckets_and_they_stand_in_the_order_of_completion():
    arrays = {
        "a": np.empty(10, np.float64),
        "b": np.empty(10, np.float32),
        "c": np.empty(10, BFLOAT16),
        "d": np.empty(10, np.float64),
        "e": np.empty(10, np.float32),
    }
    # float32 is complete with b, bfloat16 with c, float64 only with a.
    assert assign_buckets(arrays, BucketSizes()) == [["c"], ["e", "b"], ["d", "a"]]


def test_100_000_arrays_take_less_than_a_second():
    arrays = dict.fromkeys(map(str, range(100_000)), np.empty(2, np.float32))  # 8 bytes each
    began = time.process_time()
    buckets = assign_buckets(arrays, BucketSizes(first=400_000, rest=2**40))
    assert time.process_time() - began < 1
    assert [len(bucket) for bucket in buckets] == [50_000, 50_000]


def test_no_arrays_make_no_buckets():
    assert assign_buckets({}, BucketSizes()) == []


def test_gradients_are_views_that_begin_on_cache_lines():
    like = [("w", np.empty((3, 5))), ("scalar", np.empty(())), ("none", np.empty((0, 4)))]
    bucket = Bucket(like, num_flags=3)
    assert {name: g.shape for name, g in bucket.grads.items()} == {
        "w": (3, 5),
        "scalar": (),
        "none": (0, 4),
    }
    for i, grad in enumerate(bucket.grads.values()):
        assert np.shares_memory(grad, bucket.data) or grad.size == 0
        grad[...] = i + 1
    bucket.flags[...] = 9
    np.testing.assert_array_equal(bucket.data, [1.0] * 15 + [0.0] + [2.0] + [0.0] * 7 + [9.0] * 3)


def test_an_exchange_knows_its_bucket():
    def body(group):
        bucket = Bucket([("a", np.empty(2)), ("b", np.empty(1))])
        bucket.exchange = exchange_for(None, bucket, group, SUM)
        assert bucket.missing == {"a", "b"}
        bucket.missing.clear()
        bucket.grads["a"][...] = [group.rank, 1]
        bucket.grads["b"][...] = 2
        bucket.work = bucket.exchange()
        bucket.work.wait()
        assert bucket.work.done()
        return bucket.grads["a"].tolist() + bucket.grads["b"].tolist()

    assert run_ranks(3, body) == [[3.0, 3.0, 6.0]] * 3
