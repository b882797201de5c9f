"""The page on GPUs: the errors that it explains are those of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mpidist
from mpidist import env
from tests.docs.pages import DOCS

PAGE = (DOCS / "gpu.rst").read_text(encoding="utf-8")


def texts() -> Iterator[str]:
    """Yield the texts in the package's code, those with values inside in pieces."""
    for path in Path(mpidist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_error_that_is_explained_is_raised_somewhere() -> None:
    table = PAGE.partition("Errors and cures\n")[2]
    told = re.findall(r'^   \* - "(.+)"$', table, re.MULTILINE)
    assert len(told) > 10
    found = list(texts())
    assert [words for words in told if not any(words in text for text in found)] == []


def test_every_variable_of_ours_is_one_that_is_read() -> None:
    read = Path(env.__file__).read_text(encoding="utf-8")
    ours = set(re.findall(r"MPIDIST_\w+", PAGE))
    assert ours
    assert {name for name in ours if name not in read} == set()


def test_nothing_is_claimed_of_gpus_that_no_gpu_has_run() -> None:
    """Each row of what has been run has a date, or says that it has not."""
    table = PAGE.partition("What has been run\n")[2].partition("Install\n")[0]
    rows = re.findall(r"^   \* - (.+)\n     - (.+)\n", table, re.MULTILINE)[1:]
    assert len(rows) > 5
    for what, date in rows:
        over_the_stand_in = date == "every test run" and "stand-in" in what
        dated = re.fullmatch(r"20\d\d-\d\d-\d\d", date)
        assert over_the_stand_in or dated or date == "not yet run on a GPU", what
