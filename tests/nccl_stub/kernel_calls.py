"""Every kernel of mpidist, called with every dtype that it takes, to see what a GPU would be given.

Nothing is calculated. What `cupy.ElementwiseKernel` and `cupy.RawKernel` have to make is noted,
with what a kernel's code can depend on of its arguments. `places` says where mpidist's sources make
kernels, so that one that is not called here is noticed.
"""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import mpidist
from mpidist.arrays.namespaces import DTYPES, HALVES
from mpidist.nn.layer_kernels import philox_at_least, rows_at, sum_rows_at
from mpidist.optim.fused import apply_rule
from mpidist.optim.rules import AdamRule, SGDRule
from mpidist.parallel.gradient_kernels import (
    all_finite_divided,
    cast,
    scale,
    scaled,
    sum_of_squares,
)
from mpidist.testing.contract import DevicePlace
from tests.nccl_stub import stand_in

__all__ = ["Call", "Operand", "calls", "places"]

MAKERS = {"ElementwiseKernel", "RawKernel", "RawModule", "ReductionKernel", "fuse", "rawkernel"}
"""What CuPy makes kernels with. `calls` sees the first two; a use of another is never called."""

FLOATS = sorted(HALVES | {np.dtype(np.float32), np.dtype(np.float64)}, key=str)
INTEGERS = sorted((dtype for dtype in DTYPES if dtype.kind in "iu"), key=str)


@dataclass(frozen=True)
class Operand:
    """What a kernel's code depends on: an array's dtype and layout; `scalar` is not an array."""

    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    contiguous: bool = True

    @property
    def scalar(self) -> bool:
        return self.dtype is None


@dataclass(frozen=True)
class Call:
    """A call of a kernel: what it was made of, where, and from what operands it was called.

    Attributes
    ----------
    maker : str
        The function of CuPy's that made the kernel.
    place : str
        File and line where it was called.
    made_of : tuple
        Its arguments.
    keywords : tuple
        Its keyword arguments, as pairs.
    operands : tuple of Operand
        What the kernel was called with; none of a raw kernel, whose code does not depend on them.
    """

    maker: str
    place: str
    made_of: tuple[str, ...]
    keywords: tuple[tuple[str, Any], ...]
    operands: tuple[Operand, ...] = ()


def places() -> set[str]:
    """Return file and line of everything in mpidist's sources that may make a kernel."""
    found = set()
    for root in mpidist.__path__:
        for path in Path(root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
                if name in MAKERS:
                    found.add(f"{path}:{node.end_lineno}")
    return found


def calls() -> list[Call]:
    """Call every kernel, and return the calls without repetitions; once per process.

    Notes
    -----
    The kernels of a module are made once. In a process that has called some before, they would
    not be seen.
    """
    seen: dict[Call, None] = {}
    stand_in.install(nccl=False)
    try:
        cupy = importlib.import_module("cupy")
        for maker in ("ElementwiseKernel", "RawKernel"):
            setattr(cupy, maker, _recorder(maker, seen))
        _layers(cupy)
        _rules(cupy)
        _buckets(cupy)
        DevicePlace(cupy).busy(0.01)
    finally:
        stand_in.uninstall()
    return list(seen)


def _recorder(maker: str, seen: dict[Call, None]) -> Any:
    class Recorder:
        def __init__(self, *made_of: str, **keywords: Any) -> None:
            caller = sys._getframe(1)
            self.made_of, self.keywords = made_of, tuple(keywords.items())
            self.place = f"{caller.f_code.co_filename}:{caller.f_lineno}"

        def __call__(self, *args: Any) -> None:
            operands = map(_operand, args) if maker == "ElementwiseKernel" else ()
            seen[Call(maker, self.place, self.made_of, self.keywords, tuple(operands))] = None

    return Recorder


def _operand(x: Any) -> Operand:
    if isinstance(x, np.ndarray):
        return Operand(x.dtype, x.shape, x.flags.c_contiguous)
    return Operand()


def _layers(cupy: ModuleType) -> None:
    pairs = {(dtype, np.dtype(np.int64)) for dtype in FLOATS}
    pairs |= {(np.dtype(np.float32), dtype) for dtype in INTEGERS}
    for dtype, index in sorted(pairs, key=str):
        table, indices = cupy.zeros((3, 2), dtype), cupy.zeros((2, 2), index)
        rows = cupy.zeros((2, 2, 2), dtype)
        rows_at(table, indices)
        sum_rows_at(rows, indices, out=table)
    philox_at_least(np.uint32(1), (1, 2), (3, 4), like=cupy.zeros((2, 3)))


def _rules(cupy: ModuleType) -> None:
    decayed = {"momentum": 0.9, "weight_decay": 0.1}
    for rule in (AdamRule(), SGDRule(), SGDRule(**decayed), SGDRule(**decayed, nesterov=True)):
        for dtype in FLOATS:
            w, g, *slots = (cupy.zeros(4, dtype) for _ in range(2 + len(rule.slots)))
            apply_rule(rule, w, g, dict(zip(rule.slots, slots, strict=True)), lr=0.1, t=1)


def _buckets(cupy: ModuleType) -> None:
    for narrow, wide in permutations(FLOATS, 2):
        cast(cupy.zeros(4, narrow), cupy.zeros(4, wide))
    for dtype in FLOATS:
        x = cupy.zeros((2, 3), dtype)
        scale(x, 0.5)
        scaled(x, 0.5)
        scaled(x.T, 0.5)
        all_finite_divided([x], 0.5)
        sum_of_squares([x])
