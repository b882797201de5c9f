"""The sampler's shares, put together by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mpidist._types import Array
from mpidist.data import Batch, ShardedSampler

SIZES = (1, 2, 3, 4, 7)
PINNED = [[0, 3, 7, 5, 1, 2, 6, 4], [3, 7, 4, 2, 1, 6, 5, 0]]


def samplers(size: int, num_samples: int = 23, **options: Any) -> list[ShardedSampler]:
    options = {"batch_size": 5, "seed": 3, **options}
    return [ShardedSampler(num_samples, rank=r, size=size, **options) for r in range(size)]


def joined(size: int, num_samples: int = 23, **options: Any) -> list[Array]:
    """Return the joined batch of each step of one epoch, checking the ranks' shares."""
    epochs = [list(sampler) for sampler in samplers(size, num_samples, **options)]
    assert len({len(epoch) for epoch in epochs}) == 1
    position, batches = 0, []
    for shares in zip(*epochs, strict=True):
        counts = [len(share.indices) for share in shares]
        assert {share.global_size for share in shares} == {sum(counts)}
        assert max(counts) - min(counts) <= 1
        for share, count in zip(shares, counts, strict=True):
            assert share.sample_offset == position
            position += count
        batches.append(np.concatenate([share.indices for share in shares]))
    return batches


@pytest.mark.parametrize("size", SIZES)
def test_every_sample_once_and_the_tail_uneven(size: int) -> None:
    batches = joined(size)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(23))


@pytest.mark.parametrize("size", SIZES[1:])
def test_joined_batches_are_the_same_for_every_number_of_ranks(size: int) -> None:
    for mine, alone in zip(joined(size), joined(1), strict=True):
        np.testing.assert_array_equal(mine, alone)


def test_a_rank_may_have_no_sample() -> None:
    last = [list(sampler)[-1] for sampler in samplers(7)]
    assert [len(batch.indices) for batch in last] == [1, 1, 1, 0, 0, 0, 0]
    assert {batch.global_size for batch in last} == {3}
    assert last[6].indices.dtype == np.int64


@pytest.mark.parametrize("size", SIZES)
def test_drop_last_leaves_out_the_batch_that_is_not_full(size: int) -> None:
    assert [len(batch) for batch in joined(size, drop_last=True)] == [5, 5, 5, 5]
    assert [len(batch) for batch in joined(size, 20, drop_last=True)] == [5, 5, 5, 5]


def test_order_without_shuffle_is_the_data_sets_own() -> None:
    np.testing.assert_array_equal(np.concatenate(joined(3, shuffle=False)), np.arange(23))


def test_order_depends_on_seed_and_epoch() -> None:
    (sampler,), (again,), (other,) = samplers(1), samplers(1), samplers(1, seed=4)

    def epoch(one: ShardedSampler) -> list[int]:
        return [int(i) for batch in one for i in batch.indices]

    first, second = epoch(sampler), epoch(sampler)
    assert sampler.epoch == 2
    assert [first, second] == [epoch(again), epoch(again)]
    assert len({tuple(first), tuple(second), tuple(epoch(other))}) == 3


def test_order_is_pinned() -> None:
    # Runs are resumed under other versions of numpy: these numbers may never change.
    (sampler,) = samplers(1, num_samples=8, batch_size=8, seed=0)
    assert [list(batch.indices) for _ in range(2) for batch in sampler] == PINNED


def test_the_shuffle_is_fair() -> None:
    sampler = ShardedSampler(4, rank=0, size=1, batch_size=4, seed=0)
    counts = np.zeros((4, 4))
    for _ in range(2000):
        for batch in sampler:
            counts[np.arange(4), batch.indices] += 1
    # Each sample stands at each position 500 times, give or take five standard deviations.
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize("done", range(12))
def test_resumes_on_another_number_of_ranks(done: int) -> None:
    (alone,) = samplers(1)
    history: list[Batch] = [batch for _ in range(3) for batch in alone]
    (begun,) = samplers(1)
    taken = 0
    while taken < done:
        for _ in begun:
            taken += 1
            if taken == done:
                break
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = samplers(3)
    for sampler in resumed:
        sampler.load_state_dict(state)
    rest: list[Array] = []
    while len(rest) < len(history) - done:
        assert {len(sampler) for sampler in resumed} == {5 - (done + len(rest)) % 5}
        steps = list(zip(*resumed, strict=True))
        rest += [np.concatenate([share.indices for share in shares]) for shares in steps]
    assert len(rest) == len(history) - done
    for mine, batch in zip(rest, history[done:], strict=True):
        np.testing.assert_array_equal(mine, batch.indices)


@pytest.mark.parametrize("step", [0, 3, 5, 12])
def test_skip_to_counts_over_epochs(step: int) -> None:
    (alone,), (skipped,) = samplers(1), samplers(1)
    history = [batch for _ in range(3) for batch in alone]
    skipped.skip_to(step)
    assert skipped.epoch == step // 5
    for batch, expected in zip(skipped, history[step:], strict=False):
        np.testing.assert_array_equal(batch.indices, expected.indices)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        skipped.skip_to(-1)


def test_epoch_stays_right_during_the_last_batch() -> None:
    (sampler,) = samplers(1)
    assert [sampler.epoch for _ in range(2) for _ in sampler] == [0] * 5 + [1] * 5


def test_a_state_of_another_order_is_refused() -> None:
    (sampler,) = samplers(1)
    (other,) = samplers(1, seed=9)
    with pytest.raises(ValueError, match="seed is 3 here and 9 in the state"):
        sampler.load_state_dict(other.state_dict())


@pytest.mark.parametrize("key", ["num_samples", "shuffle", "epoch", "step"])
def test_an_incomplete_state_is_refused(key: str) -> None:
    (sampler,) = samplers(1)
    state = sampler.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=rf"lacks \['{key}'\]"):
        sampler.load_state_dict(state)


@pytest.mark.parametrize(("epoch", "step"), [(1, 5), (1, 70), (1, -1), (-1, 0)])
def test_a_position_outside_the_epoch_is_refused_and_changes_nothing(epoch: int, step: int) -> None:
    (sampler,) = samplers(1)
    sampler.skip_to(2)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=rf"step in \[0, 5\), got epoch {epoch}, step {step}"):
        sampler.load_state_dict({**before, "epoch": epoch, "step": step})
    assert sampler.state_dict() == before


def test_numpys_numbers_leave_a_state_for_json() -> None:
    size: Any = np.int64(1)
    (sampler,) = samplers(
        size, np.int64(23), batch_size=np.int32(5), seed=np.int64(3), shuffle=np.True_
    )
    sampler.skip_to(np.int64(7))
    (plain,) = samplers(1)
    plain.skip_to(7)
    assert json.loads(json.dumps(sampler.state_dict())) == plain.state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"size": 0}, "size must be at least 1"),
        ({"rank": 2}, r"rank must lie in \[0, size=2\), got 2"),
        ({"rank": -1}, "rank must lie"),
        ({"seed": -1}, "seed must not be negative"),
        ({"batch_size": 9, "drop_last": True}, "leaves no batch of 9 among 8 samples"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments = {"num_samples": 8, "rank": 0, "size": 2, "batch_size": 4, **changes}
    with pytest.raises(ValueError, match=message):
        ShardedSampler(**arguments)


@pytest.mark.parametrize("rank", [True, np.True_, 0.0])
def test_a_rank_is_an_integer(rank: Any) -> None:
    with pytest.raises(TypeError, match="integer"):
        ShardedSampler(8, rank=rank, size=2, batch_size=4)
