"""One group for host and device arrays: each travels where it lies.

A host transport has a second one for device arrays, `Backend.device`; the arrays of a collective
decide which of the two carries it. Either all ranks have the second one, or none.
"""

from __future__ import annotations

import sys

from mpidist import env
from mpidist.arrays.namespaces import device_module
from mpidist.backends.availability import why_no_gpu, why_no_nccl
from mpidist.backends.base import Backend


def why_not(*, asked: bool) -> str | None:
    """Say why this rank cannot carry device arrays over NCCL; None if it can.

    Only if the program has asked for device arrays may CuPy be imported. If it has not, and has not
    imported CuPy either, None means that there seems to be a GPU; connecting the ranks finds out
    the rest.
    """
    # A program that uses no GPU pays nothing for those of its node: no import, and no context.
    reason = why_no_gpu()
    if reason is not None or not (asked or "cupy" in sys.modules):
        return reason
    try:
        device_module()
    except Exception as error:  # noqa: BLE001  # of a library that does not fit, whatever it raises
        return f"CuPy cannot be imported: {error}"
    return why_no_nccl()


def may_stage() -> bool:
    """Whether this rank has a GPU, and lets its arrays go by way of the host."""
    return env.gpu_fallback() and why_no_gpu() is None


def use_device(local_rank: int) -> int | None:
    """Make one of the visible GPUs the current device of this thread, if there is one.

    Returns
    -------
    int or None
        The device: number `local_rank`, modulo the number of GPUs that this rank sees; or the one
        that is current, if the program has chosen another than the first before. None where CuPy
        was not imported, or sees no GPU.
    """
    if "cupy" not in sys.modules or why_no_gpu() is not None:
        return None
    cuda = device_module().cuda
    chosen: int = cuda.Device().id
    if chosen == 0:
        chosen = local_rank % cuda.runtime.getDeviceCount()
        cuda.Device(chosen).use()
    return chosen


def carry_devices(host: Backend, reason: str | None, *, fallback: bool) -> None:
    """Let a transport of host arrays carry device arrays, too; the same on all ranks.

    `reason` says why NCCL cannot carry them; None where it can, on all ranks. `fallback` is whether
    they go by way of the host then.
    """
    if reason is None:
        from mpidist.backends.device.nccl import NcclBackend

        host.device = NcclBackend(host)
    elif fallback:
        from mpidist.backends.device.cuda_aware import stage

        host.device = stage(host)
    else:
        host.no_device = reason
