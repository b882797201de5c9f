"""Ranks that run different versions of mpidist say so before anything else can go wrong."""

from __future__ import annotations

import pytest

import mpidist
from mpidist.group import ProcessGroup
from mpidist.job import start


@pytest.mark.ranks(2, 3)
def test_different_versions_are_an_error_on_all_ranks(
    world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = world.size - 1
    if world.rank == last:
        monkeypatch.setattr(start, "LAYOUT", 99)
    others = ", ".join(map(str, range(last)))
    words = rf"{mpidist.__version__}, layout \d+ on rank {others}; .*, layout 99 on rank {last}\."
    with pytest.raises(mpidist.LaunchError, match=words):
        mpidist.init("mpi", comm=world.mpi_comm)
    monkeypatch.undo()
    mpidist.init("mpi", comm=world.mpi_comm).close()
