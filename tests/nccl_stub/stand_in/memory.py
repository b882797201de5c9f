"""Device and pinned memory: garbage before the first write, and garbage again once it is free."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import devices

__all__ = ["POISON", "Block", "Pointer", "Pool", "allocate", "block_of", "live_bytes"]

POISON = 0xFF
"""Every byte of garbage: NaN in all floats, -1 in integers."""

_ALIGNMENT = 512  # as CuPy's pool
_live: dict[int, int] = {}


class Block(np.ndarray):  # type: ignore[type-arg]
    """Memory that is overwritten with garbage the moment that nobody holds it any more.

    Arrays are made on it and keep it; it is handed out to nobody else.
    """

    device = -1
    pinned = False


def allocate(nbytes: int, *, pinned: bool = False) -> Block:
    """Return memory of the current device (or of the host, pinned) that is full of garbage."""
    whole = np.full(nbytes + _ALIGNMENT, POISON, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    memory = whole[start : start + nbytes]
    block = memory.view(Block)
    block.device, block.pinned = devices.current(), pinned
    where = -1 if pinned else block.device
    _live[where] = _live.get(where, 0) + nbytes
    weakref.finalize(block, _free, memory, where).atexit = False
    return block


def _free(memory: np.ndarray[Any, Any], where: int) -> None:
    memory.fill(POISON)
    _live[where] = _live.get(where, 0) - memory.nbytes


def live_bytes(device: int) -> int:
    """Return how many bytes of a device (of pinned memory: -1) are held."""
    return _live.get(device, 0)


def block_of(x: Any) -> Block | None:
    """Return the block that an array lies in; None for ordinary memory of the host."""
    while x is not None and not isinstance(x, Block):
        # numpy's as_strided keeps the array in an object of its own with a `base`.
        x = np.ndarray.base.__get__(x) if isinstance(x, np.ndarray) else getattr(x, "base", None)  # type: ignore[attr-defined]
    return x


class Pointer:
    """cupy.cuda.MemoryPointer, as far as it says where memory lies."""

    def __init__(self, block: Block, ptr: int) -> None:
        self.ptr = ptr
        self.device_id = block.device
        start = block.__array_interface__["data"][0] if block.nbytes else 0
        self.mem = SimpleNamespace(ptr=start, size=block.nbytes, device_id=block.device)

    @property
    def device(self) -> devices.Device:
        return devices.Device(self.device_id)

    def __int__(self) -> int:
        return self.ptr


class Pool:
    """cupy.get_default_memory_pool(), of the current device, or its sister for pinned memory."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned

    def used_bytes(self) -> int:
        return live_bytes(-1 if self._pinned else devices.current())

    def total_bytes(self) -> int:
        return self.used_bytes()  # nothing is cached

    def free_bytes(self) -> int:
        return 0

    def n_free_blocks(self) -> int:
        return 0

    def free_all_blocks(self, stream: object = None) -> None:
        """Do nothing: what is free has gone back already."""


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray[Any, Any]:
    """cupyx.empty_pinned."""
    shape = (shape,) if np.ndim(shape) == 0 else tuple(shape)
    nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=allocate(nbytes, pinned=True), order=order)  # type: ignore[call-overload]


def zeros_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray[Any, Any]:
    """cupyx.zeros_pinned."""
    made = empty_pinned(shape, dtype, order)
    made.fill(0)
    return made


def empty_like_pinned(a: Any, dtype: Any = None) -> np.ndarray[Any, Any]:
    """cupyx.empty_like_pinned."""
    return empty_pinned(a.shape, dtype or a.dtype)


def zeros_like_pinned(a: Any, dtype: Any = None) -> np.ndarray[Any, Any]:
    """cupyx.zeros_like_pinned."""
    return zeros_pinned(a.shape, dtype or a.dtype)
