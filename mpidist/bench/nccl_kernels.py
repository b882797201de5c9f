"""Work on whole buckets, beside a copy on the device that moves as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import device_module
from mpidist.bench.nccl_device import DeviceClock, in_a_row
from mpidist.bench.report import Row
from mpidist.bench.times import Effort, Series, measure
from mpidist.group import ProcessGroup
from mpidist.optim.fused import apply_rule
from mpidist.optim.rules import AdamRule, SGDRule, UpdateRule
from mpidist.parallel import gradient_kernels

__all__ = ["COPY", "KERNEL", "kernel_rows"]

KERNEL, COPY = "kernel", "copy"

_DTYPE = np.dtype(np.float32)

_PARTS = 64
"""Arrays that are packed."""

_Work = tuple[str, int, Callable[[], Any]]
"""What it is, the bytes that it has to read and write, and the call."""


def kernel_rows(
    world: ProcessGroup,
    nbytes: int,
    *,
    number: int,
    effort: Effort,
    tell: Callable[[str, int], None],
) -> list[Row]:
    """Measure each kernel on arrays of `nbytes`, in turn with the copy; collective, blocks.

    So many calls are made in a row that the device does not wait for the host between them.
    Sizes of the rows are the bytes that have to be read and written; bandwidths are these over the
    time. `tell` is told each kernel's name and bytes when it has been measured.
    """
    clock, rows = DeviceClock(), list[Row]()
    for what, moved, call in _works(nbytes // _DTYPE.itemsize):
        series = [Series(KERNEL, call, clock=clock), Series(COPY, _copy(moved), clock=clock)]
        times = measure([in_a_row(each, number) for each in series], world, effort=effort)
        rows += [
            Row(operation=what, series=name, nbytes=moved, times=each, bus_factor=1.0)
            for name, each in times.items()
        ]
        tell(what, moved)
    return rows


def _works(count: int) -> Iterator[_Work]:
    """Make each work when the one before has been measured, so that its memory is free again."""
    yield _update("AdamW step", AdamRule(decay=0.01), count)
    yield _update("SGD step with momentum", SGDRule(momentum=0.9), count)
    yield _update("SGD step", SGDRule(), count)
    x = _zeros(count)
    half = _zeros(count, np.float16)
    both = x.nbytes + half.nbytes
    yield "cast to float16", both, partial(gradient_kernels.cast, x, half)
    yield "cast from float16", both, partial(gradient_kernels.cast, half, x)
    yield "scale", 2 * x.nbytes, partial(gradient_kernels.scaled, x, 0.5)
    yield (
        "finite check and unscale",
        2 * x.nbytes,
        partial(gradient_kernels.all_finite_divided, [x], 0.5),
    )
    yield "sum of squares", x.nbytes, partial(gradient_kernels.sum_of_squares, [x])
    yield _packing(count)


def _update(what: str, rule: UpdateRule, count: int) -> _Work:
    """Return an update: the gradient is read, values and state are read and written."""
    w, g = _zeros(count), _zeros(count)
    state = {slot: _zeros(count) for slot in rule.slots}
    call = partial(apply_rule, rule, w, g, state, lr=1e-3, t=1)
    return what, (1 + 2 * (1 + len(state))) * w.nbytes, call


def _packing(count: int) -> _Work:
    shapes = {str(i): (count // _PARTS,) for i in range(_PARTS)}
    flat = FlatBuffer(shapes, _DTYPE, storage=_zeros(FlatBuffer.length_of(shapes)))
    arrays = flat.zeros_like().views
    return f"packing {_PARTS} arrays", 2 * flat.data.nbytes, partial(flat.pack, arrays)


def _copy(moved: int) -> Callable[[], Any]:
    x, out = _zeros(moved // 2, np.uint8), _zeros(moved // 2, np.uint8)
    return partial(device_module().copyto, out, x)


def _zeros(count: int, dtype: Any = _DTYPE) -> Array:
    zeros: Array = device_module().zeros(count, dtype)
    return zeros
