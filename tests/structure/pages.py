"""The walks that the documentation describes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Stop(NamedTuple):
    """A file of a described walk, and functions that are said to be called in it."""

    file: str
    functions: Sequence[str]


def stops(call: str) -> list[Stop]:
    """Return the numbered items of ARCHITECTURE.md's walk of a call, such as all_reduce."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    _, begun, rest = text.partition(f"<!-- begin walk {call} -->\n")
    part, ended, _ = rest.partition(f"<!-- end walk {call} -->\n")
    if not (begun and ended):
        raise AssertionError(f"ARCHITECTURE.md has no walk of {call}")
    items = re.split(r"^\d+\. ", part, flags=re.MULTILINE)[1:]
    return [Stop(item.split("`")[1], re.findall(r"`(?:\w+\.)*(\w+)\(\)`", item)) for item in items]


def gradient_page() -> str:
    """Return the part of docs/concepts/gradient.rst that follows a gradient."""
    text = (ROOT / "docs" / "concepts" / "gradient.rst").read_text(encoding="utf-8")
    return text.partition("\nBuckets\n")[0]


def files_of_the_gradient_page() -> list[str]:
    """Return the files of the package that the page tells to read, without examples."""
    _, _, to_read = gradient_page().partition("To read the code")
    named = re.findall(r"``mpidist/([\w/]+\.py)``", to_read)
    return [file for file in dict.fromkeys(named) if not file.startswith("examples/")]


def calls_of_the_gradient_page() -> list[str]:
    """Return the functions that its steps call, ``weight.first_grad()``, in their order."""
    steps = re.findall(r"^\d\. (.*?)(?=^\S|\Z)", gradient_page(), re.MULTILINE | re.DOTALL)
    return re.findall(r"``(?:\w+\.)*(\w+)\([^`]*\)``", "".join(steps))
