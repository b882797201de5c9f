"""What the MPI library tells of itself once it has started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpidist.backends.device.cuda_aware import ask_mpi
from mpidist.backends.loaded import loaded_libraries, mpi_library
from mpidist.backends.mpi.library import library_name
from mpidist.info.facts import Library

__all__ = ["describe_library"]

_LEVELS = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")


def describe_library(mpi: Any) -> Library:
    """Return the facts of the MPI library.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``, initialised.
    """
    path = mpi_library(loaded_libraries())
    provided = mpi.Query_thread()
    level = next((name for name in _LEVELS if getattr(mpi, name) == provided), str(provided))
    aware, evidence = ask_mpi(mpi, path)
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


def _abi(file: str) -> str:
    """Return ``mpich`` for MPI.mpich.cpython-311.so; nothing for MPI.cpython-311.so."""
    name = file.split(".")[1]
    return "" if name.startswith(("cpython", "abi3", "pypy", "so")) else name
