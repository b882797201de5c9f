"""What the driver tells of GPUs, by way of its management library.

That makes no context on a GPU, as CUDA would, and needs no CuPy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from mpidist.info.gpu_facts import Gpu

__all__ = ["Driver", "ask", "cuda_version"]

_LONGEST_NAME = 96
"""Of a GPU, as NVML says (NVML_DEVICE_NAME_V2_BUFFER_SIZE)."""


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Pci(ctypes.Structure):
    """nvmlPciInfo_t of nvmlDeviceGetPciInfo_v3."""

    _fields_ = (
        ("bus_id_of_v2", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


class Driver(NamedTuple):
    """The driver of the node.

    Attributes
    ----------
    gpus : sequence of Gpu
        All GPUs that this process may use; the driver does not know ``CUDA_VISIBLE_DEVICES``.
    version : str
        Its version, or why it cannot be asked; empty if there is none.
    cuda : str
        The newest version of CUDA that it knows; empty if it does not say.
    """

    gpus: Sequence[Gpu]
    version: str
    cuda: str


def ask() -> Driver:
    """Return what the driver says."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Driver([], "", "")
    if code := library.nvmlInit_v2():
        return Driver([], f"the driver's library answers with error {code}", "")
    try:
        version = ctypes.create_string_buffer(_LONGEST_NAME)
        library.nvmlSystemGetDriverVersion(version, len(version))
        count, cuda = ctypes.c_uint(), ctypes.c_int()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        gpus = [_gpu(library, index) for index in range(count.value)]
        return Driver(gpus, version.value.decode(), cuda_version(cuda.value))
    finally:
        library.nvmlShutdown()


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_LONGEST_NAME)
    memory, pci = _Memory(), _Pci()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
        return Gpu(name="unknown", memory=0, bus_id="")
    library.nvmlDeviceGetName(handle, name, len(name))
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    library.nvmlDeviceGetPciInfo_v3(handle, ctypes.byref(pci))
    return Gpu(name=name.value.decode(), memory=memory.total, bus_id=pci.bus_id.decode())


def cuda_version(number: int) -> str:
    """Return 12.4 for 12040; nothing for 0."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""
