"""The stand-in for cupy: its elementwise kernels."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.nccl_stub import stand_in

pytestmark = pytest.mark.usefixtures("stand_in_without_nccl")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def cupy(stand_in_without_nccl: Any) -> Any:
    return importlib.import_module("cupy")


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.float64, np.int32])
def test_a_kernel_calculates_what_numpy_does(cupy: Any, dtype: Any) -> None:
    kernel = cupy.ElementwiseKernel(
        "T x, raw T y, float32 scale, bool negate",
        "T z, raw int32 count",
        "z = max(x, y[0]) * scale; if (negate) z = -z; if (x > y[i % 2]) atomicAdd(&count[0], 1)",
        "scaled",
    )
    host = np.arange(-3, 5).astype(dtype)
    x, count = cupy.asarray(host.reshape(2, 4)[:, ::-1]), cupy.zeros(1, np.int32)
    y, z = cupy.asarray(np.array([1, 2]).astype(dtype)), cupy.empty((2, 4), dtype)
    kernel(x, y, 2.0, True, z, count)
    assert count.tolist() == [3]
    expected = -2 * np.maximum(host.reshape(2, 4)[:, ::-1], 1)
    np.testing.assert_array_equal(z.get(), expected.astype(dtype))


def test_a_kernel_makes_its_result_broadcasts_and_looks_for_what_is_not_finite(cupy: Any) -> None:
    kernel = cupy.ElementwiseKernel("T x, T y", "T z", "z = isfinite(x) ? fma(x, y, T(1)) : y", "k")
    x, y = cupy.asarray([[1.0], [np.inf], [np.nan]]), cupy.asarray([2.0, 3.0])
    z = kernel(x, y)
    assert np.isnan(stand_in.contents(z)).all()
    assert z.tolist() == [[3, 4], [2, 3], [2, 3]]
    assert kernel(x[0], 2).tolist() == [3]


def test_a_kernel_refuses_arrays_of_the_host_and_of_other_types(cupy: Any) -> None:
    kernel = cupy.ElementwiseKernel("T x, float32 y", "T z", "z = x + y", "k")
    x = cupy.ones(2)
    for arguments in ((np.ones(2), 1), (x, x), (x,), (x, 1, cupy.empty(2, np.float32))):
        with pytest.raises(TypeError):
            kernel(*arguments)
    with pytest.raises(ValueError, match=r"Out shape|broadcast"):
        kernel(x, 1, cupy.empty(3))
    with pytest.raises(RuntimeError, match="nosuch"):
        cupy.ElementwiseKernel("T x", "T z", "z = nosuch(x)", "k")(x)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16])
def test_halves_are_read_and_rounded_as_numpy_does(cupy: Any, dtype: np.dtype[Any]) -> None:
    widen = cupy.ElementwiseKernel("T x", "float32 y", "y = x", "widen")
    narrow = cupy.ElementwiseKernel("float32 x, T like", "T y", "y = x", "narrow")
    halves = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(all="ignore"):
        wide = halves.astype(np.float32)
        # The halves, what lies between them, and the next floats on both sides of that.
        middle = (np.sort(wide[np.isfinite(wide)])[1:] + np.sort(wide[np.isfinite(wide)])[:-1]) / 2
        near = [np.nextafter(middle, np.float32(to)) for to in (-np.inf, np.inf)]
        floats = np.concatenate([wide, middle, *near, np.float32([1e-45, 3.4e38, -3.4e38])])
        expected = floats.astype(dtype)
    np.testing.assert_array_equal(widen(cupy.asarray(halves)).get(), wide)
    made = narrow(cupy.asarray(floats), cupy.zeros(1, dtype)).get()
    np.testing.assert_array_equal(made.astype(np.float32), expected.astype(np.float32))
