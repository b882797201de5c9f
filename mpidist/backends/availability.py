"""What can work here, found out without starting it."""

from __future__ import annotations

import sys
from functools import cache

__all__ = ["is_mpi_available"]


@cache
def is_mpi_available() -> bool:
    """Whether `init` with the MPI backend can work here.

    Never raises, and does not initialise MPI: another process tries to load the library, unless
    this one has done so. Takes about 0.2 s the first time.
    """
    if "mpi4py.MPI" in sys.modules:
        return True
    import importlib.util
    import subprocess

    if importlib.util.find_spec("mpi4py") is None:
        return False

    attempt = "import mpi4py; mpi4py.rc.initialize = False; import mpi4py.MPI"
    try:
        tried = subprocess.run(  # noqa: S603  # this interpreter, and a text of ours
            [sys.executable, "-c", attempt], capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0
