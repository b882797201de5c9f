"""The Python on the pages runs, each page as one program: alone, and on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup
from tests.docs.pages import DOCS, PAGES, code_of

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(DOCS)) for p in PAGES])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pages write files."""
    monkeypatch.chdir(tmp_path)


def run(page: Path) -> None:
    exec(compile(code_of(page), str(page), "exec"), {"__name__": "__main__"})


def test_the_pages_with_code_are_found() -> None:
    assert {"index", "verbs", "gradient", "models", "sharp_bits", "checkpoints"} <= {
        page.stem for page in PAGES
    }


@each_page
def test_a_page_runs_alone(page: Path) -> None:
    run(page)


@pytest.mark.any_mpi
@pytest.mark.ranks(4)
@each_page
def test_a_page_runs_on_ranks(
    page: Path, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(broadcast_object(Path.cwd(), world))  # the ranks of a job have one
    run(page)
