"""Builds and loads the stand-in for libnccl.so.2.

The library lies in a cache directory named after the sources and the compiler's flags, so it is
compiled once, and again after each change. Several ranks may build at once: each compiles into a
file of its own, and the last one wins.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SONAME = "libnccl.so.2"
_HERE = Path(__file__).parent
_FLAGS = (
    *("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"),
    *("-fvisibility=hidden", "-ffp-contract=off", f"-Wl,-soname,{SONAME}", "-Wl,-z,defs"),
)


def missing() -> str | None:
    """Why the stand-in cannot be built here, or None: the reason of a skipped test."""
    if not Path("/proc/self/fd").is_dir():
        return "the stand-in for NCCL needs Linux's /proc"
    return (
        None if _compiler() else "no C compiler (set CC, or install gcc) for the stand-in for NCCL"
    )


def build() -> Path:
    """Compile the stand-in unless that has been done, and return the path of its libnccl.so.2.

    Raises
    ------
    RuntimeError
        Without a compiler, or with the compiler's output where it fails.

    """
    if reason := missing():
        raise RuntimeError(reason)
    folder = _cache() / _digest()
    library = folder / SONAME
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(Path(scratch) / SONAME)
            (Path(scratch) / SONAME).replace(library)
    return library


def load() -> ctypes.CDLL:
    """Build the stand-in and load it for the whole process.

    CuPy's extension, if it is imported later, takes it by its SONAME.
    """
    library = ctypes.CDLL(str(build()), ctypes.RTLD_GLOBAL)
    library.nccl_stub_try.argtypes = [ctypes.c_ulonglong]
    library.ncclGetLastError.restype = ctypes.c_char_p
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def _cache() -> Path:
    return Path(tempfile.gettempdir()) / f"mpidist-nccl-stub-{os.getuid()}"


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.c"))


def _digest() -> str:
    digest = hashlib.sha256(" ".join([str(_compiler()), *_FLAGS]).encode())
    for path in [*_sources(), _HERE / "stub.h"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(target: Path) -> None:
    command = [str(_compiler()), *_FLAGS, *map(str, _sources()), "-lm", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(
            f"the stand-in for NCCL does not compile: {' '.join(command)}\n{done.stderr}"
        )
