"""The stand-in for cupy: what it must show to those who forget something."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import pickle
import subprocess
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.nccl_stub import stand_in
from tests.nccl_stub.stand_in import memory, signatures

pytestmark = pytest.mark.usefixtures("stand_in_without_nccl")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def cupy(stand_in_without_nccl: Any) -> Any:
    return importlib.import_module("cupy")


def held_by(x: Any) -> np.ndarray[Any, Any]:
    """What lies in the memory of a device array now, whoever has yet to write there."""
    return np.ndarray.view(x, np.ndarray)


# Streams.


def test_a_result_is_garbage_until_its_stream_is_waited_for(cupy: Any) -> None:
    y = cupy.arange(5, dtype=cupy.float32) * 2
    assert np.isnan(held_by(y)).all()
    cupy.cuda.get_current_stream().synchronize()
    assert held_by(y).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "change",
    [
        lambda cupy, x: x.__iadd__(1),
        lambda cupy, x: x.__setitem__(..., 2),
        lambda cupy, x: x.__setitem__(slice(0, 1), cupy.ones(1)),
        lambda cupy, x: x.fill(2),
        lambda cupy, x: x.sort(),
        lambda cupy, x: cupy.add(x, 1, out=x),
        lambda cupy, x: cupy.add(x, 1, x),
        lambda cupy, x: cupy.clip(x, 1, 2, x),
        lambda cupy, x: cupy.ones((2, 2)).sum(0, None, x),
        lambda cupy, x: cupy.copyto(x, 2),
        lambda cupy, x: cupy.put(x, 0, 2),
        lambda cupy, x: np.multiply(x, 2, out=x),
        lambda cupy, x: cupy.sum(cupy.ones((2, 2)), axis=0, out=x),
        lambda cupy, x: x.set(np.ones(2)),
    ],
)
def test_a_change_is_not_seen_until_its_stream_is_waited_for(cupy: Any, change: Any) -> None:
    x = cupy.asarray(np.array([3.0, 0.0]))
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    change(cupy, x)
    assert held_by(x).tolist() == [3, 0]
    stream.synchronize()
    assert held_by(x).tolist() != [3, 0]


@pytest.mark.parametrize("waits", [False, True])
def test_a_side_stream_needs_an_event_of_the_compute_stream(cupy: Any, waits: bool) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4) * 3
    event = cupy.cuda.Event(disable_timing=True)
    event.record()
    if waits:
        side.wait_event(event)
    with side:
        y = x + 1
    assert (y.get(stream=side) == 4).all() == waits


@pytest.mark.parametrize("waits", [False, True])
def test_the_compute_stream_needs_an_event_of_a_side_stream(cupy: Any, waits: bool) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    compute = cupy.cuda.get_current_stream()
    x = cupy.ones(4)
    side.wait_event(compute.record())
    with side:
        x += 1
    if waits:
        compute.wait_event(side.record())
    assert ((x * 10).get() == 20).all() == waits


@pytest.mark.parametrize("non_blocking", [False, True])
def test_only_blocking_streams_are_ordered_with_the_null_stream(
    cupy: Any, non_blocking: bool
) -> None:
    side = cupy.cuda.Stream(non_blocking=non_blocking)
    x = cupy.ones(4) * 3
    with side:
        x += 1
        behind = x * 1
        side.synchronize()
    assert (held_by(behind) == 4).all() != non_blocking


def test_an_event_is_where_it_was_recorded_last_when_it_was_waited_for(cupy: Any) -> None:
    stream, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    event = cupy.cuda.Event()
    assert event.done  # before it is recorded there is nothing to wait for
    x = cupy.ones(2)
    event.record(stream)
    side.wait_event(event)
    y = cupy.ones(2)
    event.record(stream)
    side.synchronize()
    assert (held_by(x) == 1).all()
    assert np.isnan(held_by(y)).all()
    assert event.done
    assert (held_by(y) == 1).all()


def test_streams_are_current_per_thread_device_and_block(cupy: Any) -> None:
    null, side = cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)
    assert cupy.cuda.get_current_stream() == null
    assert (null.ptr, side.ptr > 0) == (0, True)
    with side:
        assert cupy.cuda.get_current_stream() is side
        with cupy.cuda.Device(1):
            assert cupy.cuda.get_current_stream() == null
            with pytest.raises(RuntimeError, match="does not match"):
                side.use()
    assert cupy.cuda.get_current_stream() == null
    side.use()
    assert cupy.cuda.get_current_stream() is side
    null.use()


def test_an_event_cannot_be_recorded_on_another_device(cupy: Any) -> None:
    event = cupy.cuda.Event()
    with cupy.cuda.Device(1), pytest.raises(RuntimeError, match="InvalidResourceHandle"):
        event.record()


def test_times_between_events_are_those_of_running(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    begin = stream.record()
    stand_in.delay(stream, lambda: time.sleep(0.01))
    end = stream.record()
    end.synchronize()
    assert 10 <= cupy.cuda.get_elapsed_time(begin, end) < 1000


def test_functions_of_the_host_run_in_their_turn(cupy: Any) -> None:
    stream, seen = cupy.cuda.Stream(non_blocking=True), []
    stream.launch_host_func(seen.append, 1)
    stand_in.delay(stream, lambda: seen.append(2))
    assert seen == []
    assert stream.done
    assert seen == [1, 2]


def test_the_host_goes_on_where_a_stream_has_to_wait(cupy: Any) -> None:
    compute, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    kernel = cupy.ElementwiseKernel("T x", "T y", "y = x + 1", "plus_one")
    x, order = cupy.arange(4.0), cupy.asarray([3, 2, 1, 0])
    release = stand_in.hold(side)
    with side:
        x += 1
    compute.wait_event(side.record())
    y = x * 2
    total, parts = y.sum(), cupy.split(y * y, 2)
    low, high = cupy.divmod(y, 3)
    turned, plus = x[order], kernel(x)
    y[1:] -= x[:3]
    del x
    assert not compute.done
    assert np.isnan(held_by(total))
    release()
    assert y.get().tolist() == [2, 3, 4, 5]
    assert total.get() == 20
    assert [part.tolist() for part in parts] == [[4, 16], [36, 64]]
    assert (low.tolist(), high.tolist()) == ([0, 1, 2, 2], [2, 1, 0, 2])
    assert (turned.tolist(), plus.tolist()) == ([4, 3, 2, 1], [2, 3, 4, 5])


def test_errors_are_raised_at_the_call_even_where_a_stream_has_to_wait(cupy: Any) -> None:
    stream, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    stand_in.hold(side)()
    stream.wait_event(side.record())
    with pytest.raises(ValueError, match="broadcast"):
        cupy.ones(3) + cupy.ones(4)


# Memory.


def test_freed_memory_is_garbage_to_who_still_reads_it(cupy: Any) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    side.wait_event(cupy.cuda.get_current_stream().record())
    bytes_of_x = memory.block_of(x).memory.data
    view = x[1:]
    before = cupy.get_default_memory_pool().used_bytes()
    del x
    side.synchronize()
    assert held_by(view).tolist() == [1, 1, 1]  # a view holds it
    del view
    gc.collect()
    assert np.isnan(bytes_of_x.view(np.float64)).all()
    assert before - cupy.get_default_memory_pool().used_bytes() == 32


def test_memory_may_be_freed_when_its_stream_waits_for_its_readers(cupy: Any) -> None:
    compute, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    release = stand_in.hold(side)
    side.wait_event(compute.record())
    with side:
        y = x + 1
    compute.wait_event(side.record())
    del x  # used next by what comes behind the wait
    release()
    assert (y + 0).tolist() == [2, 2, 2, 2]


def test_a_copy_to_the_device_reads_pinned_memory_when_it_runs(cupy: Any) -> None:
    pinned = importlib.import_module("cupyx").zeros_pinned(3)
    ordinary = np.zeros(3)
    x, y, z = cupy.empty(3), cupy.empty(3), cupy.empty(3)
    x.set(pinned)
    y.set(ordinary)
    pinned[:] = ordinary[:] = 1
    assert (x.tolist(), y.tolist()) == ([1, 1, 1], [0, 0, 0])
    z.set(pinned)
    del pinned
    assert np.isnan(z.get()).all()


def test_a_copy_to_the_host_can_be_waited_for(cupy: Any) -> None:
    pinned = importlib.import_module("cupyx").zeros_pinned(3)
    (cupy.ones(3) * 2).get(out=pinned, blocking=False)
    assert pinned.tolist() == [0, 0, 0]
    cupy.cuda.get_current_stream().synchronize()
    assert pinned.tolist() == [2, 2, 2]  # what was copied has been freed, behind the copy
    x = cupy.ones(3)
    x.get(out=pinned)
    assert pinned.tolist() == [1, 1, 1]


# Arrays.


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
    assert np.isnan(held_by(y)).all()
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


# Kernels.


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
    assert np.isnan(held_by(z)).all()
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


# Devices and modules.


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
