"""Small checkpoints, saved by simulated ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mpidist import ShardedArray, checkpoint
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.checkpoint import Checkpoint
from mpidist.testing import run_ranks

METADATA = {"name": "a run", "rates": [0.1, float("inf")]}
VALUES = {"epoch": 7, "order/seed": [1, 2, None], "best": {"loss": 0.25}}


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    """Of many shapes and dtypes: one of over 1 MiB, small ones, a scalar, an empty one."""
    rng = np.random.default_rng(5)
    return {
        "model/weight": rng.normal(size=(700, 513)).astype(np.float32),
        "model/bias": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "count": np.array(3, np.int64),
        "nothing": np.empty((0, 3)),
        "mask": rng.random((3, 5)) < 0.5,
        "moments": rng.normal(size=(6, 40, 50)),
        "half": rng.normal(size=(4, 4)).astype(np.float16),
    }


def save(
    path: Path,
    state: dict[str, Any],
    *,
    ranks: int = 1,
    step: int = 5,
    metadata: Any = None,
    sharded: tuple[str, ...] = (),
) -> Checkpoint:
    """Save by some ranks that hold everything, but for what they hold a part each of."""

    def part(array: np.ndarray[Any, Any], rank: int) -> ShardedArray:
        start, size = split_evenly(len(array), ranks)[rank]
        box = Box((start, *(0,) * (array.ndim - 1)), (size, *array.shape[1:]))
        return ShardedArray(array.shape, array.dtype, {box: array[box.slices]} if size else {})

    def program(group: Any) -> Checkpoint:
        mine = {k: part(v, group.rank) if k in sharded else v for k, v in state.items()}
        return checkpoint.save(path, mine, group, step=step, metadata=metadata)

    return run_ranks(ranks, program)[0]
