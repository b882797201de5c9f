"""What importing the package does, and what its modules say they offer."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import mpidist

PACKAGE = Path(mpidist.__file__).parent

DOORS = {
    "mpi4py": {"backends/mpi/backend.py"},
    "cupy": {"arrays/namespaces.py", "backends/device/nccl/communicator.py"},
    "h5py": {"checkpoint/format/files.py", "checkpoint/format/view.py"},
    "torch": {"backends/gloo.py", "adapters/torch.py", "bench/peers.py"},
}

IMPORT_ALL = """
import importlib, json, os, pkgutil, sys, threading
environment, handlers = dict(os.environ), sys.excepthook
import mpidist
shallow = sorted(sys.modules)
for module in pkgutil.walk_packages(mpidist.__path__, "mpidist."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps({
    "shallow": shallow,
    "deep": sorted(sys.modules),
    "threads": threading.active_count(),
    "hooked": sys.excepthook is not handlers,
    "environment_changed": dict(os.environ) != environment,
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """What a fresh interpreter holds after importing the package, then all of its modules."""
    path = os.pathsep.join([str(PACKAGE.parent), *sys.path[1:]])
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, object] = json.loads(answer.stdout)
    return found


def module_names() -> list[str]:
    found = pkgutil.walk_packages(mpidist.__path__, "mpidist.")
    return ["mpidist", *sorted(m.name for m in found if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("vendor", ["mpi4py.MPI", "mpi4py", "cupy", "h5py", "torch"])
@pytest.mark.parametrize("depth", ["shallow", "deep"])
def test_no_vendor_is_imported(imported: dict[str, list[str]], depth: str, vendor: str) -> None:
    assert vendor not in imported[depth]


def test_importing_the_package_brings_no_plotting(imported: dict[str, list[str]]) -> None:
    assert not {"matplotlib", "tqdm", "pytest"} & set(imported["shallow"])


def test_nothing_starts(imported: dict[str, object]) -> None:
    assert imported["threads"] == 1
    assert imported["hooked"] is False
    assert imported["environment_changed"] is False


COST = """
import sys
from time import process_time
start = process_time()
import {}
print(process_time() - start, *sys.modules)
"""


def cost(module: str) -> tuple[float, set[str]]:
    """Return the processor's seconds of an import in a fresh interpreter, and what it brings."""
    dropped = ("COVERAGE", "COV_", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *sys.path[1:]])
    command = [sys.executable, "-c", COST.format(module)]
    seconds, *modules = subprocess.check_output(command, env=environment, text=True).split()
    return float(seconds), set(modules)


def test_importing_costs_little_more_than_numpy() -> None:
    """A guard, with room for a busy machine; `python -m mpidist bench import` gives the figure."""
    cost("mpidist")  # once more, since the files may not be compiled
    pairs = [(cost("mpidist")[0], cost("numpy")[0]) for _ in range(9)]
    ours, numpys = (min(seconds) for seconds in zip(*pairs, strict=True))
    assert ours < 1.2 * numpys, pairs


def test_importing_brings_nothing_heavy_that_is_not_needed_yet() -> None:
    """These, and what they import themselves, were two fifths of what mpidist adds to numpy."""
    late = {"argparse", "logging", "pathlib", "secrets", "socket", "subprocess", "tempfile"}
    assert not late & (cost("mpidist")[1] - cost("numpy")[1])


def constants_classes_functions(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Return the key of ruff's order: constants, classes, functions; numbers by value."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    parts = re.findall(r"\d+|\D+", name)
    return kind, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def is_offered(name: str, value: object) -> bool:
    return not (name.startswith("_") or name == "annotations" or isinstance(value, ModuleType))


def test_all_is_sorted_and_importable() -> None:
    for name in module_names():
        module = importlib.import_module(name)
        package = hasattr(module, "__path__")  # which users import by a star
        public = package and not any(part.startswith("_") for part in name.split("."))
        offered = getattr(module, "__all__", None)
        if offered is None:
            own = [each for each, value in vars(module).items() if is_offered(each, value)]
            assert not (public and own), f"{name} has no __all__ and holds {own}"
            continue
        assert list(offered) == sorted(offered, key=constants_classes_functions), name
        assert len(set(offered)) == len(offered), name
        assert not [each for each in offered if not hasattr(module, each)], name


def dynamic_imports() -> Iterator[tuple[str, str]]:
    """Yield (file, module) of each import by a string, which import-linter cannot see."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[0]
            if called in ("require", "import_module", "__import__") and isinstance(
                first, ast.Constant
            ):
                yield path.relative_to(PACKAGE).as_posix(), str(first.value).partition(".")[0]


def test_vendors_are_imported_by_name_only_at_their_doors() -> None:
    wrong = [
        (file, vendor)
        for file, vendor in dynamic_imports()
        if vendor in DOORS and file not in DOORS[vendor]
    ]
    assert wrong == []
