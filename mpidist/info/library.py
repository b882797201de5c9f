"""What the MPI library tells of itself once it has started."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

from mpidist.backends.mpi import library_name
from mpidist.info.facts import Library
from mpidist.info.software import loaded_libraries

__all__ = ["describe_library", "library_file"]

_LEVELS = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")


def describe_library(mpi: Any) -> Library:
    """Return the facts of the MPI library.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``, initialised.
    """
    path = library_file(loaded_libraries())
    provided = mpi.Query_thread()
    level = next((name for name in _LEVELS if getattr(mpi, name) == provided), str(provided))
    aware, evidence = _cuda_aware(mpi, path)
    return Library(
        name=library_name(mpi),
        vendor=mpi.get_vendor()[0],
        standard=".".join(map(str, mpi.Get_version())),
        abi=_abi(Path(mpi.__file__).name),
        path=path,
        thread_level=f"MPI_{level}",
        cuda_aware=aware,
        cuda_evidence=evidence,
        size=mpi.COMM_WORLD.size,
    )


def library_file(files: list[str]) -> str:
    """Return which of these files is the MPI library itself, not one of its other languages."""
    form = re.compile(r"libmpi(?!_?(cxx|fort|usempi|mpifh|java))\w*\.so")
    return next((file for file in files if form.match(Path(file).name)), "")


def _abi(file: str) -> str:
    """Return ``mpich`` for MPI.mpich.cpython-311.so; nothing for MPI.cpython-311.so."""
    name = file.split(".")[1]
    return "" if name.startswith(("cpython", "abi3", "pypy", "so")) else name


def _cuda_aware(mpi: Any, path: str) -> tuple[bool | None, str]:
    """Ask, without giving it memory of a GPU: a library that is not aware would crash.

    The function is an extension that MPICH and Open MPI share. mpi4py opens the library for itself
    only, so that it is opened once more by its path.
    """
    kinds = mpi.COMM_WORLD.Get_info().get("mpi_memory_alloc_kinds")
    try:
        query = ctypes.CDLL(path).MPIX_Query_cuda_support if path else None
    except (OSError, AttributeError):
        query = None
    if query is not None:
        answer = bool(query())
        words = f"; memory kinds {kinds}" if kinds else ""
        return answer, f"MPIX_Query_cuda_support{words}"
    if kinds:
        return "cuda" in kinds, f"memory kinds {kinds}"
    return None, ""
