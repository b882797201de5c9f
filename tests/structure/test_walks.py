"""How many files one call passes: a reader has to open as many."""

from __future__ import annotations

import pytest

import mpidist
from tests.structure.recorded import recorded
from tests.structure.walk import CALLS

pytestmark = pytest.mark.any_mpi


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_passes_few_files(world: mpidist.ProcessGroup, name: str) -> None:
    walk = mpidist.broadcast_object(CALLS[name](world), world)
    before = recorded()["files of a walk"][name]
    assert len(walk.files) <= before, walk.files
    assert len(walk.files) == before, "fewer: mpirun -n 2 python -m tests.structure.recorded"
