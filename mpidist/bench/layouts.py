"""The states that checkpoints are measured with: a model, laid out over ranks in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.arrays.shards import ShardedArray

__all__ = ["DIM0", "DIM1", "FLAT", "LAYOUTS", "REPLICATED", "Model", "memory_of"]

REPLICATED, DIM0, DIM1, FLAT = "replicated", "dim 0", "dim 1", "flat ranges"

LAYOUTS = (REPLICATED, DIM0, DIM1, FLAT)
"""Held whole by all ranks; cut along a dimension; a range of the flattened elements each."""

_LARGE, _WIDTH, _SMALL = 8, 4096, 1024


@dataclass(frozen=True, slots=True)
class Model:
    """Eight large matrices of float32, 4,096 columns wide, and two vectors of 1,024 per MiB.

    Attributes
    ----------
    mib : int
        About how large it is, in MiB.
    """

    mib: int

    @property
    def dtype(self) -> DType:
        """Of all arrays."""
        return np.dtype(np.float32)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name."""
        rows = max((self.mib << 20) * 127 // 128 // (4 * _LARGE * _WIDTH), 1)
        large = {f"layers/{i}/weight": (rows, _WIDTH) for i in range(_LARGE)}
        return large | {f"norms/{i}/bias": (_SMALL,) for i in range(2 * self.mib)}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.dtype.itemsize * sum(Box.whole(shape).count for shape in self.shapes.values())

    def whole(self) -> dict[str, Array]:
        """Return fresh arrays, with the same numbers in each process."""
        rng = np.random.default_rng(5)
        return {name: rng.random(shape, np.float32) for name, shape in self.shapes.items()}

    def held(
        self, whole: Mapping[str, Array], layout: str, rank: int, size: int
    ) -> dict[str, Array | ShardedArray]:
        """Return what a rank of so many holds in a layout: copies."""
        return {name: _part(array, layout, rank, size) for name, array in whole.items()}


def _part(array: Array, layout: str, rank: int, size: int) -> Array | ShardedArray:
    if layout == REPLICATED:
        return np.array(array)
    if layout == FLAT:
        start, length = split_evenly(array.size, size)[rank]
        piece = array.reshape(-1)[start : start + length].copy()
        return ShardedArray.of_range(array.shape, start, piece)
    dimension = min(LAYOUTS.index(layout) - 1, array.ndim - 1)
    start, length = split_evenly(array.shape[dimension], size)[rank]
    box = Box.whole(array.shape).along(dimension, start, length)
    return ShardedArray(array.shape, array.dtype, {box: array[box.slices].copy()})


def memory_of(state: Mapping[str, Array | ShardedArray]) -> list[Array]:
    """Return the arrays that a state consists of."""
    pieces = (
        array.pieces.values() if isinstance(array, ShardedArray) else (array,)
        for array in state.values()
    )
    return [piece for some in pieces for piece in some]
