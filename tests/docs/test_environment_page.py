"""The page of environment variables names all that mpidist/env.py reads, and no other of ours."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mpidist import env
from tests.docs.pages import DOCS

PAGE = (DOCS / "environment.rst").read_text(encoding="utf-8")
SOURCE = Path(env.__file__).read_text(encoding="utf-8")


def read() -> set[str]:
    """Return the names, and beginnings of names, of variables in the code of env.py."""
    texts = {
        node.value
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {
        text for text in texts if re.fullmatch(r"[A-Z][A-Z0-9]*(_\w*)?", text) and text != "PMI"
    }


def test_the_page_names_every_variable_that_is_read() -> None:
    assert len(read()) > 40
    assert sorted(name for name in read() if f"``{name}``" not in PAGE) == []


def test_every_variable_of_ours_on_the_page_is_read() -> None:
    assert set(re.findall(r"MPIDIST_\w+", PAGE)) <= read()


def test_a_default_is_given_for_each_setting() -> None:
    table = PAGE.partition("Settings of mpidist\n")[2].partition("Read as well\n")[0]
    rows = re.findall(r"   \* - ``(MPIDIST_\w+)``\n     - (.+)\n     - (.+)\n", table)
    assert {name for name, _, _ in rows} == set(re.findall(r"MPIDIST_\w+", table))
