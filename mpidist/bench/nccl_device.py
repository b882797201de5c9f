"""Times on a device, and what device it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpidist.arrays.namespaces import device_module
from mpidist.backends.device.nccl import calls
from mpidist.bench.times import Series

__all__ = ["DeviceClock", "cache_bytes", "describe_device", "enqueued", "in_a_row"]

_DRIVER = Path("/proc/driver/nvidia/version")


class DeviceClock:
    """Times what a call puts on the current stream, by events before and behind it.

    Calling it blocks until the device is done, so that the next call finds the stream empty.
    """

    def __init__(self) -> None:
        cuda = device_module().cuda
        self._begin, self._end = cuda.Event(), cuda.Event()
        self._milliseconds = cuda.get_elapsed_time

    def __call__(self, call: Callable[[], object]) -> float:
        """Make the call, and return the seconds between the two events."""
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._milliseconds(self._begin, self._end)) * 1e-3


def in_a_row(series: Series, number: int) -> Series:
    """Return a series whose calls are so many of the given one's; the time is that of one."""

    def call(one: Callable[[], object] = series.call) -> None:
        for _ in range(number):
            one()

    return replace(series, call=call, operations=number)


def enqueued(series: Series) -> Series:
    """Return the series in the host's time, from an empty stream on."""
    stream = device_module().cuda.get_current_stream()
    return replace(series, before=stream.synchronize, clock=None)


def describe_device() -> str:
    """Return the name of the current device, and the versions of what drives it."""
    xp = device_module()
    runtime, number = xp.cuda.runtime, xp.cuda.Device().id
    name = _properties()["name"]
    name = name.decode() if isinstance(name, bytes) else str(name)
    nccl = calls.version()
    versions = (
        f"driver {_driver()} for CUDA {_cuda(runtime.driverGetVersion())}",
        f"CUDA {_cuda(runtime.runtimeGetVersion())}",
        f"CuPy {xp.__version__}",
        f"NCCL {nccl // 10000}.{nccl // 100 % 100}.{nccl % 100}",
    )
    return f"GPU {number} {name}; {', '.join(versions)}"


def cache_bytes() -> int:
    """Return the size of the current device's last cache; 0 if CuPy does not say."""
    return int(_properties().get("l2CacheSize", 0))


def _properties() -> dict[str, Any]:
    cuda = device_module().cuda
    found: dict[str, Any] = cuda.runtime.getDeviceProperties(cuda.Device().id)
    return found


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str:
    """Return the version of the kernel's driver; of no version where it does not say."""
    try:
        found = re.search(r"\s(\d+\.[\d.]+)\s", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else "of unknown version"
