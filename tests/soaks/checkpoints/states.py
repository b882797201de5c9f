"""States whose every bit is a function of a seed and a step, to be saved and to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple
from zlib import crc32

import ml_dtypes
import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import Box, boxes_of_range
from mpidist.arrays.shards import ShardedArray

__all__ = ["KINDS", "Contents", "Cut", "differences"]


class Spec(NamedTuple):
    """An array: its dtype, its shape, and whether the ranks hold parts of it."""

    dtype: Any
    shape: tuple[int, ...]
    split: bool = False


class Cut(NamedTuple):
    """How arrays are split: over how many ranks, and what is drawn for the rest."""

    size: int
    seed: int


_SMALL = {
    "none": Spec(np.float64, (0, 3)),
    "scalar": Spec(np.float64, ()),
    "half": Spec(ml_dtypes.bfloat16, (37,)),
    "float16": Spec(np.float16, (5, 7)),
    "complex": Spec(np.complex64, (11,), split=True),
    "flags": Spec(np.bool_, (101,)),
    "bytes": Spec(np.int8, (3, 5, 7), split=True),
}

KINDS: Mapping[str, Mapping[str, Spec]] = {
    "large": {
        "model/weight": Spec(np.float32, (510, 600)),
        "model/bias": Spec(np.float32, (600,)),
        "optimizer/weight": Spec(np.float64, (500, 300), split=True),
        **_SMALL,
    },
    "small": {f"layer{i}/{name}": spec for i in range(6) for name, spec in _SMALL.items()},
    "split": {
        "rows": Spec(np.float32, (700, 401), split=True),
        "deep": Spec(np.int16, (9, 31, 50, 3), split=True),
        "flat": Spec(ml_dtypes.bfloat16, (40_001,), split=True),
    },
    "few": {"weight": Spec(np.float32, (513, 512)), "half": Spec(np.float16, (99,), split=True)},
    "values": {},
}
"""Arrays by name, each mapping another mixture of what lies in files of its own kind."""


@dataclass(frozen=True)
class Contents:
    """What is saved at each step of a run.

    Attributes
    ----------
    kind : str
        Of `KINDS`.
    seed : int
        Of the run: another one has other bits at the same places.
    """

    kind: str
    seed: int

    def whole(self, step: int) -> dict[str, Array]:
        """Return all arrays of a step; random bits, so that NaN and infinity are among them."""
        return {name: self._array(name, spec, step) for name, spec in KINDS[self.kind].items()}

    def values(self, step: int) -> dict[str, Any]:
        """Return all that is no array."""
        rng = np.random.default_rng([self.seed, step + 1])
        return {
            "epoch": step,
            "options": {
                "name": f"run {self.seed}",
                "rate": rng.random(),
                "list": [None, True, step],
            },
        }

    def state(self, step: int, rank: int, cut: Cut) -> dict[str, Any]:
        """Return what a rank has of a step, to be saved."""
        state: dict[str, Any] = dict(self.values(step))
        for name, array in self.whole(step).items():
            split = KINDS[self.kind][name].split
            state[name] = _shard(array, name, rank, cut) if split else array
        return state

    def empty(self, rank: int, cut: Cut) -> dict[str, Any]:
        """Return what a rank loads into: other bits in all arrays."""
        state = self.state(-1, rank, cut)
        for value in state.values():
            pieces = value.pieces.values() if isinstance(value, ShardedArray) else [value]
            for piece in pieces:
                if isinstance(piece, np.ndarray):
                    piece[...] = 0
        return state

    def check(self, step: int, loaded: Mapping[str, Any]) -> None:
        """Raise AssertionError unless all that `load_full` returns is what was saved."""
        _raise(differences(self.whole(step) | self.values(step), loaded), step)

    def check_rank(
        self, step: int, rank: int, cut: Cut, state: Mapping[str, Any], values: Mapping[str, Any]
    ) -> None:
        """Raise AssertionError unless a rank holds what was saved."""
        _raise(differences(self.state(step, rank, cut), {**state, **values}), step)

    def _array(self, name: str, spec: Spec, step: int) -> Array:
        rng = np.random.default_rng([crc32(name.encode()), self.seed, step + 1])
        dtype = np.dtype(spec.dtype)
        if dtype == np.bool_:
            return rng.integers(0, 2, spec.shape).astype(np.bool_)
        bits = rng.bytes(prod(spec.shape) * dtype.itemsize)
        array: Array = np.frombuffer(bits, np.uint8).copy().view(dtype)
        return array.reshape(spec.shape)


def _shard(array: Array, name: str, rank: int, cut: Cut) -> ShardedArray:
    """Return a rank's part: flat ranges or slabs of a dimension, uneven ones, and empty ones."""
    rng = np.random.default_rng([crc32(name.encode()), *cut])
    flat = bool(rng.integers(2))
    dimension = int(rng.integers(array.ndim))
    length = array.size if flat else array.shape[dimension]
    ends = np.sort(rng.integers(0, length + 1, cut.size - 1)).tolist()
    start, stop = [0, *ends][rank], [*ends, length][rank]
    if flat:
        boxes: Sequence[Box] = boxes_of_range(array.shape, start, stop)
    else:
        offsets, sizes = [0] * array.ndim, list(array.shape)
        offsets[dimension], sizes[dimension] = start, stop - start
        boxes = [Box(tuple(offsets), tuple(sizes))] if stop > start else []
    pieces = {box: array[box.slices].copy() for box in boxes}
    return ShardedArray(array.shape, array.dtype, pieces)


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Return the names of what is not the same, bit for bit."""
    names = sorted(expected.keys() | got.keys())
    return [n for n in names if n not in expected or n not in got or not _same(expected[n], got[n])]


def _same(expected: Any, got: Any) -> bool:
    if isinstance(expected, ShardedArray):
        return (
            isinstance(got, ShardedArray)
            and expected.pieces.keys() == got.pieces.keys()
            and all(_same(piece, got.pieces[box]) for box, piece in expected.pieces.items())
        )
    if isinstance(expected, np.ndarray):
        return (
            isinstance(got, np.ndarray)
            and (expected.dtype, expected.shape) == (got.dtype, got.shape)
            and expected.tobytes() == got.tobytes()
        )
    return type(expected) is type(got) and bool(expected == got)


def _raise(names: Sequence[str], step: int) -> None:
    if names:
        raise AssertionError(f"step {step}: these are not what was saved: {', '.join(names)}")
