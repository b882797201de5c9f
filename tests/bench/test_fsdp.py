from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests._ranks.launcher import clean_environment


@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.timeout(120)
def test_the_command_measures_a_small_model_and_says_what_is_held(mpirun, tmp_path):
    words = ["bench", "fsdp", "--millions", "0.1", "--units", "0.1", "--repeats", "5"]
    command = [*mpirun, "-n", "2", sys.executable, "-m", "mpidist", *words]
    environment = clean_environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    job = subprocess.run(
        [*command, "--json", str(tmp_path / "r")],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert job.returncode == 0, job.stderr
    rows = {row["series"]: row for row in json.loads((tmp_path / "r").read_text())["rows"]}
    assert list(rows) == ["FSDP", "DDP+sharded", "sharded", "DDP"]
    held = {name: row["values"]["held"] for name, row in rows.items()}
    layer = 4 * 160 * 161
    whole = 4 * layer
    assert rows["DDP"]["nbytes"] == whole
    # Half of parameters, gradients and two arrays of state, and two units of a layer.
    assert held["FSDP"] == pytest.approx(2 * whole + 2 * layer, rel=0.01)
    assert held["DDP+sharded"] == pytest.approx(2.5 * whole, rel=0.01)
    assert held["DDP"] == pytest.approx(4 * whole, rel=0.01)
    assert "0.10 million parameters, rank 0 holds: FSDP" in job.stdout
    assert "FSDP/DDP+sharded" in job.stdout
