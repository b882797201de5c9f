"""The stand-in for cupy: what it has, and what it refuses."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.nccl_stub import stand_in
from tests.nccl_stub.stand_in import signatures

pytestmark = pytest.mark.usefixtures("stand_in_without_nccl")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def cupy(stand_in_without_nccl: Any) -> Any:
    return importlib.import_module("cupy")


@pytest.mark.parametrize(
    "mix",
    [
        lambda cupy, x, host: x + host,
        lambda cupy, x, host: host + x,
        lambda cupy, x, host: np.add(x, host),
        lambda cupy, x, host: np.add(host, host, out=x),
        lambda cupy, x, host: np.add(x, x, out=host),
        lambda cupy, x, host: x.__iadd__(host),
        lambda cupy, x, host: host.__iadd__(x),
        lambda cupy, x, host: cupy.sum(x, axis=0, out=host),
        lambda cupy, x, host: cupy.concatenate([x, host]),
        lambda cupy, x, host: np.concatenate([x, host]),
        lambda cupy, x, host: cupy.where(x > 0, x, host),
        lambda cupy, x, host: cupy.copyto(host, x),
        lambda cupy, x, host: cupy.copyto(x, host),
        lambda cupy, x, host: x.__setitem__(..., host),
        lambda cupy, x, host: x @ host,
        lambda cupy, x, host: np.add(x, [1, 2]),
        lambda cupy, x, host: x.get(out=cupy.empty(2)),
        lambda cupy, x, host: x.set(x),
        lambda cupy, x, host: x.__array__(),
        lambda cupy, x, host: np.add.reduce(x),
        lambda cupy, x, host: range(x[0]),
        lambda cupy, x, host: cupy.sum(x, where=True),
        lambda cupy, x, host: x.sum(initial=1),
        lambda cupy, x, host: cupy.add(x, x, order="C"),
    ],
)
def test_what_cupy_refuses_is_refused(cupy: Any, mix: Any) -> None:
    with pytest.raises(TypeError):
        mix(cupy, cupy.ones(2), np.ones(2))


def test_scalars_and_arrays_without_dimensions_may_be_the_hosts(cupy: Any) -> None:
    x = cupy.ones(2, dtype=np.float32)
    assert (x + np.array(1.0, np.float32) + np.float32(1) + 1).tolist() == [4, 4]
    assert (x + 1.5).dtype == np.float32
    assert (x + np.float64(1)).dtype == np.float64


@pytest.mark.parametrize("dtype", [object, "U3", "M8[s]", ">f4", "f4,f4", np.longdouble])
def test_dtypes_that_cupy_has_not_are_refused(cupy: Any, dtype: Any) -> None:
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.empty(2, dtype)
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cupy.ones(2).astype(dtype)


def test_names_that_cupy_has_not_are_missing(cupy: Any) -> None:
    x = cupy.ones(2)
    for module, name in (
        (cupy, "nosuch"),
        (cupy, "einsum_path"),
        (cupy, "random"),
        (cupy, "r_"),
        (cupy.linalg, "multi_dot"),
    ):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
    for name in ("ctypes", "__array_interface__", "setflags", "resize"):
        assert not hasattr(x, name)
    assert not hasattr(cupy.cuda, "nccl")  # until it is imported, as in CuPy 14


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="cupy is not installed")
def test_names_and_parameters_are_those_of_cupy(stand_in_without_nccl: Any) -> None:
    code = (
        "import sys, cupy; from tests.nccl_stub.stand_in.signatures import described;"
        "print(cupy.__version__, *described(cupy), sep=chr(10))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    version, *lines = done.stdout.splitlines()
    if version != signatures.MADE_OF:
        pytest.skip(f"the stand-in imitates CuPy {signatures.MADE_OF}, and {version} is installed")
    assert {line.partition("(")[0] for line in lines} == signatures.known().keys()


def test_reductions_and_elements_are_arrays_of_the_device(cupy: Any) -> None:
    x = cupy.arange(6.0).reshape(2, 3)
    for y in (x.sum(), cupy.max(x), np.mean(x), x[1, 2], cupy.vdot(x, x), cupy.allclose(x, x)):
        assert type(y) is cupy.ndarray
        assert y.shape == ()
    row = x[1]
    row += 1
    x[0, 0] = 7
    assert x.tolist() == [[7, 1, 2], [4, 5, 6]]
    assert (float(x[0, 0]), int(x[0, 1]), bool(x[0, 1])) == (7.0, 1, True)
    assert [float(y) for y in x[0]] == [7, 1, 2]


def test_views_share_memory_and_run_nothing(cupy: Any) -> None:
    y = cupy.arange(6.0) * 2
    for view in (y[1:], y.reshape(2, 3).T, cupy.flip(y), y.view(np.uint8), cupy.expand_dims(y, 0)):
        assert y.data.ptr <= view.data.ptr < y.data.ptr + y.nbytes
        assert view.base is not None
    window = cupy.lib.stride_tricks.sliding_window_view(y, 2)
    assert window.data.ptr == y.data.ptr
    assert np.isnan(stand_in.contents(y)).all()
    assert y.reshape(2, 3).T.ravel().tolist() == [0, 6, 2, 8, 4, 10]
    assert window.tolist() == [[0, 2], [2, 4], [4, 6], [6, 8], [8, 10]]


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32, np.int32, np.complex64])
def test_results_are_numpys(cupy: Any, dtype: Any) -> None:
    host = (np.arange(12).reshape(3, 4) - 5).astype(dtype)
    x = cupy.asarray(host)
    for mine, expected in (
        (x * 2 + x, host * 2 + host),
        (x.real.astype(np.float64), host.real.astype(np.float64)),
        (x[:, ::-1], host[:, ::-1]),
        (x[cupy.asarray([0, 2])], host[[0, 2]]),
        (x[cupy.asarray(host != 1)], host[host != 1]),
        (x.sum(axis=0, dtype=np.complex64), host.sum(axis=0, dtype=np.complex64)),
        (cupy.concatenate([x, x], axis=1), np.concatenate([host, host], axis=1)),
        (cupy.where(x == 0, x, x + 1), np.where(host == 0, host, host + 1)),
    ):
        assert mine.dtype == expected.dtype
        np.testing.assert_array_equal(mine.get(), expected)


def test_an_array_of_another_device_is_refused_but_can_be_fetched(cupy: Any) -> None:
    with cupy.cuda.Device(2):
        x = cupy.ones(2)
    assert (x.device.id, x.data.device_id) == (2, 2)
    with pytest.raises(ValueError, match="Array device must be same as the current device"):
        x + 1
    assert x.get().tolist() == [1, 1]


def test_arrays_can_be_pickled_copied_and_made_alike(cupy: Any) -> None:
    x = cupy.asfortranarray(cupy.ones((2, 3), np.float32))
    again = pickle.loads(pickle.dumps(x))
    assert type(again) is cupy.ndarray
    assert again.tolist() == x.copy().tolist() == [[1, 1, 1]] * 2
    assert cupy.empty_like(x).flags.f_contiguous
    assert cupy.asarray(x) is x
    assert cupy.array(x) is not x
    assert cupy.ascontiguousarray(x).flags.c_contiguous


def test_devices_can_be_asked_for(cupy: Any) -> None:
    runtime = cupy.cuda.runtime
    assert cupy.cuda.is_available()
    assert runtime.getDeviceCount() == 4
    assert len({runtime.deviceGetPCIBusId(i) for i in range(4)}) == 4
    assert len({runtime.getDeviceProperties(i)["uuid"] for i in range(4)}) == 4
    assert cupy.cuda.Device(1).pci_bus_id == runtime.deviceGetPCIBusId(1)
    with cupy.cuda.Device(3) as device:
        assert cupy.cuda.Device() == device
        assert runtime.getDevice() == 3
    assert runtime.getDevice() == 0
    with pytest.raises(runtime.CUDARuntimeError, match="InvalidDevice"):
        cupy.cuda.Device(4).use()
    free, total = runtime.memGetInfo()
    x = cupy.empty(1000, np.uint8)
    assert runtime.memGetInfo() == (free - x.nbytes, total)


def test_without_devices_nothing_can_be_made() -> None:
    stand_in.uninstall()
    stand_in.install(0, nccl=False)
    try:
        cupy = importlib.import_module("cupy")
        assert not cupy.cuda.is_available()
        for make in (lambda: cupy.empty(1), cupy.cuda.Stream, cupy.cuda.runtime.getDeviceCount):
            with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="NoDevice"):
                make()
    finally:
        stand_in.uninstall()
        stand_in.install(nccl=False)


def test_without_nccl_its_module_says_so_and_all_modules_go_again() -> None:
    names = ("cupy", "cupy.cuda", "cupyx", "cupy.cuda.nccl")
    nccl = importlib.import_module("cupy.cuda.nccl")
    assert not nccl.available
    with pytest.raises(RuntimeError, match="in place already"):
        stand_in.install(nccl=False)
    stand_in.uninstall()
    try:
        assert not any(name in sys.modules for name in names)
    finally:
        stand_in.install(nccl=False)
    assert not hasattr(importlib.import_module("cupy").cuda, "nccl")
