"""The markers of notes are for people who read the source: no page shows one."""

from __future__ import annotations

import runpy

import pytest

from tests.docs.pages import DOCS

strip = runpy.run_path(str(DOCS / "_ext" / "notes.py"))["strip"]


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[Note: phases] MPI makes no\nprogress.", "MPI makes no\nprogress."),
        ("It is sent, see [Note: phases]. Then", "It is sent. Then"),
        (
            "It is read-only; see [Note: one copy] in\n`mpidist.parallel.sharded.flat_parameters`.",
            "It is read-only.",
        ),
        ("Dies.\n\nSee [Note: commit] in `mpidist.checkpoint.saving.save`.", "Dies."),
        ("Starts buckets ([Note: order of\nbuckets]), in order.", "Starts buckets, in order."),
    ],
)
def test_markers_are_left_out(written: str, shown: str) -> None:
    assert strip(written) == shown


def test_no_page_has_one() -> None:
    pages = [*DOCS.rglob("*.rst"), *DOCS.rglob("*.md")]
    assert [page.name for page in pages if "[Note:" in page.read_text(encoding="utf-8")] == []
