"""Data sets in memory."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.data import ArrayDataset, split_off


def make(samples: int = 20) -> ArrayDataset:
    inputs = np.arange(samples * 6).reshape(samples, 2, 3)
    return ArrayDataset(inputs, inputs[:, 0] + 1)


def test_take_gives_rows_in_the_order_asked_for() -> None:
    data = make()
    inputs, targets = data.take(np.array([3, 0, 3]))
    np.testing.assert_array_equal(inputs[:, 0, 0], [18, 0, 18])
    np.testing.assert_array_equal(targets[:, 0], [19, 1, 19])
    assert not np.shares_memory(inputs, data.inputs)
    assert (len(data), data.targets_per_sample) == (20, 3)


def test_take_nothing_keeps_the_shape_of_a_sample() -> None:
    inputs, targets = make().take(np.array([], np.int64))
    assert (inputs.shape, targets.shape) == ((0, 2, 3), (0, 3))


def test_a_single_label_per_sample_is_one_target() -> None:
    assert ArrayDataset(np.zeros((4, 8)), np.zeros(4, int)).targets_per_sample == 1


def test_split_off_holds_out_a_part_that_depends_on_the_seed_alone() -> None:
    train, held_out = split_off(make(), 0.1, seed=0)
    assert (len(train), len(held_out)) == (18, 2)
    rows = np.concatenate([train.inputs, held_out.inputs])[:, 0, 0] // 6
    np.testing.assert_array_equal(np.sort(rows), np.arange(20))
    np.testing.assert_array_equal(held_out.targets[:, 0], held_out.inputs[:, 0, 0] + 1)
    again = split_off(make(), 0.1, seed=0)[1]
    np.testing.assert_array_equal(held_out.inputs, again.inputs)
    others = [split_off(make(), 0.1, seed=seed)[1].inputs[:, 0, 0] for seed in range(1, 6)]
    assert any((other != held_out.inputs[:, 0, 0]).any() for other in others)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="3 inputs but 4 targets"):
        ArrayDataset(np.zeros(3), np.zeros(4))
    for part in (0.0, 0.01, 1.0):
        with pytest.raises(ValueError, match="one side empty"):
            split_off(make(), part, seed=0)
