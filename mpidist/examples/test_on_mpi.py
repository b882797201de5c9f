"""A test on real ranks: mpirun -n 3 python -m pytest --with-mpi test_on_mpi.py"""

import numpy as np
import pytest

import mpidist


@pytest.mark.mpi
def test_sum():
    with mpidist.init("mpi", timeout=20) as world:
        total = mpidist.all_reduce(np.ones(3), world)
        np.testing.assert_array_equal(total, world.size)
