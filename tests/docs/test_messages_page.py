"""The page of messages has those of mpidist as they are, and each has a cure."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.deaths.job import ROOT
from tests.docs.pages import DOCS

ENTRIES = re.findall(
    r"^(``\S.*)\n    \*(.+?)\*((?:.+\n)+)", (DOCS / "messages.rst").read_text(), re.MULTILINE
)
"""The messages of each entry, whose they are, and the cure."""

OURS = [
    message
    for messages, whose, _ in ENTRIES
    if whose.startswith("mpidist")
    for message in re.findall("``(.*?)``", messages)
]


def test_the_entries_are_found() -> None:
    speakers = " ".join(whose for _, whose, _ in ENTRIES)
    assert all(name in speakers for name in ("MPICH", "Open MPI", "Slurm", "mpi4py", "mpidist"))
    assert len(ENTRIES) > 30
    assert [entry for entry in ENTRIES if len(entry[2].split()) < 5] == []


@cache
def source() -> str:
    """Return the package's files, with texts that stand in several lines in one."""
    files = (ROOT / "mpidist").rglob("*.py")
    return "\n".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in files)


@pytest.mark.parametrize("message", OURS)
def test_a_message_of_ours_is_what_the_package_says(message: str) -> None:
    """With numbers in the places of what is filled in."""
    assert re.search(re.sub(r"\d+", r"\\{[^}]*\\}", re.escape(message)), source())
