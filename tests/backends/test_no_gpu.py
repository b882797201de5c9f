"""Where there is no CuPy, or a real one that finds no GPU: everything works but device arrays.

Each question is asked of a fresh process. `tests.test_without_gpus` asks the stand-in, too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import mpidist
from mpidist.backends.availability import why_no_gpu

ROOT = Path(mpidist.__file__).parents[1]

pytestmark = pytest.mark.cupy

HAS_CUPY = importlib.util.find_spec("cupy") is not None
HAS_DRIVER = HAS_CUPY and why_no_gpu() is None

needs_cupy_alone = pytest.mark.skipif(
    not HAS_CUPY or HAS_DRIVER,
    reason="there is a GPU" if HAS_DRIVER else "no CuPy: pip install cupy-cuda12x (no GPU needed)",
)


class State(NamedTuple):
    """How a process comes to be without GPUs, and what it has to say of that."""

    prologue: str
    words: str
    environment: tuple[tuple[str, str], ...] = ()


STATES = {
    "no CuPy": State("import sys; sys.modules['cupy'] = None", "CuPy is not installed"),
    "CuPy without a driver": State("", "there is no NVIDIA driver"),
    "imported CuPy without a driver": State("import cupy", "finds no GPU"),
    "all GPUs hidden": State("", "hides all GPUs", (("CUDA_VISIBLE_DEVICES", ""),)),
}

WITH_CUPY = [pytest.param(name, marks=needs_cupy_alone) for name in STATES if name != "no CuPy"]


def told(name: str, program: str) -> str:
    """Return what a program prints in such a process, which has to end well."""
    state = STATES[name]
    environment = {key: value for key, value in os.environ.items() if "CUDA" not in key}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{state.prologue}\n{program}"],
        env=environment | {"PYTHONPATH": str(ROOT), **dict(state.environment)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", WITH_CUPY)
def test_import_probes_and_init(name: str) -> None:
    program = """
import sys
before = sys.modules.get("cupy")
import mpidist, numpy as np
from mpidist.backends.availability import why_no_gpu, why_no_nccl
assert mpidist.is_nccl_available() is False
assert why_no_gpu() == why_no_nccl()
with mpidist.init() as world:
    assert world.device_capabilities is None
    assert mpidist.all_reduce(np.ones(3), world).tolist() == [1.0] * 3
    assert world.backend == "simulated"
assert sys.modules.get("cupy") is before, "CuPy was imported"
print(why_no_gpu())
"""
    assert STATES[name].words in told(name, program)


@pytest.mark.parametrize("name", ["no CuPy", *WITH_CUPY])
def test_what_needs_a_gpu_says_why_there_is_none(name: str) -> None:
    program = """
import mpidist
from mpidist.errors import DistributedError
world = mpidist.init()
for call in lambda: mpidist.init("hybrid"), lambda: world.empty(3, device="gpu"):
    try:
        call()
    except DistributedError as error:
        print(type(error).__name__, error)
"""
    hybrid, empty = told(name, program).splitlines()
    assert hybrid.startswith("BackendUnavailableError init('hybrid'): ")
    assert empty.startswith("BackendUnavailableError empty on group 'world', rank 0 of 1: ")
    assert STATES[name].words in hybrid
    assert STATES[name].words in empty


@pytest.mark.parametrize(
    "name", ["no CuPy", pytest.param("imported CuPy without a driver", marks=needs_cupy_alone)]
)
def test_info(name: str) -> None:
    said = told(name, "from mpidist.cli import main; main(['info'])")
    assert "mpidist" in said
    assert "Traceback" not in said
