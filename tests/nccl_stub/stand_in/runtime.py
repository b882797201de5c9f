"""cupy.cuda.runtime of the stand-in, and the rest of cupy.cuda that is not streams."""

from __future__ import annotations

from typing import Any

from tests.nccl_stub.stand_in import devices, memory, streams
from tests.nccl_stub.stand_in.devices import CUDARuntimeError

__all__ = [
    "CUDARuntimeError",
    "deviceCanAccessPeer",
    "deviceGetPCIBusId",
    "deviceSynchronize",
    "driverGetVersion",
    "eventQuery",
    "getDevice",
    "getDeviceCount",
    "getDeviceProperties",
    "memGetInfo",
    "runtimeGetVersion",
    "setDevice",
]

_MEMORY_OF_DEVICE = 1 << 34
is_hip = False


def getDeviceCount() -> int:
    devices.usable()
    return devices.count()


def getDevice() -> int:
    return devices.current()


def setDevice(device: int) -> None:
    devices.use(device)


def deviceGetPCIBusId(device: int) -> str:
    return devices.bus_id(device)


def deviceSynchronize() -> None:
    devices.Device().synchronize()


def eventQuery(event: int) -> int:
    return streams.event_query(event)


def deviceCanAccessPeer(device: int, peer: int) -> int:
    return 0


def memGetInfo() -> tuple[int, int]:
    return _MEMORY_OF_DEVICE - memory.live_bytes(devices.current()), _MEMORY_OF_DEVICE


def runtimeGetVersion() -> int:
    return 12090


def driverGetVersion() -> int:
    return 12090


def getDeviceProperties(device: int) -> dict[str, Any]:
    domain, bus, rest = devices.bus_id(device).split(":")
    return {
        "name": b"stand-in",
        "uuid": bytes([device]) * 16,
        "totalGlobalMem": _MEMORY_OF_DEVICE,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 1,
        "pciDomainID": int(domain, 16),
        "pciBusID": int(bus, 16),
        "pciDeviceID": int(rest.partition(".")[0], 16),
    }
