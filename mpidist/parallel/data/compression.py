"""How a bucket travels: as it is, in a half type, or through a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from mpidist._types import Array, DType, ReduceOp
from mpidist.arrays.namespaces import BFLOAT16, array_namespace, is_device
from mpidist.backends.work import Work
from mpidist.collectives import iall_reduce
from mpidist.collectives._reductions import plan_all_reduce
from mpidist.group import ProcessGroup
from mpidist.parallel.data.buckets import Bucket, Exchange
from mpidist.parallel.gradient_kernels import cast

__all__ = ["Compression", "Hook", "exchange_for", "plain"]

Hook: TypeAlias = Callable[[Array, ProcessGroup, ReduceOp], "Work[Any]"]
"""A function ``hook(bucket, group, op)`` that starts the reduction of a flat array in place.

It is called once per bucket and step, with the same buckets in the same order on all ranks, and
returns at once. When its `Work` has been waited for, `bucket` must hold the reduction over `group`
by `op` (MEAN or SUM), or a substitute for it, with the same bits on all ranks. `plain` is the
simplest one. A hook that keeps something between steps keeps it per bucket, by length or address:
with a hook, `DDP` never changes its first layout.
"""


class Compression(Enum):
    """Dtype in which gradients travel.

    Notes
    -----
    Gradients of a wider float type are rounded once before they are sent and, since halves are
    summed in float32, once more when they are received. Others travel as they are. Half the bytes
    of float32. `FP16` has 11 bits of precision and overflows above 65504 (use a `GradScaler`,
    which sees the infinities); `BF16` has 8 bits and the range of float32.
    """

    FP16 = "float16"
    BF16 = "bfloat16"

    def wire_dtype(self, dtype: DType) -> DType:
        """Return the dtype in which gradients of `dtype` travel."""
        half = BFLOAT16 if self is Compression.BF16 else np.dtype(np.float16)
        return half if dtype.kind == "f" and dtype.itemsize > half.itemsize else dtype


def plain(bucket: Array, group: ProcessGroup, op: ReduceOp) -> Work[Any]:
    """Start the all-reduce of a bucket as it is.

    Parameters
    ----------
    bucket : Array, shape (n,), float or complex
        This rank's gradients; overwritten with their reduction.
    group : ProcessGroup
        The ranks taking part.
    op : ReduceOp
        `MEAN` or `SUM` of the ranks' gradients.

    Returns
    -------
    Work
        The all-reduce under way.

    Notes
    -----
    Collective over `group`; does not block.
    """
    return iall_reduce(bucket, group, op=op, out=bucket)


def exchange_for(
    compression: Compression | Hook | None, bucket: Bucket, group: ProcessGroup, op: ReduceOp
) -> Exchange:
    """Return what reduces a full bucket, with the memory that it needs already allocated."""
    if callable(compression):
        return partial(compression, bucket.data, group, op)
    if compression is not None:
        dtype = compression.wire_dtype(bucket.data.dtype)
        if dtype != bucket.data.dtype:
            return _NarrowedAllReduce(bucket, dtype, group, op)
    if is_device(bucket.data):
        return partial(iall_reduce, bucket.data, group, op=op, out=bucket.data)
    # What is the same in every step is checked and prepared once.
    call, finish = plan_all_reduce(bucket.data, group, op, bucket.data)
    return partial(group.operations.start, call, finish)


class _NarrowedAllReduce:
    """Reduces a bucket by way of a copy in a narrower dtype, which it keeps."""

    def __init__(self, bucket: Bucket, dtype: DType, group: ProcessGroup, op: ReduceOp) -> None:
        self._data = bucket.data
        self._narrow: Array = array_namespace(self._data).empty(self._data.shape, dtype)
        self._group = group
        self._op = op

    def __call__(self) -> Work[None]:
        narrow = self._narrow
        cast(self._data, narrow)
        work = iall_reduce(narrow, self._group, op=self._op, out=narrow)
        return _WideningWork(work, narrow, self._data)


class _WideningWork(Work[None]):
    """Copies the result back into the wider bucket once it is complete."""

    def __init__(self, work: Work[Any], narrow: Array, data: Array) -> None:
        self._work = work
        self._narrow = narrow
        self._data: Array | None = data

    def done(self) -> bool:
        return self._work.done()

    def wait(self, timeout: float | None = None) -> None:
        self._work.wait(timeout)
        if self._data is not None:
            cast(self._narrow, self._data)
            self._data = None  # a second wait must not overwrite what the caller made of it
