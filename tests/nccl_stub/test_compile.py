"""mpidist's kernels are CUDA that NVIDIA's compiler takes, for every dtype that they take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.nccl_stub.compile_kernels import MISSING
from tests.nccl_stub.conftest import skip


@pytest.mark.cupy
def test_every_kernel_compiles() -> None:
    # In a process of its own, since this one may have called kernels, and must not import CuPy.
    done = subprocess.run(
        [sys.executable, "-m", "tests.nccl_stub.compile_kernels"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    if done.returncode == MISSING:
        skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
