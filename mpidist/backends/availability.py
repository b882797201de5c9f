"""What can work here, found out without starting it.

Of a GPU there are two questions, each with its answer in words: why no array can lie on one, and
why NCCL cannot carry it. Whoever refuses something says them; None means that it works.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

from mpidist import env

__all__ = ["is_mpi_available", "is_nccl_available", "why_no_gpu", "why_no_nccl"]

_SECONDS = 60.0
"""Until another process that tries something is given up; most of it is a slow disk's."""

_EXTRA = "pip install 'mpidist[cuda12]', or 'mpidist[cuda13]' where the driver is one for CUDA 13"

# The answer is the last line: libraries may print as they are imported.
_TRY_CUPY = (
    "import sys, cupy; sys.path.append(sys.argv[1]); "
    "from mpidist.backends.availability import why_no_nccl; "
    "sys.stdout.write('\\n' + (why_no_nccl() or ''))"
)


@cache
def is_mpi_available() -> bool:
    """Whether `init` with the MPI backend can work here.

    Never raises, and does not initialise MPI: another process tries to load the library, unless
    this one has done so. Takes about 0.2 s the first time.
    """
    if "mpi4py.MPI" in sys.modules:
        return True
    if not _is_installed("mpi4py"):
        return False
    _, problem = _output_of("import mpi4py; mpi4py.rc.initialize = False; import mpi4py.MPI")
    return not problem


def is_nccl_available() -> bool:
    """Whether NCCL can carry device arrays here.

    Never raises, and starts nothing: no context on a GPU, no communicator. Without CuPy, or without
    a GPU's driver, it costs a look at the file system. Else CuPy is asked if this process has
    imported it; if not, another process imports it, which takes seconds the first time.

    Returns
    -------
    bool
        True if CuPy finds a GPU and loads NCCL. ``python -m mpidist info`` says why not.

    Notes
    -----
    Local: it says nothing of other ranks, nor of whether several of them share one GPU.
    """
    return why_no_nccl() is None


def why_no_gpu() -> str | None:
    """Say why no array can lie on a GPU here.

    Returns
    -------
    str or None
        A reason with its cure; None if there are GPUs as far as can be seen.

    Notes
    -----
    Never raises. CuPy is asked if this process has imported it. If not, it stays so, and None means
    that CuPy is installed, that there is a driver (``/dev/nvidia0``, or ``/dev/dxg`` in WSL), and
    that ``CUDA_VISIBLE_DEVICES`` does not hide all GPUs. That takes well below a millisecond.
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        return _cupy_finds_no_gpu(cupy)
    if not _is_installed("cupy"):
        return f"CuPy is not installed: {_EXTRA}"
    visible = env.visible_devices()
    if visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs: ask the job's launcher for one"
    if not _has_driver():
        return (
            "there is no NVIDIA driver: neither /dev/nvidia0 nor /dev/dxg. Start a container with "
            "its GPUs (docker run --gpus all, apptainer --nv); under Slurm, ask for them "
            "(--gpus-per-node=4)"
        )
    return None


def why_no_nccl() -> str | None:
    """Say why NCCL cannot carry device arrays here.

    Returns
    -------
    str or None
        A reason with its cure; None if it can. See `is_nccl_available` for what it costs.
    """
    reason = why_no_gpu()
    if reason is not None:
        return reason
    cupy = sys.modules.get("cupy")
    return _another_process_says() if cupy is None else _cupy_has_no_nccl(cupy)


def _cupy_finds_no_gpu(cupy: ModuleType) -> str | None:
    try:
        if cupy.cuda.is_available():
            return None
    except Exception as error:  # noqa: BLE001  # of a library that does not fit, whatever it raises
        return f"CuPy cannot be asked for GPUs: {_describe(error)}"
    return (
        f"{_name(cupy)} finds no GPU: see whether nvidia-smi shows one, whether the driver "
        "is new enough for this CuPy, and what CUDA_VISIBLE_DEVICES says"
    )


def _cupy_has_no_nccl(cupy: ModuleType) -> str | None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's, of which the reason below says more
        try:
            from cupy.cuda import nccl

            if nccl.available:
                nccl.get_version()
                return None
        except Exception as error:  # noqa: BLE001  # as above
            return f"NCCL cannot be asked for its version: {_describe(error)}"
    return f"{_name(cupy)} finds no NCCL (libnccl.so.2): {_EXTRA}"


@cache
def _another_process_says() -> str | None:
    # mpidist may be a checkout that only this process's path has.
    from pathlib import Path

    output, problem = _output_of(_TRY_CUPY, str(Path(__file__).parents[2]))
    return f"CuPy cannot be imported: {problem}" if problem else output.rpartition("\n")[2] or None


def _output_of(attempt: str, *arguments: str) -> tuple[str, str]:
    """Return what another process writes, and the last line of its errors if it fails."""
    import subprocess

    try:
        tried = subprocess.run(  # noqa: S603  # this interpreter, and a text of ours
            [sys.executable, "-c", attempt, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", _describe(error)
    if tried.returncode == 0:
        return tried.stdout, ""
    lines = tried.stderr.strip().splitlines()
    return "", lines[-1] if lines else f"exit code {tried.returncode}"


def _is_installed(package: str) -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # somebody has put None in its place
        return False


def _has_driver() -> bool:
    from pathlib import Path

    try:
        names = [file.name for file in Path("/dev").iterdir()]
    except OSError:
        return False
    return any(name == "dxg" or (name[:6] == "nvidia" and name[6:].isdigit()) for name in names)


def _name(cupy: ModuleType) -> str:
    return f"CuPy {getattr(cupy, '__version__', 'of unknown version')}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
