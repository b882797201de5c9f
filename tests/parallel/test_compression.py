from __future__ import annotations

import numpy as np
import pytest

from mpidist._types import MEAN, SUM
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.backends.work import Work
from mpidist.collectives import iall_reduce
from mpidist.nn import Linear
from mpidist.parallel import DDP, BucketSizes, Compression, GradientReducer
from mpidist.parallel.data import compression
from mpidist.parallel.data.buckets import Bucket
from mpidist.testing import run_ranks
from tests.parallel.checks import TRAINING

HALF = {Compression.FP16: np.dtype(np.float16), Compression.BF16: BFLOAT16}


def values(rank, dtype):
    return np.random.default_rng(rank).normal(size=64).astype(dtype)


def reduce_with(group, like, **options):
    with GradientReducer({"g": like}, group, **options) as reducer:
        for _ in range(2):  # the second step finds used buffers
            reducer.grads["g"][...] = values(group.rank, like.dtype)
            reducer.ready("g")
            reducer.wait()
        return reducer.grads["g"].copy()


@pytest.mark.parametrize("kind", Compression)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("op", [MEAN, SUM])
def test_gradients_are_rounded_summed_in_float32_and_rounded_once(kind, dtype, op):
    half = HALF[kind]
    total = np.zeros(64, np.float32)
    for rank in range(3):
        total += values(rank, dtype).astype(half).astype(np.float32)
    if op is MEAN:
        total /= np.float32(3)
    expected = total.astype(half).astype(dtype)

    for got in run_ranks(3, lambda g: reduce_with(g, np.empty(64, dtype), op=op, compression=kind)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", Compression)
def test_half_the_bytes_travel(kind, monkeypatch):
    sent = []

    def recorded(x, group, *, op, out):
        sent.append((x.dtype, x.size))
        return iall_reduce(x, group, op=op, out=out)

    monkeypatch.setattr(compression, "iall_reduce", recorded)
    run_ranks(2, lambda g: reduce_with(g, np.empty(64, np.float32), compression=kind))
    assert sent == [(HALF[kind], 65)] * 4  # and one flag


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.complex64])
def test_what_is_narrow_or_complex_travels_as_it_is(dtype):
    dtype = np.dtype(dtype)
    for kind in Compression:
        assert kind.wire_dtype(dtype) == dtype


def test_what_a_half_cannot_hold_becomes_an_infinity():
    def body(group):
        like = np.empty(2, np.float32)
        with GradientReducer({"g": like}, group, compression=Compression.FP16) as reducer:
            reducer.grads["g"][...] = [1e6, 1]
            reducer.ready("g")
            reducer.wait()
            return reducer.grads["g"].tolist()

    assert run_ranks(2, body) == [[np.inf, 1.0]] * 2


class Halved(Work[None]):
    """The result of another work, halved once."""

    def __init__(self, work, bucket):
        self.work, self.bucket = work, bucket

    def done(self):
        return self.work.done()

    def wait(self, timeout=None):
        self.work.wait(timeout)
        self.bucket /= 2


def test_a_hook_is_called_per_bucket_and_its_result_is_taken():
    def body(group):
        calls = []

        def hook(bucket, hook_group, op):
            calls.append((bucket.size, op, hook_group.ranks))
            return Halved(iall_reduce(bucket, hook_group, op=op, out=bucket), bucket)

        layer = Linear(4, 2, rng=0, dtype=np.float64)
        ddp = DDP(layer, group, op=SUM, compression=hook, sizes=BucketSizes(1, 1))
        with ddp:
            _, ctx = ddp.forward(np.full((1, 4), group.rank + 1.0), TRAINING)
            ddp.backward(ctx, np.ones((1, 2)))
        return calls, layer.weight.grad.copy(), layer.bias.grad.copy()

    for calls, weight, bias in run_ranks(2, body):
        # Gradients only, padded to cache lines; who was used travels apart.
        assert calls == [(8, SUM, (0, 1)), (8, SUM, (0, 1))]
        np.testing.assert_array_equal(weight, np.full((2, 4), 1.5))
        np.testing.assert_array_equal(bias, [1.0, 1.0])


def test_a_second_wait_does_not_bring_the_old_values_back():
    def body(group):
        bucket = Bucket([("a", np.ones(3, np.float32))])
        bucket.data[...] = 1
        work = compression.exchange_for(Compression.BF16, bucket, group, SUM)()
        while not work.done():
            pass
        work.wait()
        bucket.grads["a"][...] = 7
        work.wait()
        return bucket.grads["a"].tolist()

    assert run_ranks(2, body) == [[7.0] * 3] * 2
