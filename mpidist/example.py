"""The command ``python -m mpidist example``: list, show or copy the examples."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from mpidist.usage import write_once


def examples() -> Mapping[str, str]:
    """Return the text of each example, by the name of its file, in the order of the names."""
    folder = files("mpidist").joinpath("examples")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".py"))
    return {name: folder.joinpath(name).read_text(encoding="utf-8") for name in names}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "name", nargs="?", help="show the example whose name begins so, such as 00; else list them"
    )
    parser.add_argument(
        "--copy", type=Path, metavar="DIR", help="copy it, or all of them, into this directory"
    )


def run(options: argparse.Namespace) -> int:
    """List, show or copy; the exit code is 2 if there is no such example, or a file in the way."""
    chosen = {n: text for n, text in examples().items() if n.startswith(options.name or "")}
    if not chosen:
        write_once(f"example: {options.name!r} is none of {', '.join(examples())}\n")
        return 2
    if options.copy is not None:
        return _copy(chosen, options.copy)
    if options.name:
        sys.stdout.write("\n\n".join(chosen.values()))
        return 0
    for name, text in chosen.items():
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        sys.stdout.write(f"{name:<26}{first}\n")
    return 0


def _copy(chosen: Mapping[str, str], directory: Path) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in chosen.items():
            with (directory / name).open("x", encoding="utf-8") as file:
                file.write(text)
            sys.stdout.write(f"{directory / name}\n")
    except OSError as error:
        write_once(f"example: {error}\n")
        return 2
    return 0
