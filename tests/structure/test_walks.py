"""How many files one call passes, and that the documentation describes these files."""

from __future__ import annotations

import pytest

import mpidist
from tests.structure import pages
from tests.structure.recorded import recorded
from tests.structure.walk import CALLS, Walk

pytestmark = pytest.mark.any_mpi


@pytest.fixture
def walk(world: mpidist.ProcessGroup, name: str) -> Walk:
    """Rank 0's walk, on all ranks."""
    followed: Walk = mpidist.broadcast_object(CALLS[name](world), world)
    return followed


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_passes_few_files(walk: Walk, name: str) -> None:
    before = recorded()["files of a walk"][name]
    assert len(walk.files) <= before, walk.files
    assert len(walk.files) == before, "fewer: mpirun -n 2 python -m tests.structure.recorded"


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", CALLS)
def test_the_map_has_the_files_of_a_walk(walk: Walk, name: str) -> None:
    described = pages.stops(name)
    assert sorted(stop.file for stop in described) == sorted(walk.files)
    called = {(step.file, step.function) for step in walk.steps}
    said = {(stop.file, function) for stop in described for function in stop.functions}
    assert said - called == set()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["ddp.backward"])
def test_the_page_follows_the_gradient(walk: Walk) -> None:
    assert [file for file in pages.files_of_the_gradient_page() if file not in walk.files] == []
    functions = [step.function for step in walk.steps]
    calls = pages.calls_of_the_gradient_page()
    assert len(calls) > 4
    assert [call for call in calls if call not in functions] == []
    assert calls == sorted(calls, key=functions.index)
