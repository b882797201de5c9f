"""The front doors open, and all ranks end with the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.testing import run_ranks
from tests.parallel.checks import example

EXAMPLES = {"01_gradient_reducer.py": 0.01, "02_ddp.py": 0.05}
"""The largest loss at the end; that of a guess is 0.11 and 0.69."""


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("size", [1, 2])
def test_an_example_learns_and_keeps_the_ranks_equal(name, size, capsys):
    ranks = run_ranks(size, example(name))
    loss, weights = ranks[0]
    assert loss < EXAMPLES[name]
    for other_loss, others in ranks:
        assert other_loss == loss
        for array, other in zip(weights.values(), others.values(), strict=True):
            np.testing.assert_array_equal(array, other)
    assert capsys.readouterr().out.count("\n") == 1
