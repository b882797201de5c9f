"""What HDF5 makes of a checkpoint."""

from __future__ import annotations

import h5py
import numpy as np

from mpidist import checkpoint
from mpidist.testing import run_ranks


def test_a_name_may_hold_a_percent_sign(tmp_path):
    """In the name of a view's source, HDF5 takes %b for the number of a block."""
    large = np.arange(1 << 18, dtype=np.float32)
    state = {"50%b": large, "%%": large + 1, "100%": np.arange(3.0)}
    run_ranks(1, lambda group: checkpoint.save(tmp_path, state, group, step=0))
    with h5py.File(tmp_path / "step-000000" / "view.h5") as view:
        for name, array in state.items():
            np.testing.assert_array_equal(view[name][()], array)
