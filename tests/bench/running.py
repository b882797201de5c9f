"""Running a benchmark's command on two ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests._ranks.launcher import clean_environment

ROOT = Path(__file__).parents[2]


def bench(mpirun: Sequence[str], report: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``mpidist bench`` with these words, which has to succeed and to write the report."""
    python = [*mpirun, "-n", "2", sys.executable]
    job = subprocess.run(
        [*python, "-m", "mpidist", "bench", *words, "--json", str(report)],
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert job.returncode == 0, job.stderr
    return job
