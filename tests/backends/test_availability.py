"""What can work here: reasons in words, found without starting or importing anything."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import mpidist
from mpidist.backends import availability

ROOT = Path(mpidist.__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No CuPy is imported, and no answer of another process is remembered."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    availability._another_process_says.cache_clear()


def imported_cupy(monkeypatch: pytest.MonkeyPatch, *, gpus: Any, nccl: Any) -> None:
    """Put a CuPy among the imported modules that answers like this; an error is raised."""

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.__version__, cupy.cuda = "14.2", cuda  # type: ignore[attr-defined]
    cuda.is_available = lambda: answer(gpus)  # type: ignore[attr-defined]
    get_version = lambda: answer(nccl)  # noqa: E731
    found = SimpleNamespace(available=nccl is not None, get_version=get_version)
    for name, module in {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": found}.items():
        monkeypatch.setitem(sys.modules, name, module)
    cuda.nccl = found  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("gpus", "nccl", "words"),
    [
        (True, 23203, None),
        (False, 23203, "CuPy 14.2 finds no GPU"),
        (RuntimeError("of another CUDA"), 23203, "cannot be asked for GPUs: RuntimeError: of an"),
        (True, None, r"CuPy 14.2 finds no NCCL \(libnccl.so.2\): pip install 'mpidist\[cuda12\]'"),
        (True, OSError("wrong file"), "asked for its version: OSError: wrong file"),
    ],
)
def test_an_imported_cupy_is_asked(
    gpus: Any, nccl: Any, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported_cupy(monkeypatch, gpus=gpus, nccl=nccl)
    reason = availability.why_no_nccl()
    assert mpidist.is_nccl_available() is (words is None)
    assert (availability.why_no_gpu() is None) is (gpus is True)
    if words is None:
        assert reason is None
    else:
        with pytest.raises(ValueError, match=words):
            raise ValueError(reason)


def test_a_module_that_is_no_cupy_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    assert "cannot be asked" in (availability.why_no_gpu() or "")


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import of it fails
    for why in (availability.why_no_gpu, availability.why_no_nccl):
        assert (why() or "").startswith("CuPy is not installed: pip install 'mpidist[cuda12]'")
    assert not mpidist.is_nccl_available()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package cupy that this process, and any that it starts, could import; and a driver."""
    (tmp_path / "cupy" / "cuda").mkdir(parents=True)
    (tmp_path / "cupy" / "__init__.py").write_text("print('hello')\nimport cupy.cuda\n")
    (tmp_path / "cupy" / "cuda" / "__init__.py").write_text("is_available = lambda: True\n")
    (tmp_path / "cupy" / "cuda" / "nccl.py").write_text(
        "available = True\nget_version = lambda: 23203\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(availability, "_has_driver", lambda: True)
    return tmp_path / "cupy"


def test_another_process_imports_cupy(installed: Path) -> None:
    assert availability.why_no_nccl() is None
    assert "cupy" not in sys.modules


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("cuda/nccl.py", "available = False\n", "finds no NCCL (libnccl.so.2)"),
        ("cuda/__init__.py", "is_available = lambda: False\n", "finds no GPU"),
        ("__init__.py", "import cupy.none\n", "CuPy cannot be imported: ModuleNotFoundError:"),
        ("__init__.py", "import os\nos._exit(3)\n", "CuPy cannot be imported: exit code 3"),
    ],
)
def test_another_process_says_why_not(installed: Path, file: str, text: str, words: str) -> None:
    (installed / file).write_text(text)
    assert words in (availability.why_no_nccl() or "")
    assert not mpidist.is_nccl_available()
    assert "cupy" not in sys.modules


def test_an_import_that_hangs_is_given_up(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(availability, "_SECONDS", 0.5)
    assert "TimeoutExpired" in (availability.why_no_nccl() or "")


@pytest.mark.parametrize(
    ("visible", "seen"), [("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,1", 1), ("GPU-8932f937", 1)]
)
def test_hidden_gpus_are_not_seen(
    visible: str, seen: bool, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reason = availability.why_no_gpu()
    assert reason is None if seen else f"CUDA_VISIBLE_DEVICES={visible!r} hides all" in str(reason)


def test_no_driver_costs_no_process(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_has_driver", lambda: False)
    monkeypatch.setattr(availability, "_output_of", None)
    assert "there is no NVIDIA driver" in (availability.why_no_nccl() or "")


@pytest.mark.parametrize(
    ("files", "driver"),
    [
        (["null", "nvidia0", "nvidiactl"], True),
        (["dxg"], True),
        (["nvidiactl", "nvidia-uvm", "nvram"], False),
    ],
)
def test_a_driver_is_known_by_its_files(
    files: list[str], driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda path: [path / file for file in files])
    assert availability._has_driver() is driver


REAL = """
import json, sys
import mpidist
from mpidist.backends.availability import why_no_gpu, why_no_nccl
before = why_no_nccl(), "cupy" in sys.modules
import cupy
print(json.dumps([*before, why_no_gpu(), why_no_nccl(), cupy.cuda.is_available()]))
"""


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_real_cupy_and_its_answers_fit_together() -> None:
    """Before and after it is imported; on machines with a GPU and without."""
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", REAL],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    before, imported, no_gpu, after, available = json.loads(answer.stdout)
    assert not imported
    assert (no_gpu is None) is available
    assert (before is None) is (after is None)
