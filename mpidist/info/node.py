"""What the first rank of a node can tell of it: cores, memory, GPUs, and what others left there."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from mpidist.backends.crossover_file import processor
from mpidist.backends.meetings import supported
from mpidist.backends.shared_memory import DIRECTORY
from mpidist.info.facts import NodeFacts, SharedMemory
from mpidist.info.leftovers import find_leftovers

__all__ = ["gpus", "look_at_node", "shared_memory"]

_LONGEST_NAME = 96
"""Of a GPU, as NVML says (NVML_DEVICE_NAME_V2_BUFFER_SIZE)."""


def look_at_node(ranks: Sequence[int]) -> NodeFacts:
    """Return the facts of this node.

    Parameters
    ----------
    ranks : sequence of int
        Those that share its memory.
    """
    names, driver = gpus()
    return NodeFacts(
        host=platform.node(),
        ranks=ranks,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=processor(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        direct=supported(),
        shared=shared_memory(DIRECTORY),
        gpus=names,
        driver=driver,
        leftovers=find_leftovers(DIRECTORY),
    )


def shared_memory(directory: Path) -> SharedMemory | None:
    """Return the size of a file system, or None if it is not there or nothing can be made in it."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):
        return None
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    return SharedMemory(path=str(directory), total=total, free=free)


def gpus() -> tuple[Sequence[str], str]:
    """Return the names of the GPUs that this process may use, and the version of the driver.

    The driver's management library is asked, which makes no context on a GPU, as CUDA would. It
    does not know ``CUDA_VISIBLE_DEVICES``.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return [], ""
    if code := library.nvmlInit_v2():
        return [], f"the driver's library answers with error {code}"
    try:
        version = ctypes.create_string_buffer(_LONGEST_NAME)
        library.nvmlSystemGetDriverVersion(version, len(version))
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        names = [_gpu_name(library, index) for index in range(count.value)]
        return names, version.value.decode()
    finally:
        library.nvmlShutdown()


def _gpu_name(library: ctypes.CDLL, index: int) -> str:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_LONGEST_NAME)
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
        return "unknown"
    library.nvmlDeviceGetName(handle, name, len(name))
    return name.value.decode()
