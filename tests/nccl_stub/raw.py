"""NCCL's functions through ctypes, with numpy arrays, for the stand-in's own tests."""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from tests.nccl_stub.build import load

__all__ = [
    "DTYPES",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "INVALID_USAGE",
    "IN_PROGRESS",
    "REDUCTIONS",
    "REMOTE",
    "SYSTEM",
    "Blocked",
    "Communicator",
    "NcclError",
    "Tickets",
    "check",
    "group",
    "library",
    "unique_id",
]

Array = np.ndarray[Any, Any]

DTYPES = [
    *map(np.dtype, ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float16")),
    *map(np.dtype, ("float32", "float64", ml_dtypes.bfloat16)),
]
REDUCTIONS = ["sum", "prod", "max", "min", "avg"]
SYSTEM, INTERNAL, INVALID_ARGUMENT, INVALID_USAGE, REMOTE, IN_PROGRESS = range(2, 8)


@functools.cache
def library() -> ctypes.CDLL:
    """Load the stand-in when first called: by ranks, not by pytest, which imports this, too."""
    return load()


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


class NcclError(Exception):
    """A function's code, and what ncclGetLastError says."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text


def check(code: int) -> None:
    if code:
        raise NcclError(code, library().ncclGetLastError(None).decode())


def unique_id() -> bytes:
    made = UniqueId()
    check(library().ncclGetUniqueId(ctypes.byref(made)))
    return bytes(memoryview(made).cast("B"))


@contextmanager
def group() -> Iterator[None]:
    check(library().ncclGroupStart())
    try:
        yield
    finally:
        code = library().ncclGroupEnd()
    check(code)


class Blocked:
    """Something that blocks, in a thread; `code` is what it has failed with in the end."""

    def __init__(self, fn: Callable[..., object], *args: Any) -> None:
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(fn, *args), daemon=True)
        self._thread.start()

    def _run(self, fn: Callable[..., object], *args: Any) -> None:
        try:
            fn(*args)
            self.code = 0
        except NcclError as error:
            self.code = error.code

    @property
    def running(self) -> bool:
        """Whether it still blocks, a while after the question."""
        self._thread.join(0.1)
        return self._thread.is_alive()

    def join(self) -> int | None:
        self._thread.join(5)
        return self.code

    @classmethod
    def start(cls, size: int, made: bytes, rank: int) -> tuple[Blocked, Communicator]:
        """Start a communicator, and return its handle before the others have come."""
        handle = ctypes.c_void_p()

        def start() -> None:
            library().nccl_stub_set_device(rank)  # of the thread, as in CUDA
            Communicator.of_rank(size, made, rank, handle)

        blocked = cls(start)
        while not handle.value and blocked.code is None:
            time.sleep(1e-3)
        return blocked, Communicator(ctypes.c_void_p(handle.value))


class Tickets:
    """Makes execution lazy while it is entered; collects (stream, ticket)."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int]] = []

    def __enter__(self) -> list[tuple[int, int]]:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ulonglong)
        self._callback = kind(lambda stream, ticket: self.taken.append((stream or 0, ticket)))
        library().nccl_stub_on_enqueue(self._callback)
        return self.taken

    def __exit__(self, *_: object) -> None:
        library().nccl_stub_on_enqueue(None)


def _pointer(array: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


class Communicator:
    """A rank's handle; `stream` is an int that only the stand-in's tickets show."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self.handle = handle
        self.stream = 0

    @classmethod
    def of_rank(
        cls, size: int, made: bytes, rank: int, handle: ctypes.c_void_p | None = None
    ) -> Communicator:
        handle = ctypes.c_void_p() if handle is None else handle  # an empty one is false
        value = UniqueId.from_buffer_copy(made)
        check(library().ncclCommInitRank(ctypes.byref(handle), size, value, rank))
        return cls(handle)

    @classmethod
    def all_of(cls, size: int, devices: list[int] | None = None) -> list[Communicator]:
        handles = (ctypes.c_void_p * size)()
        numbers = (ctypes.c_int * size)(*devices) if devices else None
        check(library().ncclCommInitAll(handles, size, numbers))
        return [cls(ctypes.c_void_p(handle)) for handle in handles]

    def _ask(self, name: str) -> int:
        answer = ctypes.c_int()
        check(getattr(library(), name)(self.handle, ctypes.byref(answer)))
        return answer.value

    @property
    def rank(self) -> int:
        return self._ask("ncclCommUserRank")

    @property
    def size(self) -> int:
        return self._ask("ncclCommCount")

    @property
    def device(self) -> int:
        return self._ask("ncclCommCuDevice")

    @property
    def async_error(self) -> int:
        return self._ask("ncclCommGetAsyncError")

    def split(self, color: int, key: int) -> Communicator | None:
        handle = ctypes.c_void_p()
        check(library().ncclCommSplit(self.handle, color, key, ctypes.byref(handle), None))
        return Communicator(handle) if handle.value else None

    def finalize(self) -> None:
        check(library().ncclCommFinalize(self.handle))

    def destroy(self) -> None:
        check(library().ncclCommDestroy(self.handle))

    def abort(self) -> None:
        check(library().ncclCommAbort(self.handle))

    def _issue(
        self, name: str, arrays: list[Array | None], dtype: Any, count: int, *numbers: int
    ) -> None:
        pointers = map(_pointer, arrays)
        rest = *numbers, self.handle, ctypes.c_void_p(self.stream)
        function = getattr(library(), name)
        check(function(*pointers, ctypes.c_size_t(count), DTYPES.index(np.dtype(dtype)), *rest))

    def all_reduce(self, send: Array, recv: Array, op: str = "sum") -> None:
        number = REDUCTIONS.index(op)
        self._issue("ncclAllReduce", [send, recv], send.dtype, send.size, number)

    def reduce(self, send: Array, recv: Array | None, op: str, root: int) -> None:
        number = REDUCTIONS.index(op)
        self._issue("ncclReduce", [send, recv], send.dtype, send.size, number, root)

    def reduce_scatter(self, send: Array, recv: Array, op: str = "sum") -> None:
        number = REDUCTIONS.index(op)
        self._issue("ncclReduceScatter", [send, recv], send.dtype, recv.size, number)

    def all_gather(self, send: Array, recv: Array) -> None:
        self._issue("ncclAllGather", [send, recv], send.dtype, send.size)

    def broadcast(self, send: Array | None, recv: Array, root: int) -> None:
        self._issue("ncclBroadcast", [send, recv], recv.dtype, recv.size, root)

    def bcast(self, buffer: Array, root: int) -> None:
        self._issue("ncclBcast", [buffer], buffer.dtype, buffer.size, root)

    def send(self, array: Array, peer: int) -> None:
        self._issue("ncclSend", [array], array.dtype, array.size, peer)

    def recv(self, array: Array, peer: int) -> None:
        self._issue("ncclRecv", [array], array.dtype, array.size, peer)
