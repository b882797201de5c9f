"""The current device of each thread, and cupy.cuda.Device."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = [
    "CUDARuntimeError",
    "Device",
    "bus_id",
    "count",
    "current",
    "on_use",
    "reset",
    "usable",
    "use",
]


class CUDARuntimeError(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError."""


class _State:
    def __init__(self, count: int) -> None:
        self.count = count
        self.of_thread = threading.local()
        self.told: list[Callable[[int], object]] = []


_state = [_State(0)]


def reset(count: int) -> None:
    """Let there be so many devices, of which every thread's current one is the first."""
    _state[:] = [_State(count)]


def on_use(tell: Callable[[int], object]) -> None:
    """Let somebody know which device a thread makes its current one."""
    _state[0].told.append(tell)


def count() -> int:
    return _state[0].count


def current() -> int:
    return getattr(_state[0].of_thread, "device", 0)


def use(device: int) -> None:
    _check(device)
    _state[0].of_thread.device = device
    for tell in _state[0].told:
        tell(device)


def usable() -> int:
    """Return the current device, of which something is wanted."""
    _check(current())
    return current()


def bus_id(device: int) -> str:
    _check(device)
    return f"0000:{device + 1:02X}:00.0"


def _check(device: int) -> None:
    if not count():
        raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    if not 0 <= device < count():
        raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")


class Device:
    """cupy.cuda.Device."""

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = current() if device is None else int(device)

    def __int__(self) -> int:
        return self.id

    def __index__(self) -> int:
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
        vars(_state[0].of_thread).setdefault("before", []).append(before)
        return self

    def __exit__(self, *_: object) -> None:
        use(_state[0].of_thread.before.pop())

    def synchronize(self) -> None:
        from tests.nccl_stub.stand_in import queues

        for queue in queues.of_device(self.id):
            queue.drive(queue.pushed)

    @property
    def pci_bus_id(self) -> str:
        return bus_id(self.id)

    @property
    def mem_info(self) -> tuple[int, int]:
        from tests.nccl_stub.stand_in import runtime

        with self:
            return runtime.memGetInfo()

    @property
    def compute_capability(self) -> str:
        return "90"
