"""A directive that shows a part of README.md, so that nothing is written twice.

``.. readme:: status`` shows what stands between the README's comments ``begin status`` and
``end status``: a fenced block as code, a table as a table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx

README = Path(__file__).parents[2] / "README.md"


def part(name: str) -> str:
    """Return the README's text between the comments of this name."""
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{README}: no part is named {name!r}")
    return found[1].strip()


def as_rst(markdown: str) -> list[str]:
    """Turn a fenced block or a table into reStructuredText."""
    lines = markdown.splitlines()
    if lines[0].startswith("```"):
        language = lines[0].strip("`") or "text"
        return [f".. code-block:: {language}", "", *("   " + line for line in lines[1:-1])]
    rows = [_cells(line) for line in lines if not re.fullmatch(r"[|\s:-]+", line)]
    table = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        table += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return table


def _cells(line: str) -> list[str]:
    # A code span of Markdown is one of reStructuredText with twice the backquotes.
    return [re.sub(r"`([^`]+)`", r"``\1``", cell.strip()) for cell in line.split("|")[1:-1]]


class Readme(Directive):
    """Show a part of the README."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        """Parse the part as if it stood here."""
        environment = self.state.document.settings.env
        environment.note_dependency(str(README))
        try:
            lines = as_rst(part(self.arguments[0]))
        except ValueError as error:
            raise self.error(str(error)) from error
        holder = nodes.Element()
        parse: Callable[..., object] = self.state.nested_parse
        parse(StringList(lines, source=str(README)), self.content_offset, holder)
        return list(holder.children)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("readme", Readme)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
