"""The front doors open, and all ranks end with the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from mpidist.parallel import DDP
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


def test_the_ddp_example_gives_every_sample_a_place_of_its_own(monkeypatch):
    forward = DDP.forward
    places: set[tuple[int, int]] = set()

    def recorded(self, x, mode):
        places.update((mode.step, mode.sample_offset + i) for i in range(len(x)))
        return forward(self, x, mode)

    monkeypatch.setattr(DDP, "forward", recorded)
    run_ranks(2, example("02_ddp.py"))
    assert places == {(step, place) for step in range(300) for place in range(2 * 64)}
