"""The current device of a thread, and cupy.cuda.Device."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["CUDARuntimeError", "Device", "count", "current", "set_count", "use"]

_local = threading.local()
_count = [0]
_told: list[Callable[[int], object]] = []


class CUDARuntimeError(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError."""


def set_count(number: int) -> None:
    _count[0] = number
    _told.clear()
    vars(_local).clear()


def count() -> int:
    return _count[0]


def current() -> int:
    return getattr(_local, "device", 0)


def use(device: int) -> None:
    if not 0 <= device < count():
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    _local.device = device
    for tell in _told:
        tell(device)


def on_use(tell: Callable[[int], object]) -> None:
    """Let somebody know which device a thread makes its current one."""
    _told[:] = [tell]


def bus_id(device: int) -> str:
    if not 0 <= device < count():
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
    return f"0000:{device + 1:02X}:00.0"


class Device:
    """cupy.cuda.Device."""

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = current() if device is None else int(device)
        self._before: list[int] = []

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def use(self) -> None:
        use(self.id)

    def __enter__(self) -> Device:
        before = current()
        use(self.id)
        self._before.append(before)
        return self

    def __exit__(self, *_: object) -> None:
        use(self._before.pop())

    def synchronize(self) -> None:
        from tests.nccl_stub.stand_in import streams

        for queue in streams.queues_of(self.id):
            queue.drive(queue.pushed)

    @property
    def pci_bus_id(self) -> str:
        return bus_id(self.id)

    @property
    def mem_info(self) -> tuple[int, int]:
        from tests.nccl_stub.stand_in import runtime

        return runtime.memGetInfo()

    @property
    def compute_capability(self) -> str:
        return "90"
