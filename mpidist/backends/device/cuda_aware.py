"""Whether the MPI library takes device arrays, and whether it gets them.

A library that is not CUDA-aware reads a device's address as one of the host: at best the program is
killed. So it gets device arrays only if the user asks for it, by ``MPIDIST_CUDA_AWARE_MPI=1``, and
it says itself that it can; and only where NCCL does not carry them, since the two on one GPU may
wait for each other for ever.
"""

from __future__ import annotations

import ctypes
from typing import Any

from mpidist import env
from mpidist.backends.base import Backend
from mpidist.backends.device.staging import HostStaging
from mpidist.backends.loaded import loaded_libraries, mpi_library
from mpidist.errors import BackendUnavailableError


def ask_mpi(mpi: Any, path: str) -> tuple[bool | None, str]:
    """Ask the MPI library whether it is CUDA-aware, without giving it memory of a GPU.

    Parameters
    ----------
    mpi : module
        The initialised ``mpi4py.MPI``.
    path : str
        The library's file; empty if it is not known.

    Returns
    -------
    (bool or None, str)
        What it says, None if it says nothing; and how it says so.

    Notes
    -----
    ``MPIX_Query_cuda_support`` is an extension that MPICH and Open MPI share. mpi4py opens the
    library for itself only, so that it is opened once more by its path. The kinds of memory are
    MPI 4.1's way. A library may say yes and still fail, as for want of a driver.
    """
    kinds = mpi.COMM_WORLD.Get_info().get("mpi_memory_alloc_kinds")
    try:
        query = ctypes.CDLL(path).MPIX_Query_cuda_support if path else None
    except (OSError, AttributeError):
        query = None
    if query is not None:
        answer = bool(query())
        suffix = f"; memory kinds {kinds}" if kinds else ""
        return answer, f"MPIX_Query_cuda_support{suffix}"
    if kinds:
        return "cuda" in kinds.replace(":", ",").split(","), f"memory kinds {kinds}"
    return None, ""


def is_wanted(mpi: Any) -> bool:
    """Whether MPI, the initialised ``mpi4py.MPI``, gets device arrays: the user asks, and it can.

    Raises
    ------
    BackendUnavailableError
        If ``MPIDIST_CUDA_AWARE_MPI=1`` asks for it, and the library does not say that it can.
    """
    if not env.cuda_aware_mpi():
        return False
    aware, evidence = ask_mpi(mpi, mpi_library(loaded_libraries()))
    if aware:
        return True
    said = f"it says no ({evidence})" if aware is False else "it does not say that it is"
    raise BackendUnavailableError(
        "MPIDIST_CUDA_AWARE_MPI=1 asks for device arrays over MPI, and this MPI library is not "
        f"CUDA-aware: {said}. Take one that was built with CUDA, and switch it on (Cray MPICH: "
        "MPICH_GPU_SUPPORT_ENABLED=1; Open MPI of conda-forge: OMPI_MCA_opal_cuda_support=true); "
        "or unset the variable: NCCL carries device arrays without it"
    )


def stage(host: Backend) -> HostStaging:
    """Make what carries device arrays without NCCL between the ranks of `host`.

    The MPI library helps where `is_wanted` says so; it raises as that does.
    """
    if host.name != "mpi":
        return HostStaging(host)
    from mpidist.backends.mpi.library import load_mpi

    return HostStaging(host, aware=is_wanted(load_mpi()))
