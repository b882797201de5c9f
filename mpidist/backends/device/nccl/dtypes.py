"""How dtypes and operations that NCCL lacks are put in terms of those that it has.

Booleans are bytes: their sum is the largest of them, their product the smallest. Complex numbers
are pairs of floats, which can be added. What is only moved goes as bytes.

[Note: NaN wins] NCCL's minimum and maximum of floats drop NaN. Where NaN has to win, as in numpy,
floats travel as integers in the same order: the bits of a float, as a signed integer, are in the
order of the floats if the lower bits of negative ones are inverted, and every NaN is put beyond the
end that wins. The way back is the same inversion, which makes a NaN of either end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mpidist._types import MAX, MEAN, MIN, PROD, SUM, Array, DType, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, DTYPES, array_namespace

_BYTE = np.dtype(np.uint8)

CODES: dict[DType, int] = {
    np.dtype(np.int8): 0,
    _BYTE: 1,
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

_OF_BOOLEANS = {SUM: MAX, PROD: MIN, MIN: MIN, MAX: MAX}

_PARTS: dict[DType, DType] = {
    np.dtype(np.complex64): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.float64),
}


@dataclass(frozen=True, slots=True)
class Wire:
    """How NCCL sees the elements of an array.

    Attributes
    ----------
    code : int
        NCCL's code of the dtype that it sees.
    items : int
        Items of that dtype per element.
    boolean : bool
        Whether the elements are truth values.
    """

    code: int
    items: int = 1
    boolean: bool = False

    def op(self, op: ReduceOp) -> int:
        """Return NCCL's code of an operation on the elements."""
        return OPS[_OF_BOOLEANS[op] if self.boolean else op]


@cache
def wire_of(dtype: DType) -> Wire:
    """Return how a dtype is reduced."""
    if dtype.kind == "b":
        return Wire(CODES[_BYTE], boolean=True)
    if dtype in _PARTS:
        return Wire(CODES[_PARTS[dtype]], items=2)
    return Wire(CODES[dtype])


@cache
def wire_of_bytes(dtype: DType) -> Wire:
    """Return how a dtype is moved."""
    return Wire(CODES[_BYTE], items=dtype.itemsize)


def _reductions() -> frozenset[tuple[ReduceOp, DType]]:
    offered = {(op, dtype) for dtype in CODES for op in (SUM, PROD, MIN, MAX)}
    offered |= {(MEAN, dtype) for dtype in CODES if dtype.kind == "f" or dtype == BFLOAT16}
    offered |= {(op, np.dtype(np.bool_)) for op in _OF_BOOLEANS}
    offered |= {(op, dtype) for dtype in _PARTS for op in (SUM, MEAN)}
    return frozenset((op, dtype) for op, dtype in offered if dtype in DTYPES)


REDUCTIONS = _reductions()
"""What the NCCL backend offers: no bitwise and logical operations, no integers of 16 bits."""

_INFINITY: dict[DType, int] = {
    dtype: int(np.array(np.inf, dtype).view(f"i{dtype.itemsize}"))
    for dtype in (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))
}


def needs_keys(dtype: DType, op: ReduceOp) -> bool:
    """Whether a reduction has to be of integers instead; see [Note: NaN wins]."""
    return op in (MIN, MAX) and dtype in _INFINITY


def to_keys(x: Array, op: ReduceOp) -> Array:
    """Return integers in the order of the floats of `x`, NaN beyond the end that wins.

    Returns
    -------
    Array, shape of `x`, int32 or int64
        Fresh, on the current stream.
    """
    xp = array_namespace(x)
    bits = x.view(f"i{x.dtype.itemsize}")
    lowest, highest = np.iinfo(bits.dtype).min, np.iinfo(bits.dtype).max
    keys = bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & highest)
    nan = (bits & highest) > _INFINITY[x.dtype]
    keys = xp.where(nan, bits.dtype.type(highest if op is MAX else lowest), keys)
    wide: Array = keys.astype(np.int64 if bits.dtype.itemsize == 8 else np.int32)
    return wide


def from_keys(keys: Array, out: Array) -> None:
    """Write the floats of some keys into `out`, on the current stream."""
    bits = out.view(f"i{out.dtype.itemsize}")
    narrow = keys.astype(bits.dtype)
    shift = 8 * bits.dtype.itemsize - 1
    bits[...] = narrow ^ ((narrow >> shift) & np.iinfo(bits.dtype).max)
