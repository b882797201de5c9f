"""Whatever any number of ranks save, any number of ranks load, bit for bit.

More random states, of a new seed each time::

    MPIDIST_TEST_EXAMPLES=200 python -m pytest tests/checkpoint/test_any_number.py
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpidist.testing import run_ranks
from tests.checkpoint.cases import (
    check_files,
    load_case,
    save_case,
    small_sizes,
    some_case,
)

NUMBERS = (1, 2, 3, 4, 6, 8)
FEW = {(1, 3), (2, 1), (2, 3), (3, 2), (4, 4), (8, 3)}
PAIRS = [
    pytest.param(savers, loaders, marks=[] if (savers, loaders) in FEW else pytest.mark.full)
    for savers in NUMBERS
    for loaders in NUMBERS
]
EXAMPLES = int(os.environ.get("MPIDIST_TEST_EXAMPLES", "0"))

as_asked = settings(
    max_examples=EXAMPLES or 3,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def some_sizes(random: Random):
    """The package's own, or so small that small arrays are cut like large ones."""
    if random.random() < 0.3:
        return small_sizes(1 << 18, 1 << 12, 1 << 20)
    return small_sizes(random.choice([16, 64, 256]), random.choice([1, 4, 8]), 32)


@pytest.mark.one_python
@pytest.mark.timeout(0 if EXAMPLES else 60)
@pytest.mark.parametrize(("savers", "loaders"), PAIRS)
def test_what_is_loaded_is_what_was_saved(savers, loaders):
    @as_asked
    @given(st.randoms(use_true_random=False))
    def check(random):
        case = some_case(random, savers, loaders)
        nodes = [random.choice([None, 1, 2, 3]) for _ in range(2)]
        sizes = some_sizes(random)
        with tempfile.TemporaryDirectory() as name, sizes:
            path = Path(name)
            run_ranks(savers, partial(save_case, case=case, path=path), ranks_per_node=nodes[0])
            run_ranks(loaders, partial(load_case, case=case, path=path), ranks_per_node=nodes[1])
            check_files(case, path)

    check()
