"""Find mpirun, clean the environment for it, and end a job without leaving a process behind."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "MPIDIST_TEST_RANKS_DIR"
"""Every process of a job carries this variable; its value is the job's own directory."""

_LAUNCHER_PREFIXES = ("PMI", "PMIX", "OMPI", "PRTE", "SLURM", "HYDRA", "MPI_LOCAL", "PALS")
_OUTER_PYTEST = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")


def find_mpirun() -> Path | None:
    """Return the mpirun beside this interpreter, else the one on PATH, else None."""
    # Not resolved: inside a virtual environment the interpreter is a link to one elsewhere.
    sibling = Path(sys.executable).parent / "mpirun"
    if os.access(sibling, os.X_OK):
        return sibling
    on_path = shutil.which("mpirun")
    return Path(on_path) if on_path else None


def vendor_arguments(mpirun: Path) -> list[str]:
    """Return the arguments that let this mpirun start more ranks than there are cores."""
    answer = subprocess.run(  # the launcher that was found
        [mpirun, "--version"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if "Open MPI" in answer.stdout or "OpenRTE" in answer.stdout:
        # By default two ranks are bound to one core each, threads and all.
        return ["--oversubscribe", "--bind-to", "none"]
    return []


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what a launcher or pytest left in it.

    Returns
    -------
    dict of str to str
        One BLAS thread per rank; Open MPI is allowed to run as root where the user is root; paths
        change at the package's own crossovers, whatever was measured on this machine; reports
        do not go into the current directory; an mpirun of Open MPI keeps its files where no other
        looks.
    """
    foreign = (*_LAUNCHER_PREFIXES, *_OUTER_PYTEST)
    # Another thread may change the environment meanwhile, as pytest does: no key is sure to stay.
    taken = {name: os.environ.get(name) for name in list(os.environ)}
    environment = {k: v for k, v in taken.items() if v is not None and not k.startswith(foreign)}
    environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    environment["MPIDIST_CROSSOVERS"] = "registered=32768"
    environment["MPIDIST_DUMP"] = tempfile.gettempdir()
    environment["PRTE_MCA_prte_tmpdir_base"] = f"{_sessions().name}/{next(_numbers)}"
    if os.geteuid() == 0:
        environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return environment


_numbers = itertools.count()


@functools.cache
def _sessions() -> tempfile.TemporaryDirectory[str]:
    """Return the directory of the session directories, which goes when this process ends.

    Notes
    -----
    By default they are /tmp/ompi.PID. One that was killed leaves its own there, and a later mpirun
    that gets the same process number ends with "The PMIx server's listener thread failed to start".
    """
    return tempfile.TemporaryDirectory(prefix="mpidist-mpirun-")


def marked_processes(value: str, *, name: str = MARK) -> list[int]:
    """Return the ids of all live processes whose environment holds ``name=value``.

    Notes
    -----
    Process groups and sessions are no substitute: MPICH gives every rank a session of its own,
    Open MPI a process group. Where there is no /proc the list is empty.
    """
    wanted = f"{name}={value}".encode()
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # A zombie has an empty environment, so it does not count as alive.
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                pids.append(int(entry.name))
        except OSError:
            continue
    return sorted(pids)


def end_job(process: subprocess.Popen[bytes], directory: Path) -> None:
    """End mpirun and every process of its job: politely for a second, then at once."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
    deadline = time.monotonic() + 5.0
    while (left := marked_processes(str(directory))) and time.monotonic() < deadline:
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.01)
    _signal_group(process.pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


@contextlib.contextmanager
def default_dispositions() -> Iterator[None]:
    """Let processes that are started meanwhile take Ctrl-C and a closed terminal as usual.

    A shell lets what it runs in the background ignore SIGINT, and nohup SIGHUP. Processes inherit
    that, so that a test which sends one of them would wait in vain. For the main thread only.
    """
    defaults: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ignored = [number for number in defaults if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
