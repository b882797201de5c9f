"""The examples in the docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import mpidist

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mpidist.__path__, "mpidist.")
    if not module.name.endswith("__main__")
)


def test_docstrings() -> None:
    results = {
        name: doctest.testmod(
            importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
        )
        for name in MODULES
    }
    assert [name for name, result in results.items() if result.failed] == []
    assert sum(result.attempted for result in results.values()) > 10
