"""Clipping, scaling, compression and metrics of gradients on a device: the host's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import BFLOAT16, is_device, to_host
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.nn import Parameter
from mpidist.parallel import GradientReducer, GradScaler, Metrics, clip_grad_norm, gradient_kernels
from mpidist.parallel.gradient_kernels import gradient_arrays

HALVES = (np.float16, BFLOAT16)
FLOATS = (*HALVES, np.float32, np.float64)


@pytest.fixture(scope="module")
def alone() -> Iterator[ProcessGroup]:
    with mpidist.init("simulated") as group:
        yield group


def parameters(xp: ModuleType, grads: dict[str, Any]) -> list[Parameter]:
    """Make parameters on a device; the gradients of all but the last lie in a bucket."""
    params = {}
    for name, grad in grads.items():
        params[name] = Parameter(xp.zeros(grad.shape, grad.dtype), name=name)
    *inside, _ = params
    shapes = {name: grads[name].shape for name in inside}
    length = FlatBuffer.length_of(shapes, alignment=8)
    dtype = grads[inside[0]].dtype
    flat = FlatBuffer(shapes, dtype, alignment=8, storage=xp.empty(length, dtype))
    for name, p in params.items():
        if name in inside:
            p.attach(flat.views[name], location=(flat, name))
        if name != "none":
            p.add_grad(xp.asarray(grads[name]))
    return list(params.values())


def gradients(dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (9,), "none": (4,), "c": (2, 2), "empty": (0,), "own": (6,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def test_neighbours_in_a_bucket_are_one_array(xp: ModuleType) -> None:
    params = parameters(xp, gradients(np.float32))
    host, device = gradient_arrays(params, "test")
    assert host == []
    # own; a and b with the padding of a; c, behind the one without a gradient, and an empty one
    assert [array.size for array in device] == [6, 16 + 9, 8]
    numbers = sorted(x for array in device for x in to_host(array).tolist() if x)
    expected = [x for name, g in gradients(np.float32).items() if name != "none" for x in g.flat]
    assert numbers == sorted(map(float, expected))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping(xp: ModuleType, dtype: Any, max_norm: float) -> None:
    grads = gradients(dtype)
    del grads["none"]
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    params = parameters(xp, grads)
    assert clip_grad_norm(params, max_norm) == pytest.approx(norm, rel=1e-12)
    tolerance = {np.float16: 1e-3, np.float32: 1e-6, np.float64: 1e-12}[dtype]
    for p in params:
        expected = grads[p.name].astype(np.float64) * min(1.0, max_norm / norm)
        assert p.grad is not None
        np.testing.assert_allclose(to_host(p.grad), expected, tolerance, 1e-6)


@pytest.mark.parametrize(("dtype", "large"), [(np.float16, 6e4), (BFLOAT16, 3e38)])
def test_the_factor_of_clipping_is_not_rounded_to_the_dtype(
    xp: ModuleType, dtype: Any, large: float
) -> None:
    grads = {"a": np.full(5_000, large, dtype), "own": np.full(5_000, large, dtype)}
    params = parameters(xp, grads)
    norm = clip_grad_norm(params, 1.0)
    for p in params:
        assert p.grad is not None
        expected = (grads[p.name].astype(np.float64) * (1 / norm)).astype(dtype)
        np.testing.assert_array_equal(to_host(p.grad), expected)


def test_a_norm_that_is_not_finite_scales_nothing(xp: ModuleType) -> None:
    grads = {"a": np.array([1.0, np.inf]), "b": np.ones(3)}
    params = parameters(xp, grads)
    assert clip_grad_norm(params, 0.1) == np.inf
    assert params[1].grad is not None
    assert to_host(params[1].grad).tolist() == [1, 1, 1]


def test_a_large_bucket_is_summed_by_many_threads(xp: ModuleType) -> None:
    x = np.random.default_rng(0).normal(size=2**17 + 12345).astype(np.float32)
    assert gradient_kernels.sum_of_squares([xp.asarray(x)]) == pytest.approx(
        (x.astype(np.float64) ** 2).sum(), rel=1e-12
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_scaling_there_and_back(xp: ModuleType, alone: ProcessGroup, dtype: Any) -> None:
    grads = gradients(dtype)
    scaler = GradScaler(alone, initial=2.0**10)
    for grad in grads.values():
        scaled = scaler.scale(xp.asarray(grad))
        assert is_device(scaled)
        assert to_host(scaled).tobytes() == GradScaler(alone, initial=2.0**10).scale(grad).tobytes()
    params = parameters(xp, {name: scaler.scale(grad) for name, grad in grads.items()})
    assert scaler.unscale(params)
    for p in params:
        if p.name != "none":
            assert p.grad is not None
            assert to_host(p.grad).tobytes() == grads[p.name].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["a", "c", "own"])
def test_one_bad_number_is_found(
    xp: ModuleType, alone: ProcessGroup, where: str, bad: float
) -> None:
    grads = gradients(np.float32)
    grads[where].flat[-1] = bad
    scaler = GradScaler(alone, initial=8.0)
    assert not scaler.unscale(parameters(xp, grads))
    assert scaler.factor == 4.0


@pytest.mark.parametrize("wide", [np.float32, np.float64])
@pytest.mark.parametrize("half", HALVES)
def test_a_bucket_is_cast_as_the_host_casts_it(xp: ModuleType, half: Any, wide: Any) -> None:
    x = np.array([0.1, -3.0, 1e-7, 65519.0, 65520.0, 1e30, np.inf, 0.0], wide)
    with np.errstate(over="ignore"):
        expected = x.astype(half)
    there, back = xp.empty(x.shape, half), xp.empty(x.shape, wide)
    gradient_kernels.cast(xp.asarray(x), there)
    gradient_kernels.cast(there, back)
    assert to_host(there).tobytes() == expected.tobytes()
    assert to_host(back).tobytes() == expected.astype(wide).tobytes()


def test_metrics_take_numbers_from_a_device(xp: ModuleType, alone: ProcessGroup) -> None:
    metrics = Metrics(alone)
    metrics.add("loss", xp.asarray(np.float32(3.0)), weight=1)
    metrics.add("loss", xp.asarray(np.float32(1.0)), weight=3)
    metrics.add("loss", xp.asarray(np.float32(np.nan)), weight=0)
    assert metrics.reduce() == {"loss": 1.5}


def test_complex_gradients_are_refused_there(xp: ModuleType, alone: ProcessGroup) -> None:
    grads = {"w": xp.zeros(3, np.complex64)}
    with pytest.raises(UnsupportedOperationError, match=r"'w' is complex and lies on a device"):
        GradientReducer(grads, alone)
