"""Every layer by the same questions: gradients, halves, empty batches, dtypes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpidist.nn import (
    EVAL,
    GELU,
    AvgPool2d,
    BatchNorm2d,
    CausalSelfAttention,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    MaxPool2d,
    Mode,
    Module,
    PositionEmbedding,
    Recompute,
    ReLU,
    Residual,
    Sequential,
)
from mpidist.testing.gradcheck import check_gradients, check_halves, gradients, projection

TRAIN = Mode(training=True)


def _rng() -> np.random.Generator:
    return np.random.default_rng(5)


def _block(dtype) -> Module:
    rng = _rng()
    return Sequential(
        Residual(
            Sequential(
                LayerNorm(6, dtype=dtype),
                CausalSelfAttention(6, 2, rng=rng, dtype=dtype),
                Dropout(0.3),
            )
        ),
        Recompute(Sequential(Linear(6, 6, rng=rng, dtype=dtype), Dropout(0.5), GELU())),
    )


# name: (layer of a dtype, shape of a sample; None for integers)
IMAGE, SEQUENCE = (2, 5, 6), (4, 6)
CASES: dict[str, tuple[Callable[..., Module], tuple[int, ...] | None]] = {
    "Linear": (lambda d: Linear(6, 3, rng=_rng(), dtype=d), SEQUENCE),
    "Linear, no bias": (lambda d: Linear(6, 3, rng=_rng(), bias=False, dtype=d), (6,)),
    "Conv2d": (lambda d: Conv2d(2, 3, 3, rng=_rng(), dtype=d), IMAGE),
    "Conv2d, stride and padding": (
        lambda d: Conv2d(2, 3, (3, 2), rng=_rng(), stride=(2, 3), padding=(1, 2), dtype=d),
        IMAGE,
    ),
    "Conv2d, no bias": (lambda d: Conv2d(2, 3, 1, rng=_rng(), bias=False, dtype=d), IMAGE),
    "MaxPool2d": (lambda d: MaxPool2d(2), IMAGE),
    "MaxPool2d, overlapping": (lambda d: MaxPool2d(3, stride=2, padding=1), IMAGE),
    "AvgPool2d": (lambda d: AvgPool2d((2, 3)), IMAGE),
    "AvgPool2d, overlapping": (lambda d: AvgPool2d(3, stride=1, padding=1), IMAGE),
    "BatchNorm2d": (lambda d: BatchNorm2d(2, dtype=d), IMAGE),
    "LayerNorm": (lambda d: LayerNorm(6, dtype=d), SEQUENCE),
    "Embedding": (lambda d: Embedding(5, 3, rng=_rng(), dtype=d), None),
    "PositionEmbedding": (lambda d: PositionEmbedding(5, 6, rng=_rng(), dtype=d), SEQUENCE),
    "Dropout": (lambda d: Dropout(0.4), SEQUENCE),
    "ReLU": (lambda d: ReLU(), SEQUENCE),
    "GELU": (lambda d: GELU(), SEQUENCE),
    "CausalSelfAttention": (lambda d: CausalSelfAttention(6, 3, rng=_rng(), dtype=d), SEQUENCE),
    "Flatten": (lambda d: Flatten(), IMAGE),
    "Sequential": (lambda d: Sequential(Flatten(), Linear(24, 2, rng=_rng(), dtype=d)), SEQUENCE),
    "transformer block": (_block, SEQUENCE),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[Callable[..., Module], tuple[int, ...] | None]:
    return CASES[request.param]


def _input(sample: tuple[int, ...] | None, batch: int, dtype=np.float64) -> np.ndarray:
    rng = np.random.default_rng(batch)
    if sample is None:
        return rng.integers(0, 4, (batch, 4))
    return rng.normal(size=(batch, *sample)).astype(dtype)


def _shake(module: Module) -> Module:
    """Move parameters and buffers off the special values 0 and 1 that they begin with."""
    rng = np.random.default_rng(9)
    for p in module.parameters():
        p.data += 0.3 * rng.normal(size=p.shape).astype(p.dtype)
    for _, buffer in module.named_buffers():
        buffer[...] += 0.3 * rng.random(buffer.shape)
    return module


def test_gradients_equal_central_differences_in_training(case):
    make, sample = case
    check_gradients(_shake(make(np.float64)), _input(sample, 2), mode=Mode(True, seed=3, step=4))


def test_gradients_equal_central_differences_in_evaluation(case):
    make, sample = case
    check_gradients(_shake(make(np.float64)), _input(sample, 2), mode=EVAL)


def test_halves_have_the_bits_of_the_whole_with_micro_batches_in_flight(case):
    make, sample = case
    batches = [_input(sample, n, np.float32) for n in (3, 0, 1)]
    check_halves(_shake(make(np.float32)), batches, mode=Mode(True, seed=3))


@pytest.mark.parametrize("mode", [TRAIN, EVAL])
def test_an_empty_batch_gives_zero_gradients_and_changes_no_buffer(case, mode):
    make, sample = case
    module = _shake(make(np.float32))
    before = {name: array.copy() for name, array in module.named_buffers()}
    full = gradients(module, _input(sample, 2, np.float32))
    for name, buffer in module.named_buffers():
        buffer[...] = before[name]
    empty = gradients(module, _input(sample, 0, np.float32), mode=mode)
    for key in ("y", "dx"):
        assert empty.pop(key).shape == (0, *full[key].shape[1:])
    for name, gradient in empty.items():
        np.testing.assert_array_equal(gradient, np.zeros_like(full[name]), err_msg=name)
    for name, buffer in module.named_buffers():
        np.testing.assert_array_equal(buffer, before[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept_everywhere(case, dtype):
    make, sample = case
    module = make(dtype)
    for name, array in gradients(module, _input(sample, 2, dtype)).items():
        assert array.dtype == dtype, name
    for name, array in module.state_dict().items():
        assert array.dtype == dtype, name


def test_inputs_are_not_written_to_and_a_context_is_not_used_up(case):
    make, sample = case
    module = make(np.float32)
    x = _input(sample, 2, np.float32)
    x_before = x.copy()
    y, ctx = module.forward(x, TRAIN)
    dy = projection(y)
    dy_before = dy.copy()
    first = module.backward(ctx, dy).copy()
    second = module.backward(ctx, dy)
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(dy, dy_before)
    np.testing.assert_array_equal(first, second)


def test_non_contiguous_inputs_give_the_same_numbers(case):
    make, sample = case
    module = _shake(make(np.float64))
    x = _input(sample, 2)
    expected = gradients(module, x)
    wide = np.zeros((*x.shape, 2), dtype=x.dtype)
    wide[..., 1] = x
    dy = np.asfortranarray(projection(expected["y"]))
    got = gradients(module, wide[..., 1], dy)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"BatchNorm2d"}))  # joins the samples
def test_a_split_batch_adds_up_to_the_joined_one(name):
    make, sample = CASES[name]
    module = _shake(make(np.float64))
    x = _input(sample, 4)
    mode = Mode(True, seed=11, step=2, sample_offset=7)
    joined = gradients(module, x, mode=mode)
    dy = projection(joined["y"])
    parts = [gradients(module, x[a:b], dy[a:b], mode=mode.shifted(a)) for a, b in ((0, 1), (1, 4))]
    for name, array in joined.items():
        if name in ("y", "dx"):
            together = np.concatenate([part[name] for part in parts])
        else:
            together = parts[0][name] + parts[1][name]
        np.testing.assert_allclose(together, array, rtol=1e-11, atol=1e-12, err_msg=name)


def test_the_first_gradient_is_written_where_it_lives(case):
    make, sample = case
    module = _shake(make(np.float32))
    x = _input(sample, 2, np.float32)
    expected = gradients(module, x)
    module.zero_grad()
    flat = {name: np.full(p.size + 1, np.nan, p.dtype) for name, p in module.named_parameters()}
    for name, p in module.named_parameters():
        p.attach(flat[name][1:].reshape(p.shape))
    gradients(module, x)
    for name, array in flat.items():
        assert np.isnan(array[0])
        np.testing.assert_array_equal(array[1:], expected[name].reshape(-1), err_msg=name)


def test_convolution_is_the_plain_sum():
    rng = np.random.default_rng(0)
    conv = Conv2d(2, 3, (3, 2), rng=1, stride=(2, 1), padding=(1, 1), dtype=np.float64)
    x = rng.normal(size=(2, 2, 5, 4))
    y, _ = conv.forward(x, EVAL)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.zeros((2, 3, 3, 5))
    for n, o, i, j in np.ndindex(*expected.shape):
        patch = padded[n, :, 2 * i : 2 * i + 3, j : j + 2]
        expected[n, o, i, j] = (patch * conv.weight.data[o]).sum() + conv.bias.data[o]
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_the_first_of_equal_pixels_wins_the_maximum():
    pool = MaxPool2d(2)
    _, ctx = pool.forward(np.zeros((1, 1, 2, 2)), TRAIN)
    dx = pool.backward(ctx, np.ones((1, 1, 1, 1)))
    np.testing.assert_array_equal(dx[0, 0], [[1, 0], [0, 0]])


def test_attention_does_not_look_ahead():
    attention = CausalSelfAttention(6, 2, rng=0, dtype=np.float64)
    x = np.random.default_rng(1).normal(size=(1, 5, 6))
    y, _ = attention.forward(x, EVAL)
    x[0, 3:] += 1.0
    changed, _ = attention.forward(x, EVAL)
    np.testing.assert_array_equal(changed[0, :3], y[0, :3])
    assert not np.allclose(changed[0, 3:], y[0, 3:])


def test_batch_norm_moves_its_statistics_in_place_and_only_in_training():
    norm = BatchNorm2d(2, momentum=0.25, dtype=np.float64)
    mean, var = norm.running_mean, norm.running_var
    x = np.random.default_rng(2).normal(3.0, 2.0, size=(4, 2, 3, 3))
    norm.forward(x, TRAIN.replayed())
    norm.forward(x, EVAL)
    np.testing.assert_array_equal(mean, [0, 0])
    norm.forward(x, TRAIN)
    assert norm.running_mean is mean
    np.testing.assert_allclose(mean, 0.25 * x.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(var, 0.75 + 0.25 * x.var(axis=(0, 2, 3), ddof=1), rtol=1e-12)


def test_batch_norm_of_a_single_pixel_has_no_nan():
    norm = BatchNorm2d(2)
    got = gradients(norm, np.full((1, 2, 1, 1), 5.0, dtype=np.float32))
    assert all(np.isfinite(array).all() for array in got.values())
    assert np.isfinite(norm.running_var).all()


@pytest.mark.parametrize(
    ("module", "x", "message"),
    [
        (Linear(6, 2, rng=0), np.zeros((6, 4)), r"\(\.\.\., 6\), got \(6, 4\)"),
        (Conv2d(2, 3, 3, rng=0), np.zeros((1, 3, 5, 5)), "2, height, width"),
        (Conv2d(2, 3, 3, rng=0), np.zeros((1, 2, 2, 5)), "at least"),
        (MaxPool2d(3), np.zeros((1, 2, 2, 5)), "at least"),
        (Embedding(5, 3, rng=0), np.array([[5]]), r"0\.\.4, got 5\.\.5"),
        (Embedding(5, 3, rng=0), np.array([[-1]]), r"0\.\.4"),
        (Embedding(5, 3, rng=0), np.array([[1.0]]), "integer"),
        (PositionEmbedding(3, 2, rng=0), np.zeros((1, 4, 2)), "at most 3"),
    ],
)
def test_unsuitable_inputs_are_refused(module, x, message):
    with pytest.raises(ValueError, match=message):
        module.forward(x, TRAIN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d(1, 1, 3, rng=0, stride=0), "Conv2d.*stride"),
        (lambda: Conv2d(1, 1, 3, rng=0, padding=-1), "padding"),
        (lambda: MaxPool2d(2, padding=2), "half the kernel"),
        (lambda: CausalSelfAttention(6, 4, rng=0), "divides dim 6"),
        (lambda: Dropout(1.0), "p < 1"),
    ],
)
def test_unsuitable_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_seed_fixes_the_initial_values_for_every_dtype():
    a = Sequential(Linear(4, 3, rng=8), Conv2d(2, 2, 3, rng=8), Embedding(4, 2, rng=8))
    generator_made = Linear(4, 3, rng=np.random.default_rng(8), dtype=np.float64)
    np.testing.assert_array_equal(
        a.layers[0].weight.data, generator_made.weight.data.astype(np.float32)
    )
    assert 0.25 < np.abs(generator_made.weight.data).max() <= 0.5  # 1 / sqrt(4)
