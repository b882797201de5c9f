"""Machines that lack a GPU, CuPy, a driver or NCCL: what is asked, made and refused there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpidist

ROOT = Path(mpidist.__file__).parents[1]

PROGRAM = """
import json, sys
state = sys.argv[1]
if state == "no CuPy":
    sys.modules["cupy"] = None
elif state != "real":
    from tests.nccl_stub import stand_in
    stand_in.install(devices=0 if state == "no GPU" else 2, nccl=False)
import numpy as np
import mpidist
from mpidist.backends.availability import why_no_nccl

imported = "cupy" in sys.modules
told = {"imported": state == "real" and imported, "available": mpidist.is_nccl_available()}
told["why"] = why_no_nccl()
with mpidist.init() as world:
    told["backend"] = world.backend
    told["devices"] = world.device_capabilities is not None
    told["sum"] = float(mpidist.all_reduce(np.ones(2), world).sum())
    for name, call in {
        "hybrid": lambda: mpidist.init("hybrid"),
        "verb": lambda: mpidist.gpu_all_reduce(np.ones(2), world),
        "array": lambda: mpidist.all_reduce(sys.modules["cupy"].ones(2), world),
    }.items():
        try:
            call()
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]
print(json.dumps(told))
"""

STATES = {
    "no CuPy": "CuPy is not installed",
    "no GPU": "finds no GPU",
    "no NCCL": "finds no NCCL",
}


def tell(state: str, **variables: str) -> dict[str, object]:
    dropped = ("OMPI_", "PMI", "SLURM_", "MPIDIST_", "CUDA_VISIBLE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, state],
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    told: dict[str, object] = json.loads(answer.stdout)
    return told


@pytest.mark.parametrize("state", STATES)
def test_host_arrays_work_and_device_arrays_are_refused_with_the_reason(state: str) -> None:
    told = tell(state)
    reason = STATES[state]
    assert told["available"] is False
    assert reason in str(told["why"])
    assert (told["backend"], told["devices"], told["sum"]) == ("simulated", False, 2.0)
    assert told["hybrid"] == ["BackendUnavailableError", f"init('hybrid'): {told['why']}"]
    assert told["verb"][0] == "UnsupportedOperationError"  # type: ignore[index]
    if state == "no NCCL":  # elsewhere there can be no such array
        kind, words = told["array"]  # type: ignore[misc]
        assert kind == "UnsupportedOperationError"
        assert reason in words
        assert "MPIDIST_ENABLE_GPU_FALLBACK=1" in words


@pytest.mark.parametrize(("state", "carried"), [("no CuPy", False), ("no NCCL", True)])
def test_the_way_by_the_host_needs_a_gpu(state: str, carried: bool) -> None:
    told = tell(state, MPIDIST_ENABLE_GPU_FALLBACK="1")
    assert told["devices"] is carried
    assert ("hybrid" in told) is not carried
    assert told["sum"] == 2.0


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_with_the_real_cupy_the_answers_fit_together() -> None:
    """On machines with a GPU and without; CuPy is not imported by asking."""
    told = tell("real")
    assert not told["imported"]
    assert told["available"] is (told["why"] is None)
    assert told["devices"] is told["available"]
    assert ("hybrid" in told) is not told["available"]
    assert told["sum"] == 2.0
