"""Each page has one name: its title, which the tables of contents and links show."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import DOCS

PAGES = [
    page
    for page in sorted(DOCS.rglob("*.rst"))
    if not any(part == "generated" or part.startswith("_") for part in page.parts)
]
INDEXES = [str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page.stem == "index"]


@pytest.mark.parametrize("name", INDEXES)
def test_tables_of_contents_give_no_other_titles(name: str) -> None:
    text = (DOCS / f"{name}.rst").read_text(encoding="utf-8")
    entries = re.findall(r"\.\. toctree::\n(?:   :.*\n)*\n((?:   .*\n)+)", text)
    assert entries
    assert [line for block in entries for line in block.splitlines() if "<" in line] == []


def test_every_page_is_in_a_table_of_contents() -> None:
    found = set()
    for name in INDEXES:
        folder = (DOCS / name).parent
        for line in (DOCS / f"{name}.rst").read_text(encoding="utf-8").splitlines():
            if re.fullmatch(r"   [\w/-]+", line):
                found.add(folder / line.strip())
    missing = [p for p in PAGES if p.with_suffix("") not in found and p != DOCS / "index.rst"]
    assert missing == []


def test_titles_differ() -> None:
    named = [page for page in PAGES if page != DOCS / "index.rst"]  # the package, as one module is
    titles = [page.read_text(encoding="utf-8").splitlines()[0] for page in named]
    assert len(set(titles)) == len(titles)
