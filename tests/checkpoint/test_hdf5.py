"""What HDF5 makes of a checkpoint."""

from __future__ import annotations

import json
import math

import h5py
import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.checkpoint.format.manifest import decode
from mpidist.testing import run_ranks


def test_a_name_may_hold_a_percent_sign(tmp_path):
    """In the name of a view's source, HDF5 takes %b for the number of a block."""
    large = np.arange(1 << 18, dtype=np.float32)
    state = {"50%b": large, "%%": large + 1, "100%": np.arange(3.0)}
    run_ranks(1, lambda group: checkpoint.save(tmp_path, state, group, step=0))
    with h5py.File(tmp_path / "step-000000" / "view.h5") as view:
        for name, array in state.items():
            np.testing.assert_array_equal(view[name][()], array)


@pytest.mark.parametrize("length", [5, 200_000], ids=["short", "more than 64 KiB"])
def test_a_view_carries_step_values_and_metadata(tmp_path, length):
    values = {"epoch": 3, "deep/er": [1.5, math.inf], "text": "ü" * length}
    metadata = {"commit": "e5fa173", "long": "x" * length}

    def save(group):
        state = {"w": np.arange(3.0), **values}
        checkpoint.save(tmp_path, state, group, step=2**63 - 1, metadata=metadata)

    run_ranks(2, save)
    checkpoint.reshard(tmp_path, tmp_path / "other", 3)
    for directory, ranks in ((tmp_path, 2), (tmp_path / "other", 3)):
        found = checkpoint.latest(directory)
        with h5py.File(found.directory / "view.h5") as view:
            attributes = dict(view.attrs)
        assert (attributes["step"], attributes["world_size"]) == (2**63 - 1, ranks)
        assert decode(json.loads(attributes["values"])) == found.values == values
        assert decode(json.loads(attributes["metadata"])) == metadata
        assert checkpoint.verify(directory) == []
