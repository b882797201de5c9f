from __future__ import annotations

import numpy as np
import pytest

from mpidist.nn import EVAL, Dropout, Mode, Recompute, Sequential
from mpidist.nn.dropout import dropout_mask

MODE = Mode(training=True, seed=1, step=2, sample_offset=3)


def test_the_mask_of_a_sample_does_not_depend_on_the_batch_it_is_in():
    joined = dropout_mask((6, 5, 7), 0.5, MODE, 0)
    parts = [dropout_mask((b - a, 5, 7), 0.5, MODE.shifted(a), 0) for a, b in ((0, 4), (4, 6))]
    np.testing.assert_array_equal(np.concatenate(parts), joined)


@pytest.mark.parametrize(
    ("mode", "layer"),
    [
        (Mode(True, seed=9, step=2, sample_offset=3), 0),
        (Mode(True, seed=1, step=9, sample_offset=3), 0),
        (Mode(True, seed=1, step=2, sample_offset=9), 0),
        (MODE, 9),
    ],
)
def test_every_coordinate_changes_the_mask(mode, layer):
    reference = dropout_mask((2, 200), 0.5, MODE, 0)
    other = dropout_mask((2, 200), 0.5, mode, layer)
    assert 0.35 < (other == reference).mean() < 0.65


def test_a_replay_draws_the_same():
    np.testing.assert_array_equal(
        dropout_mask((2, 9), 0.5, MODE, 4), dropout_mask((2, 9), 0.5, MODE.replayed(), 4)
    )


def test_the_drawn_bits_never_change():
    # The words of Philox are promised by numpy, so a run resumes alike on any version.
    mask = dropout_mask((2, 12), 0.5, MODE, 4)
    assert ["".join("01"[int(bit)] for bit in row) for row in mask] == [
        "111011110101",
        "100011011101",
    ]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_p_and_the_mean_is_kept(p):
    x = np.ones((50, 2000), dtype=np.float32)
    y, _ = Dropout(p).forward(x, MODE)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
    assert abs((y == 0).mean() - p) < 0.01


def test_nothing_happens_outside_training_or_with_p_zero():
    x = np.ones((2, 3))
    for layer, mode in ((Dropout(0.5), EVAL), (Dropout(0.0), MODE)):
        y, ctx = layer.forward(x, mode)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(layer.backward(ctx, x), x)


def test_two_layers_of_one_model_draw_apart_and_a_rebuilt_model_alike():
    x = np.ones((1, 400), dtype=np.float32)

    def outputs(model: Sequential) -> list[np.ndarray]:
        return [layer.forward(x, MODE)[0] for layer in model.layers]

    a, b = outputs(Sequential(Dropout(0.5), Dropout(0.5)))
    assert not np.array_equal(a, b)
    again = outputs(Sequential(Dropout(0.5), Dropout(0.5)))
    np.testing.assert_array_equal(again, [a, b])
    wrapped = outputs(Sequential(Recompute(Dropout(0.5)), Recompute(Dropout(0.5))))
    np.testing.assert_array_equal(wrapped, [a, b])


def test_a_lone_layer_draws_and_one_without_a_label_refuses():
    x = np.ones((2, 8))
    Dropout(0.5).forward(x, MODE)
    layer = Dropout.__new__(Dropout)
    layer.p, layer.part = 0.5, None
    np.testing.assert_array_equal(layer.forward(x, EVAL)[0], x)
    with pytest.raises(RuntimeError, match=r"call relabel\(\) on the outermost module"):
        layer.forward(x, MODE)
    layer.relabel()
    np.testing.assert_array_equal(layer.forward(x, MODE)[0], Dropout(0.5).forward(x, MODE)[0])


def test_negative_and_large_seeds_are_accepted():
    for seed in (-1, 2**63, 2**64 - 1):
        assert dropout_mask((1, 3), 0.5, Mode(True, seed=seed), 0).shape == (1, 3)


def test_numpys_integers_say_what_pythons_say():
    x = np.ones((2, 8))
    mode = Mode(True, np.int64(-1), np.int32(2), np.int64(3))
    y, _ = Dropout(0.5).forward(x, mode)
    expected, _ = Dropout(0.5).forward(x, Mode(True, -1, 2, 3))
    np.testing.assert_array_equal(y, expected)
    assert mode == Mode(True, -1, 2, 3)
    assert type(mode.shifted(np.int64(1)).sample_offset) is int


@pytest.mark.parametrize("name", ["seed", "step", "sample_offset"])
def test_a_mode_takes_integers_only(name):
    with pytest.raises(TypeError, match="float"):
        Mode(True, **{name: 1.0})


def test_no_training_mode_is_ready_made():
    # One for all steps and ranks would freeze every mask.
    import mpidist.nn as nn

    assert "TRAIN" not in nn.__all__
    assert not any(isinstance(v, Mode) and v.training for v in vars(nn).values())
