"""The state of old.tar.xz: a checkpoint that mpidist 0.1.0 has saved on two ranks, at step 7.

::

    python -m tests.checkpoint.old_state DIRECTORY    # save it, with the mpidist on the path
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import mpidist
from mpidist import checkpoint
from mpidist.arrays.namespaces import BFLOAT16
from mpidist.testing import run_ranks

COLUMNS = (np.arange(64 * 600) % 251).astype(np.float32).reshape(64, 600)
HALF = (np.arange(70) / 8).astype(BFLOAT16)
LARGE = (np.arange(1 << 18) % 7).astype(np.float32).reshape(512, 512)


def state(rank: int) -> dict[str, Any]:
    """Return what a rank of two holds: arrays of all kinds of layout, and values."""
    columns = mpidist.Box((0, 300 * rank), (64, 300))
    rows = mpidist.Box((3 * rank, 0), (3, 2))
    return {
        "model": {"large": LARGE.copy(), "half": HALF.copy(), "flag": np.array(True)},
        "columns": mpidist.ShardedArray(
            COLUMNS.shape, COLUMNS.dtype, {columns: COLUMNS[columns.slices].copy()}
        ),
        "rows": mpidist.ShardedArray(
            (6, 2), np.dtype(np.int64), {rows: np.arange(12).reshape(6, 2)[rows.slices].copy()}
        ),
        "nothing": np.empty((0, 3)),
        "rng": np.random.Generator(np.random.PCG64(3)),
        "epoch": 3,
        "loss": float("inf"),
        "names": ["a", "b"],
    }


def save(path: str) -> None:
    """Save it on two simulated ranks."""
    run_ranks(
        2,
        lambda group: checkpoint.save(
            path, state(group.rank), group, step=7, metadata={"run": "old"}
        ),
    )


if __name__ == "__main__":
    save(sys.argv[1])
