"""CuPy's own NCCL extension over the stub of libnccl."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from tests.nccl_stub import build
from tests.nccl_stub.stand_in import devices, queues

__all__ = ["NoStubError", "module"]

_EXTENSION = "cupy_backends.cuda.libs.nccl"
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ulonglong)
_kept: list[Any] = []  # the stub and what it calls, once they are connected


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
    if reason := build.missing():
        raise NoStubError(reason)
    stub = build.load()
    stub.nccl_stub_on_enqueue.argtypes = [_CALLBACK]
    stub.nccl_stub_set_device.argtypes = [ctypes.c_int]

    def queue(stream: int | None, ticket: int) -> None:
        # Not 0 is done, or failed: a kernel of an aborted communicator is over, too.
        queues.at(stream or 0).push(lambda: stub.nccl_stub_try(ticket) != 0, ticket=True)

    _kept[:] = [stub, _CALLBACK(queue)]
    stub.nccl_stub_on_enqueue(_kept[1])
    stub.nccl_stub_set_device(devices.current())
    devices.on_use(stub.nccl_stub_set_device)
    extension = importlib.import_module(_EXTENSION)
    made = ModuleType("cupy.cuda.nccl")
    vars(made).update({k: v for k, v in vars(extension).items() if not k.startswith("_")})
    made.available = True  # type: ignore[attr-defined]
    return made


def disconnect() -> None:
    """Let the stub's calls run at once again."""
    if _kept:
        _kept[0].nccl_stub_on_enqueue(_CALLBACK())
