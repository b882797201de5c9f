"""Every call of NCCL, through CuPy's binding of it; another binding would take this module's place.

Arrays are addresses, counts and dtype codes here, and streams are handles. What the
vendor raises, `vendor_errors`, becomes a `TransportError` in `translate`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from mpidist._types import MAX, MEAN, MIN, PROD, SUM, DType, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, device_module
from mpidist.errors import BackendUnavailableError, TransportError

__all__ = [
    "BYTE",
    "CODES",
    "DEVICE_FAILED",
    "OPS",
    "UNIQUE_ID_NBYTES",
    "abort",
    "can_split",
    "connect",
    "destroy",
    "grouped",
    "new_unique_id",
    "problem_of",
    "split",
    "translate",
    "vendor_errors",
    "version",
]

UNIQUE_ID_NBYTES = 128

BYTE = np.dtype(np.uint8)

CODES: dict[DType, int] = {
    np.dtype(np.int8): 0,
    BYTE: 1,
    np.dtype(np.int32): 2,
    np.dtype(np.uint32): 3,
    np.dtype(np.int64): 4,
    np.dtype(np.uint64): 5,
    np.dtype(np.float16): 6,
    np.dtype(np.float32): 7,
    np.dtype(np.float64): 8,
    BFLOAT16: 9,
}
"""``ncclDataType_t``, which NCCL's interface fixes."""

OPS: dict[ReduceOp, int] = {SUM: 0, PROD: 1, MAX: 2, MIN: 3, MEAN: 4}
"""``ncclRedOp_t``; the last is ``ncclAvg``."""

DEVICE_FAILED = 1
"""The code of errors of CUDA: ``ncclUnhandledCudaError``."""

_SUCCESS, _INTERNAL, _IN_PROGRESS = 0, 3, 7
"""Of ``ncclResult_t``, too."""

_BYTES_SINCE = 14
"""The CuPy whose unique ids are bytes; they were tuples of signed characters."""

_SPLITS_SINCE = 21801
"""The NCCL that has ``ncclCommSplit``: 2.18.1."""


@cache
def _binding() -> ModuleType:
    """Return CuPy's module of NCCL."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns, and says how to install; so do we
            binding = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise BackendUnavailableError(
            f"NCCL needs CuPy, which cannot be imported: {error}"
        ) from None
    if not binding.available:
        raise BackendUnavailableError(
            "CuPy finds no libnccl.so.2: pip install nvidia-nccl-cu12 (nvidia-nccl-cu13 for "
            "cupy-cuda13x), or put the site's NCCL on LD_LIBRARY_PATH"
        )
    return binding


def version() -> int:
    """Return the version of the library that is loaded, such as 22803 for 2.28.3."""
    number: int = _binding().get_version()
    return number


def vendor_errors() -> tuple[type[Exception], ...]:
    """Return what the binding raises."""
    # KeyError: CuPy has no words for ncclInProgress, and for results that are newer than it.
    return (_binding().NcclError, KeyError)


def translate(what: str, error: BaseException) -> TransportError:
    """Return the package's error for one of `vendor_errors`.

    Parameters
    ----------
    what : str
        What was being done.
    error : Exception
        What was raised.
    """
    return TransportError(f"{what}: NCCL says {error}", _status_of(error))


def _status_of(error: BaseException) -> int:
    status = getattr(error, "status", None)
    if status is None and error.args and isinstance(error.args[0], int):
        status = error.args[0]
    return _INTERNAL if status is None else int(status)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except vendor_errors() as error:
        raise translate(what, error) from error


def new_unique_id() -> bytes:
    """Make what the ranks of a new communicator have to have in common."""
    with _translated("ncclGetUniqueId"):
        made = _binding().get_unique_id()
    return made if isinstance(made, bytes) else bytes(number % 256 for number in made)


def connect(size: int, rank: int, unique_id: bytes) -> Any:
    """Make a communicator on the current device; collective over its ranks, blocks."""
    binding = _binding()
    encoded: Any = bytes(unique_id)  # of a subclass, Cython takes none
    if int(device_module().__version__.partition(".")[0]) < _BYTES_SINCE:
        encoded = tuple(np.frombuffer(unique_id, np.int8).tolist())
    with _translated(f"ncclCommInitRank of rank {rank} of {size}"):
        return binding.NcclCommunicator(size, encoded, rank)


def can_split() -> bool:
    """Whether both the library and CuPy have ncclCommSplit."""
    binding = _binding()
    return version() >= _SPLITS_SINCE and hasattr(binding.NcclCommunicator, "commSplit")


def split(communicator: Any, color: int | None, key: int) -> Any:
    """Make a communicator per color; collective over the parent's ranks, blocks."""
    with _translated("ncclCommSplit"):
        return communicator.commSplit(-1 if color is None else color, key)


@contextmanager
def grouped() -> Iterator[None]:
    """Let NCCL begin all operations of the block at its end, as one."""
    binding = _binding()
    binding.groupStart()
    try:
        yield
    finally:
        binding.groupEnd()


def problem_of(communicator: Any) -> TransportError | None:
    """Return what went wrong with a communicator since it was made; None if nothing."""
    try:
        communicator.check_async_error()
    except vendor_errors() as error:
        status = _status_of(error)
        return None if status in (_SUCCESS, _IN_PROGRESS) else translate("asynchronously", error)
    return None


def abort(communicator: Any) -> None:
    """End a communicator's operations, wherever they are; local."""
    communicator.abort()


def destroy(communicator: Any) -> None:
    """Release a communicator whose operations are over; may wait for its other ranks."""
    communicator.destroy()
