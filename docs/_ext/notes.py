"""Leave the markers of notes out of what readers see.

A docstring that explains something hard once begins that paragraph with ``[Note: name]``, and other
files refer to it by ``see [Note: name]``. Both are for people who read the source.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_NOTE = r"\[Note:[^\]]+\]"
_REFERENCE = rf"[Ss]ee\s+{_NOTE}(?:\s+in\s+`[\w.]+`)?"
_REMOVED = (
    rf"\s*\((?:{_REFERENCE}|{_NOTE})\)",  # (see [Note: name])
    rf"(?<=[.:])\s+{_REFERENCE}\.",  # a sentence of its own
    rf"[,;:]\s+{_REFERENCE}",  # the end of a sentence
    rf"{_NOTE}\s+",  # where the note begins
)


def strip(text: str) -> str:
    """Return a text without the markers of notes and references to them."""
    for pattern in _REMOVED:
        text = re.sub(pattern, "", text)
    return text


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of a docstring in place."""
    text = "\n".join(lines)
    if "[Note:" in text:
        lines[:] = strip(text).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the handler, before numpydoc's."""
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
