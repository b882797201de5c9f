"""What CuPy has, and with which parameters: `signatures.txt`, and how it was made.

The file is what ``python -m tests.nccl_stub.stand_in.signatures`` prints where CuPy 14.2.0 is
installed; it needs no GPU. It has a line for each public name of cupy, of some of its modules and
of `cupy.ndarray`, with the parameters, where CuPy tells them, and a ``=`` behind those that have a
default.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

__all__ = ["MADE_OF", "checked", "described", "known"]

MADE_OF = "14.2.0"
_MODULES = ("", "lib", "lib.stride_tricks", "linalg")
_FILE = Path(__file__).parent / "signatures.txt"


@functools.cache
def known() -> dict[str, inspect.Signature | None]:
    """Return the names, such as ``linalg.norm`` and ``ndarray.sum``, with the signatures."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    split = [re.fullmatch(r"([^(]+)(?:\((.*)\))?", line) for line in lines]
    return {m[1]: None if m[2] is None else _signature(m[2]) for m in split if m is not None}


def checked(name: str, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a call with `out` by name; raise a TypeError if CuPy would."""
    signature = known().get(name)
    if signature is None:
        return args, kwargs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"cupy.{name}{signature}: {error}") from None
    names = list(signature.parameters)
    first = names.index("out") if "out" in names else len(args)
    return args[:first], {**dict(zip(names[first:], args[first:], strict=False)), **kwargs}


def _signature(text: str) -> inspect.Signature:
    function = eval(f"lambda {re.sub('=', '=None', text)}: None")  # made by ourselves
    return inspect.signature(function)


def _as_text(signature: inspect.Signature) -> str:
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
        for p in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters)).replace("=None", "=")


def _of_method(method: Any) -> inspect.Signature:
    """Return the signature that Cython has put into a docstring, less `self`."""
    found = re.match(r"\w+\.\w+\((.*?)\)( ->|\n|$)", method.__doc__ or "")
    if found is None:
        raise ValueError(method)
    # C types stand before some names.
    text = re.sub(r"\b\w+ (?=\w+\s*[=,)]|\w+$)", "", found[1])
    lines = ast.parse(f"def f({text}): pass")
    arguments = lines.body[0].args  # type: ignore[attr-defined]
    del arguments.args[0]
    return _signature(re.sub(r"=[^,]+", "=", ast.unparse(arguments)))


def _describe(name: str, member: Any, of: Any) -> str:
    if isinstance(member, type):
        return name
    try:
        return f"{name}{_as_text(of(member))}"
    except (TypeError, ValueError, SyntaxError):
        return name


def described(cupy: Any) -> list[str]:
    """Return the lines for CuPy as it is installed."""
    lines = []
    for path in _MODULES:
        module = importlib.import_module(f"{cupy.__name__}.{path}".rstrip("."))
        for name in dir(module):
            full = f"{path}.{name}".lstrip(".")
            if not name.startswith("_"):
                lines.append(_describe(full, getattr(module, name), inspect.signature))
    methods = [name for name in dir(cupy.ndarray) if not name.startswith("_")]
    return lines + [
        _describe(f"ndarray.{name}", getattr(cupy.ndarray, name), _of_method) for name in methods
    ]


if __name__ == "__main__":
    print("\n".join(described(importlib.import_module("cupy"))))
