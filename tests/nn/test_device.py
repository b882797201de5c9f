"""Layers and models on a device: what the host calculates, without the host waiting."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpidist import nn
from mpidist.arrays.namespaces import is_device, to_device, to_host
from mpidist.nn import Mode, Module

TRAINING = Mode(training=True, seed=3, step=5, sample_offset=11)
TIGHT = {np.float32: 2e-5, np.float64: 1e-12}


def images(*shape: int) -> Callable[[Any], Any]:
    return lambda dtype: np.random.default_rng(1).normal(size=shape).astype(dtype)


def numbers(below: int, *shape: int) -> Callable[[Any], Any]:
    return lambda dtype: np.random.default_rng(1).integers(0, below, shape)


LAYERS: dict[str, tuple[Callable[[Any], Module], Callable[[Any], Any]]] = {
    "linear": (lambda d: nn.Linear(6, 4, rng=0, dtype=d), images(5, 3, 6)),
    "embedding": (lambda d: nn.Embedding(9, 4, rng=0, dtype=d), numbers(9, 7, 5)),
    "embedding of bytes": (
        lambda d: nn.Embedding(9, 4, rng=0, dtype=d),
        lambda d: numbers(9, 7)(d).astype(np.uint8),
    ),
    "positions": (lambda d: nn.PositionEmbedding(8, 4, rng=0, dtype=d), images(3, 5, 4)),
    "flatten": (lambda d: nn.Flatten(), images(3, 2, 4)),
    "relu": (lambda d: nn.ReLU(), images(4, 5)),
    "gelu": (lambda d: nn.GELU(), images(4, 5)),
    "dropout": (lambda d: nn.Dropout(0.3), images(4, 5, 3)),
    "layer norm": (lambda d: nn.LayerNorm(6, dtype=d), images(4, 3, 6)),
    "batch norm": (lambda d: nn.BatchNorm2d(3, dtype=d), images(4, 3, 5, 5)),
    "convolution": (
        lambda d: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1, rng=0, dtype=d),
        images(2, 3, 7, 6),
    ),
    "largest": (lambda d: nn.MaxPool2d(3, stride=2, padding=1), images(2, 3, 7, 6)),
    "average": (lambda d: nn.AvgPool2d(2), images(2, 3, 6, 6)),
    "attention": (lambda d: nn.CausalSelfAttention(8, 2, rng=0, dtype=d), images(2, 5, 8)),
    "residual, recomputed": (
        lambda d: nn.Recompute(nn.Residual(nn.Linear(6, 6, rng=0, dtype=d))),
        images(5, 6),
    ),
}


def run(layer: Module, x: Any, mode: Mode) -> dict[str, Any]:
    """Return all that a forward and two backward passes give."""
    y, ctx = layer.forward(x, mode)
    dy = beside(np.random.default_rng(2).normal(size=y.shape).astype(y.dtype), like=y)
    dx = layer.backward(ctx, dy)
    layer.backward(ctx, dy)  # the second contribution is added
    grads = {f"d {name}": p.grad for name, p in layer.named_parameters()}
    return {"y": y, "dx": dx, **grads, **dict(layer.named_buffers())}


def beside(x: Any, *, like: Any) -> Any:
    return to_device(x) if is_device(like) else x


def check_equal(on_device: dict[str, Any], on_host: dict[str, Any], tolerance: float) -> None:
    assert on_device.keys() == on_host.keys()
    for name, expected in on_host.items():
        got = on_device[name]
        assert is_device(got), name
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        np.testing.assert_allclose(to_host(got), expected, tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_what_it_does_on_the_host(
    xp: ModuleType, name: str, dtype: Any, training: bool
) -> None:
    make, inputs = LAYERS[name]
    x = inputs(dtype)
    mode = TRAINING if training else nn.EVAL
    moved = make(dtype)
    moved.to("gpu")
    check_equal(run(moved, xp.asarray(x), mode), run(make(dtype), x, mode), TIGHT[dtype])


@pytest.mark.parametrize("name", LAYERS)
def test_an_empty_batch_passes_through(xp: ModuleType, name: str) -> None:
    make, inputs = LAYERS[name]
    x = inputs(np.float32)[:0]
    moved = make(np.float32)
    moved.to("gpu")
    check_equal(run(moved, xp.asarray(x), TRAINING), run(make(np.float32), x, TRAINING), 0)


def test_halves_differ_by_a_rounding(xp: ModuleType) -> None:
    x = images(3, 4, 6)(np.float16)

    def make() -> Module:
        return nn.Sequential(nn.Linear(6, 6, rng=0, dtype=np.float16), nn.LayerNorm(6))

    moved = make()
    moved.to("gpu")
    check_equal(run(moved, xp.asarray(x), TRAINING), run(make(), x, TRAINING), 2e-2)


def test_dropout_draws_the_bits_that_the_host_draws(xp: ModuleType) -> None:
    layer = nn.Dropout(0.4)
    for mode in (
        TRAINING,
        Mode(training=True, seed=2**63 + 7, step=2**40, sample_offset=2**64 - 2),
    ):
        host, _ = layer.forward(np.ones((5, 7, 3)), mode)
        device, _ = layer.forward(xp.ones((5, 7, 3)), mode)
        assert (to_host(device) == host).all()
        assert 0 < (host == 0).sum() < host.size


def test_an_integer_outside_the_table_gives_nan(xp: ModuleType) -> None:
    layer = nn.Embedding(4, 3, rng=0)
    layer.to("gpu")
    y, ctx = layer.forward(xp.asarray([0, 4, -1, 3]), TRAINING)
    assert np.isnan(to_host(y)).all(axis=1).tolist() == [False, True, True, False]
    layer.backward(ctx, xp.ones((4, 3), np.float32))
    assert layer.weight.grad is not None
    assert to_host(layer.weight.grad).tolist() == [[1] * 3, [0] * 3, [0] * 3, [1] * 3]


@pytest.mark.parametrize("denominator", [None, 40.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_losses(xp: ModuleType, dtype: Any, denominator: float | None) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(4, 5, 6)).astype(dtype), rng.integers(0, 6, (4, 5))
    for loss, first, second in (
        (nn.cross_entropy, logits, target),
        (nn.mse_loss, logits, (logits + 1).astype(dtype)),
        (nn.cross_entropy, logits[:0], target[:0]),
    ):
        value, gradient = loss(first, second, denominator=denominator)
        moved = loss(xp.asarray(first), xp.asarray(second), denominator=denominator)
        tolerance = TIGHT.get(dtype, 1e-3)
        check_equal(
            dict(zip("lg", moved, strict=True)),
            {"l": np.asarray(value), "g": gradient},
            tolerance,
        )


def test_a_target_out_of_range_gives_nan_where_it_is(xp: ModuleType) -> None:
    loss, gradient = nn.cross_entropy(xp.zeros((3, 4)), xp.asarray([1, 4, -1]))
    assert np.isnan(to_host(loss))
    assert np.isnan(to_host(gradient)).all(axis=1).tolist() == [False, True, True]


def test_moving_a_model_there_and_back_keeps_its_bits(xp: ModuleType) -> None:
    def make() -> Module:
        shared = nn.Linear(4, 4, rng=0)
        tied = nn.Linear(4, 4, rng=1)
        tied.weight = shared.weight
        return nn.Sequential(shared, tied, nn.BatchNorm2d(4))

    model, expected = make(), make().state_dict()
    weight, mean = model.state_dict()["0.weight"], model.state_dict()["2.running_mean"]
    model.parameters().__next__().add_grad(np.ones((4, 4)))
    model.to("cpu")
    assert model.state_dict()["0.weight"] is weight, "it lies there already"
    assert all(p.grad is not None for p in [next(model.parameters())])
    model.to("gpu")
    assert all(is_device(array) for array in model.state_dict().values())
    assert all(p.grad is None and p.grad_nbytes == 0 for p in model.parameters())
    first, second = model.layers[:2]  # type: ignore[attr-defined]
    assert first.weight is second.weight
    model.to("cpu")
    assert model.state_dict()["2.running_mean"] is not mean
    for name, array in model.state_dict().items():
        assert array.tobytes() == expected[name].tobytes(), name


def test_a_state_is_loaded_across(xp: ModuleType) -> None:
    source, target = nn.Linear(3, 2, rng=0), nn.Linear(3, 2, rng=1)
    target.to("gpu")
    target.load_state_dict(source.state_dict())
    back = nn.Linear(3, 2, rng=2)
    back.load_state_dict(target.state_dict())
    assert (back.weight.data == source.weight.data).all()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'gpu' or 'cpu', got 'cuda'"):
        nn.Linear(1, 1, rng=0).to("cuda")
