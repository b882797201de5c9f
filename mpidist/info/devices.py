"""What a rank can do with arrays on a GPU: CuPy, the GPUs that it sees, and NCCL.

This process is made to be asked, so that CuPy is imported wherever it is installed. It is asked
for versions and places, which makes no context on a GPU.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from mpidist.backends.availability import why_no_gpu, why_no_nccl
from mpidist.backends.loaded import loaded_libraries
from mpidist.info.gpu_facts import Cupy, Nccl
from mpidist.info.nvml import cuda_version

__all__ = ["look_at_cupy", "look_at_nccl", "nccl_version"]


def look_at_cupy() -> Cupy:
    """Return what there is of CuPy, and which GPUs it sees."""
    # Before CuPy is imported the reason is that of the machine; afterwards, what CuPy says.
    problem = why_no_gpu()
    if find_spec("cupy") is None:
        return Cupy(version="", runtime="", visible=[], problem=problem or "")
    try:
        import cupy
    except Exception as error:  # noqa: BLE001  # of a library that does not fit, whatever it raises
        words = f"CuPy cannot be imported: {type(error).__name__}: {error}"
        return Cupy(version="", runtime="", visible=[], problem=words)
    problem = problem or why_no_gpu()
    return Cupy(
        version=cupy.__version__,
        runtime=cuda_version(_asked(cupy.cuda.runtime.runtimeGetVersion) or 0),
        visible=[] if problem else _asked(lambda: _places(cupy.cuda.runtime)) or [],
        problem=problem or "",
    )


def look_at_nccl(cupy: Cupy) -> Nccl:
    """Return what there is of NCCL; it is not initialised.

    Parameters
    ----------
    cupy : Cupy
        What `look_at_cupy` has found: with CuPy it is the library that CuPy loads.
    """
    problem = cupy.problem or why_no_nccl() or ""
    if cupy.version:
        # CuPy warns if there is none, and the report says so.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cupy.cuda import nccl
        number = _asked(nccl.get_version) if nccl.available else None
        if number is not None:
            built = nccl_version(_asked(nccl.get_build_version) or 0)
            return Nccl(version=nccl_version(number), file=_file(), built=built, problem=problem)
    for path in (*_nccl_of_wheels(), "libnccl.so.2"):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        said = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(said)) == 0:
            version = nccl_version(said.value)
            return Nccl(version=version, file=_file() or path, built="", problem=problem)
    return Nccl(version="", file="", built="", problem=problem)


def _places(runtime: Any) -> list[str]:
    return [runtime.deviceGetPCIBusId(index) for index in range(runtime.getDeviceCount())]


def _asked(question: Any) -> Any:
    """Return the answer, or None if there is none: without a driver nearly all of them raise."""
    try:
        return question()
    except Exception:  # noqa: BLE001  # CuPy's, of which only a loaded CuPy knows the class
        return None


def _file() -> str:
    return next((file for file in loaded_libraries() if "libnccl.so" in file), "")


def _nccl_of_wheels() -> Iterator[str]:
    for package in ("nvidia-nccl-cu12", "nvidia-nccl-cu13"):
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        yield from (str(file.locate()) for file in files if file.name == "libnccl.so.2")


def nccl_version(number: int) -> str:
    """Return 2.23.4 for 22304, and 2.8.4 for 2804, as NCCL counted before 2.9; nothing for 0."""
    thousand = 10_000 if number >= 10_000 else 1_000
    version = f"{number // thousand}.{number % thousand // 100}.{number % 100}"
    return version if number else ""
