"""The words that every layer shares: what an array is, and how values are combined."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "BAND",
    "BOR",
    "BXOR",
    "LAND",
    "LOR",
    "LXOR",
    "MAX",
    "MEAN",
    "MIN",
    "PROD",
    "SUM",
    "Array",
    "DType",
    "ReduceOp",
]

Array: TypeAlias = "npt.NDArray[Any]"
"""A numpy array; cupy arrays have the same interface and are accepted where the text says so."""

DType: TypeAlias = np.dtype[Any]
"""An element type, bfloat16 of ml_dtypes included."""


class ReduceOp(Enum):
    """How the elements of the ranks are combined, one result per element.

    Notes
    -----
    `MEAN` is the sum divided by the number of ranks, for floats and complex numbers. `SUM` of
    booleans is their logical or, as in numpy. `MIN` and `MAX` return NaN where any rank has NaN.
    The bitwise ones (`BAND`, `BOR`, `BXOR`) take integers and booleans; the logical ones (`LAND`,
    `LOR`, `LXOR`) too, and give 0 or 1 in the dtype of their input.
    """

    SUM = "sum"
    MEAN = "mean"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    BAND = "bitwise and"
    BOR = "bitwise or"
    BXOR = "bitwise xor"
    LAND = "logical and"
    LOR = "logical or"
    LXOR = "logical xor"

    # Members are compared and hashed by identity: both happen on every collective call.
    __hash__ = object.__hash__


SUM = ReduceOp.SUM
MEAN = ReduceOp.MEAN
PROD = ReduceOp.PROD
MIN = ReduceOp.MIN
MAX = ReduceOp.MAX
BAND = ReduceOp.BAND
BOR = ReduceOp.BOR
BXOR = ReduceOp.BXOR
LAND = ReduceOp.LAND
LOR = ReduceOp.LOR
LXOR = ReduceOp.LXOR
