"""What mpidist knows about arrays: their module, their dtypes, and their bytes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from mpidist._types import (
    BAND,
    BOR,
    BXOR,
    LAND,
    LOR,
    LXOR,
    MAX,
    MEAN,
    MIN,
    PROD,
    SUM,
    Array,
    DType,
    ReduceOp,
)
from mpidist.errors import UnsupportedOperationError

if TYPE_CHECKING:
    import numpy.typing as npt

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)
HALVES: frozenset[DType] = frozenset({np.dtype(np.float16), BFLOAT16})
"""Dtypes that travel as they are and are summed in float32."""

_BOOL: frozenset[DType] = frozenset({np.dtype(np.bool_)})
_INTEGERS: frozenset[DType] = frozenset(
    np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)
)
FLOATS: frozenset[DType] = HALVES | {np.dtype(np.float32), np.dtype(np.float64)}
"""Real dtypes of parameters and gradients."""

_COMPLEX: frozenset[DType] = frozenset({np.dtype(np.complex64), np.dtype(np.complex128)})

DTYPES: frozenset[DType] = _BOOL | _INTEGERS | FLOATS | _COMPLEX
"""Every dtype that mpidist moves."""

_WHERE_DEFINED: dict[ReduceOp, frozenset[DType]] = {
    SUM: DTYPES,
    MEAN: FLOATS | _COMPLEX,
    PROD: DTYPES,
    MIN: DTYPES - _COMPLEX,
    MAX: DTYPES - _COMPLEX,
    **dict.fromkeys((BAND, BOR, BXOR, LAND, LOR, LXOR), _INTEGERS | _BOOL),
}

REDUCTIONS = frozenset((op, dtype) for op, dtypes in _WHERE_DEFINED.items() for dtype in dtypes)
"""Every pair of operation and dtype that has a meaning."""

# Of booleans numpy's add is the logical or, and multiply the logical and.
_UFUNCS = {
    SUM: np.add,
    MEAN: np.add,
    PROD: np.multiply,
    MIN: np.minimum,
    MAX: np.maximum,
    BAND: np.bitwise_and,
    BOR: np.bitwise_or,
    BXOR: np.bitwise_xor,
    LAND: np.logical_and,
    LOR: np.logical_or,
    LXOR: np.logical_xor,
}


def array_namespace(x: Array) -> ModuleType:
    """Return the module whose functions work on `x`: numpy or cupy.

    cupy is looked up among the modules that are already imported, never imported: whoever holds a
    cupy array has done so. Raises UnsupportedOperationError if `x` is neither.
    """
    if type(x) is np.ndarray:
        return np
    if is_device(x):
        return sys.modules["cupy"]
    if isinstance(x, np.ndarray):
        return np
    raise UnsupportedOperationError(
        f"expected a numpy or cupy array, got {type(x).__module__}.{type(x).__qualname__}; "
        "convert it with numpy.asarray first"
    )


def address_of(x: Array) -> int:
    """Return where the elements of an array begin, on the host or on its device."""
    if is_host(x):
        return x.ctypes.data
    pointer: int = x.data.ptr  # type: ignore[attr-defined]  # cupy's
    return pointer


def is_array(x: object) -> bool:
    """Whether `x` is an array, on the host or on a device."""
    return isinstance(x, np.ndarray) or is_device(x)


def is_device(x: object) -> bool:
    """Whether `x` is an array in the memory of a device; its module is cupy then."""
    if type(x) is np.ndarray:
        return False
    # Another thread may be importing cupy just now: it has no arrays yet.
    kind = getattr(sys.modules.get("cupy"), "ndarray", None)
    return kind is not None and isinstance(x, kind)


def is_host(x: Array) -> bool:
    """Whether `x` is an array in the host's memory."""
    return isinstance(x, np.ndarray) and (type(x) is np.ndarray or not is_device(x))


def to_host(x: Array, out: Array | None = None) -> Array:
    """Return the elements of an array in the host's memory.

    Parameters
    ----------
    x : Array
        On the host or on a device.
    out : Array, shape and dtype of `x`, optional
        Host memory that receives them.

    Returns
    -------
    Array
        `out`, if given; else `x` itself if it is on the host, and a copy if it is on a device.
    """
    if is_host(x):
        if out is None:
            return x
        np.copyto(out, x)
        return out
    copied: Array = x.get(out=out)  # type: ignore[attr-defined]  # cupy's
    return copied


