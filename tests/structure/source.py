"""Read the source of the package: its imports, its classes, its names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import mpidist

PACKAGE = Path(mpidist.__file__).parent


@cache
def trees() -> Mapping[str, ast.Module]:
    """Return the syntax tree of every file of the package, by its path in it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "examples"  # programs of users
    }


def module_of(file: str) -> str:
    """Return the dotted name of a file: mpidist.nn for nn/__init__.py."""
    parts = ["mpidist", *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Return the files that each file imports: anywhere in it, for type checkers only as well."""
    files = {module_of(file): file for file in trees()}
    found: dict[str, set[str]] = {}
    for file, tree in trees().items():
        names = {name for node in ast.walk(tree) for name in _imported(node, files)}
        found[file] = {files[name] for name in names} - {file}
    return found


def _imported(node: ast.AST, modules: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
    if isinstance(node, ast.ImportFrom) and node.module and node.module in modules:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in modules else node.module


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the sets of files that import each other, directly or through others.

    These are the strongly connected components of more than one file (Tarjan 1972).
    """
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(file: str) -> None:
        number[file] = lowest[file] = len(number)
        stack.append(file)
        for other in graph[file]:
            if other not in number:
                visit(other)
            if other in stack:
                lowest[file] = min(lowest[file], lowest[other])
        if lowest[file] == number[file]:
            start = stack.index(file)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1:
                found.append(sorted(component))

    for file in graph:
        if file not in number:
            visit(file)
    return sorted(found)


def classes() -> dict[str, list[str]]:
    """Return the files in which each class name is defined at the top of a module."""
    found = defaultdict(list)
    for file, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found[node.name].append(file)
    return dict(found)


def names() -> Iterator[str]:
    """Yield each name that the package gives: to modules, classes, functions and variables."""
    # Those of the language, such as __enter__, are not the package's.
    return (name for name in _names() if not name.startswith("__"))


def _names() -> Iterator[str]:
    for file, tree in trees().items():
        yield module_of(file).rpartition(".")[2]
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    yield node.name
                case ast.arg():
                    yield node.arg
                case ast.Name(ctx=ast.Store()):
                    yield node.id
                case ast.Attribute(ctx=ast.Store()):
                    yield node.attr


def parts(name: str, *, without: Iterable[str] = ()) -> list[str]:
    """Split a name into its words: `place_of`, `PlaceOf` and `_PLACE_OF` are place and of."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    for term in without:
        snake = snake.replace(term, "")
    return re.findall(r"[a-z]+", snake)
