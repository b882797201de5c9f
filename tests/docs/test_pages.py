"""The Python on the pages runs, each page as one program: alone, and on real ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpidist.collectives import broadcast_object
from mpidist.group import ProcessGroup
from tests.docs.pages import DOCS, PAGES, code_of, printed_of

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
    page: Path,
    world: ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(broadcast_object(Path.cwd(), world))  # the ranks of a job have one
    run(page)
    if world.rank == 0:
        said = without_measured(capsys.readouterr().out)
        for block in printed_of(page):
            assert without_measured(block) in said


def without_measured(text: str) -> str:
    """Leave out what the kernel counts, which is another number in every run."""
    return re.sub(r"^(all data \(PSS\)).*$", r"\1", text, flags=re.MULTILINE)


def test_what_pages_print_is_found() -> None:
    assert [p.stem for p in PAGES if printed_of(p)] == ["does_not_fit", "pipelines"]
