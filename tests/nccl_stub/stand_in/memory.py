"""Device and pinned memory: garbage before the first write, and garbage again once it is free."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.nccl_stub.stand_in import devices, queues, streams

__all__ = [
    "POISON",
    "Block",
    "Memory",
    "Pointer",
    "Pool",
    "allocate",
    "block_of",
    "live_bytes",
    "unowned",
]

POISON = 0xFF
"""Every byte of garbage: NaN in all floats, -1 in integers."""

_ALIGNMENT = 512  # as CuPy's pool
_PINNED = -1
_live: dict[int, int] = {}
_buried: list[Memory] = []


class Memory:
    """Bytes, and whether they have been freed.

    Parameters
    ----------
    nbytes : int
        How many.
    device : int
        Where; -1 for pinned memory of the host.
    """

    def __init__(self, nbytes: int, device: int) -> None:
        # Not an array: numpy keeps the last base of its own type only, past the block.
        self.whole = bytearray(nbytes + _ALIGNMENT)
        self.start = -np.frombuffer(self.whole, np.uint8).ctypes.data % _ALIGNMENT
        self.data = np.frombuffer(self.whole, np.uint8, nbytes, self.start)
        self.data.fill(POISON)
        self.device = device
        self.freed = False
        # Whose later operations may be handed the memory: CuPy's pools are per stream.
        self.queue = None if device == _PINNED else streams.current_stream().queue
        _live[device] = _live.get(device, 0) + nbytes

    def free(self) -> None:
        """Overwrite it as soon as the stream that it was allocated on can have got another use.

        That is at once, unless that stream waits for others, or has yet to read memory: then in
        its turn. So who has let the stream wait for those that use the memory may free it.
        """
        _live[self.device] -= self.data.nbytes
        if self.queue is not None and self.queue.has_late_steps:
            self.queue.push(self._poison, late=True)
        else:
            self._poison()
        # NCCL has addresses. What it writes there must not hit memory of somebody else.
        if queues.any_tickets():
            _buried.append(self)
        else:
            _buried.clear()

    def _poison(self) -> None:
        self.freed = True
        self.data.fill(POISON)


class Block(np.ndarray):  # type: ignore[type-arg]
    """The base of all arrays on the same memory, which is freed with it."""

    memory: Memory


def allocate(nbytes: int, *, pinned: bool = False) -> Block:
    """Return memory of the current device (or of the host, pinned) that is full of garbage."""
    memory = Memory(nbytes, _PINNED if pinned else devices.usable())
    block = np.ndarray.__new__(Block, nbytes, np.uint8, memory.whole, memory.start)  # type: ignore[call-overload]
    block.memory = memory
    weakref.finalize(block, memory.free).atexit = False
    return block


def block_of(x: Any) -> Block | None:
    """Return the block that an array lies in; None for ordinary memory of the host."""
    while x is not None and not isinstance(x, Block):
        # numpy's as_strided puts an object of its own, with a `base`, between arrays.
        x = _base(x) if isinstance(x, np.ndarray) else getattr(x, "base", None)
    return x


def _base(x: np.ndarray[Any, Any]) -> Any:
    return np.ndarray.base.__get__(x)  # type: ignore[attr-defined]


def unowned(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the same elements in an array that does not keep its block from being freed."""
    block, plain = block_of(x), np.ndarray.view(x, np.ndarray)
    if block is None:
        return plain
    if not plain.size:
        return np.empty(plain.shape, plain.dtype)
    data = block.memory.data
    offset = plain.ctypes.data - data.ctypes.data
    return np.ndarray(plain.shape, plain.dtype, buffer=data, offset=offset, strides=plain.strides)


def live_bytes(device: int) -> int:
    """Return how many bytes of a device (of pinned memory: -1) are held."""
    return _live.get(device, 0)


class Pointer:
    """cupy.cuda.MemoryPointer, as far as it says where memory lies."""

    def __init__(self, block: Block, ptr: int) -> None:
        self.ptr = ptr
        data, self.device_id = block.memory.data, block.memory.device
        start = data.ctypes.data if data.nbytes else 0
        self.mem = SimpleNamespace(ptr=start, size=data.nbytes, device_id=self.device_id)

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
        return live_bytes(_PINNED if self._pinned else devices.current())

    def total_bytes(self) -> int:
        return self.used_bytes()  # nothing is cached

    def free_bytes(self) -> int:
        return 0

    def n_free_blocks(self) -> int:
        return 0

    def free_all_blocks(self, stream: object = None) -> None:
        """Do nothing: what is free has gone back already."""


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> Any:
    """cupyx.empty_pinned."""
    shape = (shape,) if np.ndim(shape) == 0 else tuple(shape)
    nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    block = allocate(nbytes, pinned=True)
    return np.ndarray(shape, dtype, buffer=block, order=order)  # type: ignore[call-overload]


def zeros_pinned(shape: Any, dtype: Any = float, order: str = "C") -> Any:
    """cupyx.zeros_pinned."""
    made = empty_pinned(shape, dtype, order)
    made.fill(0)
    return made


def empty_like_pinned(a: Any, dtype: Any = None) -> Any:
    """cupyx.empty_like_pinned."""
    return empty_pinned(a.shape, dtype or a.dtype)


def zeros_like_pinned(a: Any, dtype: Any = None) -> Any:
    """cupyx.zeros_like_pinned."""
    return zeros_pinned(a.shape, dtype or a.dtype)