def to_device(x: Array) -> Array:
    """Return `x` if it is on a device, else a copy of it on this thread's current device.

    Raises UnsupportedOperationError if cupy cannot be imported.
    """
    if is_device(x):
        return x
    copied: Array = device_module().asarray(x)
    return copied


def like_device(array: Array, values: Any) -> Any:
    """Return values in the kind of memory that an array lies in, so that they can be copied in.

    `values` themselves if they are there already; else a copy, for which a device that has them
    makes the host wait.
    """
    if is_device(array):
        return values if is_device(values) else array_namespace(array).asarray(values)
    return to_host(values) if is_device(values) else values


def device_module() -> Any:
    """Return the module cupy, which is imported if it is not yet: a device was asked for.

    Raises UnsupportedOperationError if cupy cannot be imported.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UnsupportedOperationError(
            f"to put arrays on a GPU, cupy is needed, and it cannot be imported ({error}): "
            "pip install 'mpidist[cuda12]' or 'mpidist[cuda13]'"
        ) from error


def device_empty(shape: int | Sequence[int], dtype: npt.DTypeLike) -> Array:
    """Return an array on the current device, not initialised."""
    fresh: Array = device_module().empty(shape, np.dtype(dtype))
    return fresh


def pinned_empty(nbytes: int) -> Array:
    """Return host memory that a device can write directly: shape (nbytes,) uint8.

    Whoever asks holds an array of cupy.
    """
    cupyx = importlib.import_module("cupyx")
    memory: Array = cupyx.empty_pinned(nbytes, np.uint8)
    return memory


def ufunc_of(op: ReduceOp) -> np.ufunc:
    """Return numpy's function of two arrays for `op`; for `MEAN`, the sum."""
    return _UFUNCS[op]


def as_native(x: Array) -> Array:
    """Return `x` itself if it is contiguous, aligned and of native byte order, else such a copy.

    An array on a device is copied on the current stream.
    """
    if is_device(x):
        contiguous: Array = array_namespace(x).ascontiguousarray(x)
        return contiguous
    flags = x.flags
    # mpi4py finds no MPI datatype for arrays that are not aligned.
    if flags.c_contiguous and flags.aligned and x.dtype.isnative:
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="C")


def as_bytes(x: Array) -> Array:
    """Return the memory of a contiguous array as a flat uint8 array that shares it."""
    return x.reshape(-1).view(np.uint8)


def reduce_in_rank_order(parts: list[Array], op: ReduceOp, out: Array) -> None:
    """Combine one array per rank in the order of the ranks, rounding halves once.

    Parameters
    ----------
    parts : list of Array, each the shape and dtype of `out`
        One per rank, where `out` lies: on the host, or on a device.
    op : ReduceOp
        How to combine; `MEAN` divides by the number of parts.
    out : Array
        Receives the result; may be one of the parts only if it is the first.

    Notes
    -----
    float16 and bfloat16 are combined in float32 and rounded once, at the end.
    """
    ufunc, xp = ufunc_of(op), array_namespace(out)
    wide = np.dtype(np.float32) if out.dtype in HALVES else out.dtype
    total: Any = out if wide == out.dtype else xp.empty(out.shape, wide)
    # Infinities and NaN are results here, as in every MPI library; whoever trains in float16
    # looks for them on purpose.
    with np.errstate(all="ignore"):
        so_far: Any = parts[0].astype(wide, copy=False)
        if len(parts) == 1:
            xp.copyto(total, so_far)
        for part in parts[1:]:
            # Logical ufuncs return booleans; `unsafe` stores them as 0 and 1 in `out`'s dtype.
            ufunc(so_far, part.astype(wide, copy=False), out=total, casting="unsafe")
            so_far = total
        if len(parts) == 1 and op in (LAND, LOR, LXOR):
            xp.copyto(total, total != 0)
        if op is MEAN:
            total /= len(parts)
        if total is not out:
            xp.copyto(out, total, casting="unsafe")
