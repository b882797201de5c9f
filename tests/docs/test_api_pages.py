"""Every public name has its place on the API pages, and nothing else has."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.docs.pages import DOCS

PUBLIC = [
    "mpidist",
    "mpidist.backends.base",
    "mpidist.bench",
    "mpidist.checkpoint",
    "mpidist.data",
    "mpidist.info",
    "mpidist.nn",
    "mpidist.optim",
    "mpidist.parallel",
    "mpidist.testing",
    "mpidist.train",
]


def listed() -> set[str]:
    """Return the full names on the API pages: rows of summaries, and data described there."""
    names: set[str] = set()
    for page in (DOCS / "api").glob("*.rst"):
        module, inside = page.stem, ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if found := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
                module = found[1]
            elif found := re.fullmatch(r"\.\. (autosummary|py:data)::\s*(\w*)", line):
                inside = found[1]
                names.update({f"{module}.{found[2]}"} if found[2] else ())
            elif inside and (found := re.fullmatch(r" +(\w+)", line)):
                names.add(f"{module}.{found[1]}")
            elif line and not re.match(r" +(:|\w+$)", line):
                inside = ""
    return names


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_listed(module: str) -> None:
    public = importlib.import_module(module).__all__
    assert sorted(f"{module}.{name}" for name in public if f"{module}.{name}" not in listed()) == []


def test_every_listed_name_exists() -> None:
    for full in listed():
        module, _, name = full.rpartition(".")
        assert hasattr(importlib.import_module(module), name), full


def test_every_public_package_is_known() -> None:
    """A new package under mpidist either gets a page, or is named here as not public."""
    internal = {
        "arrays",
        "backends",
        "collectives",
        "group",
        "job",
        "mesh",
        "observe",
        "point_to_point",
        "tracing",
    }
    packages = {p.parent.name for p in (DOCS.parent / "mpidist").glob("*/__init__.py")} - internal
    assert {f"mpidist.{package}" for package in packages} <= set(PUBLIC)
