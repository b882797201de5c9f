"""CuPy's own NCCL extension over the stub of libnccl."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import shutil
import sys
from types import ModuleType
from typing import Any

from tests.nccl_stub.stand_in import devices, streams

__all__ = ["NoStubError", "module"]

_EXTENSION = "cupy_backends.cuda.libs.nccl"
_kept: list[Any] = []


class NoStubError(RuntimeError):
    """There is no compiler for the stub, or no wheel of CuPy with the extension."""


def module() -> ModuleType:
    """Return what ``import cupy.cuda.nccl`` gives, its calls queued on the stand-in's streams.

    The extension is imported without cupy: it needs only `cupy_backends`, and libnccl.so.2, which
    the stub is if it has been loaded first.
    """
    if not _kept and _EXTENSION in sys.modules:
        raise NoStubError("CuPy's NCCL extension has been imported over the real libnccl")
    if importlib.util.find_spec("cupy_backends") is None:
        raise NoStubError("no CuPy: pip install cupy-cuda12x (it needs no GPU)")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        raise NoStubError("no C compiler for the stub of libnccl")
    build: Any = importlib.import_module("tests.nccl_stub.build")
    stub = build.load()
    stub.nccl_stub_try.argtypes = [ctypes.c_ulonglong]
    stub.nccl_stub_try.restype = ctypes.c_int
    callback_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ulonglong)

    def queue(stream: int | None, ticket: int) -> None:
        # Not 0 is done, or failed: a kernel of an aborted communicator is over, too.
        streams.queue_at(stream or 0).push(lambda: bool(stub.nccl_stub_try(ticket)))

    _kept[:] = [callback_type(queue)]
    stub.nccl_stub_on_enqueue.argtypes = [callback_type]
    stub.nccl_stub_on_enqueue(_kept[0])
    stub.nccl_stub_set_device.argtypes = [ctypes.c_int]
    devices.on_use(stub.nccl_stub_set_device)
    extension = importlib.import_module(_EXTENSION)
    made = ModuleType("cupy.cuda.nccl")
    vars(made).update({k: v for k, v in vars(extension).items() if not k.startswith("_")})
    made.available = True  # type: ignore[attr-defined]
    return made
