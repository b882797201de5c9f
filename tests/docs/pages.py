"""What the tests know about the documentation: its pages, and the code on them."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
EXAMPLES_DIRECTORY = ROOT / "mpidist" / "examples"
EXAMPLES = sorted(EXAMPLES_DIRECTORY.glob("[0-9]*.py"))

_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. code-block:: python\n(?P<options>(?:(?P=indent)   :.*\n)*)\n"
    r"(?P<code>(?:(?:(?P=indent)   .*)?\n)+)",
    re.MULTILINE,
)
_NOT_RUN = re.compile(r":class: (fails|elsewhere)")
"""Code that raises, and code of other packages, which the tests may lack."""


def code_of(page: Path) -> str:
    """Return the Python of a page as one program, without the blocks that are not to be run."""
    text = page.read_text(encoding="utf-8")
    blocks = [b for b in _BLOCK.finditer(text) if not _NOT_RUN.search(b["options"])]
    return "\n".join(dedent(block["code"]) for block in blocks)


_PRINTED = re.compile(
    r"^\.\. code-block:: text\n   :class: printed\n\n((?:(?:   .*)?\n)+)", re.MULTILINE
)


def printed_of(page: Path) -> list[str]:
    """Return the blocks of text that the page's program prints on four ranks."""
    text = page.read_text(encoding="utf-8")
    return [dedent(block).strip("\n") for block in _PRINTED.findall(text)]


PAGES = [page for page in sorted(DOCS.rglob("*.rst")) if code_of(page)]


def readme_part(name: str) -> str:
    """Return what stands in the README's fenced block between the comments of this name."""
    text = README.read_text(encoding="utf-8")
    found = re.search(
        rf"<!-- begin {name} -->\n```\w+\n(.*?)```\n<!-- end {name} -->", text, re.DOTALL
    )
    assert found is not None, f"README.md has no part {name!r}"
    return found[1]
