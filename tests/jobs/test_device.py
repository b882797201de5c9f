"""jobs/train.py --device gpu, on the stand-in for cupy: the run that the host makes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.jobs.running import Run, read_arrays, read_records

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

QUIET = ("--no-progress", "--no-plot", "--log-every", "2")
ON_STAND_IN = (sys.executable, str(Path(__file__).parent / "on_stand_in.py"))


def check_same(tmp_path: Path, *outs: str) -> None:
    host, device = (read_records(tmp_path / out / "metrics.jsonl")[1:] for out in outs)
    assert len(host) == len(device) > 2
    for expected, got in zip(host, device, strict=True):
        assert got.pop("kind") == expected.pop("kind")
        del expected["samples_per_second"], got["samples_per_second"]
        assert got == pytest.approx(expected, rel=2e-4), expected["step"]
    here, there = (read_arrays(tmp_path / out / "checkpoints") for out in outs)
    assert here.keys() == there.keys()
    for name, array in here.items():
        np.testing.assert_allclose(there[name], array, 1e-3, 2e-4, err_msg=name)


@pytest.mark.mpirun
@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(s, marks=pytest.mark.full) for s in ("full_shard", "hybrid_shard"))],
)
def test_two_ranks_train_as_the_host_does_and_go_on_there(
    stand_in: ModuleType, run: Run, tmp_path: Path, mpirun: list[str], strategy: str
) -> None:
    ranks = (*mpirun, "-n", "2")
    options = ("--batch-size", "32", "--epochs", "0.2", "--strategy", strategy, *QUIET)
    assert run("--out", "host", *options, launcher=ranks).returncode == 0
    ended = run(
        *("--device", "gpu", "--compression", "none", "--out", "device"),
        *("--checkpoint-every", "4", *options),
        launcher=(*ranks, *ON_STAND_IN),
    )
    assert ended.returncode == 0, ended.stdout
    check_same(tmp_path, "host", "device")
    assert read_records(tmp_path / "device/metrics.jsonl")[0]["device"] == "gpu"
    # The checkpoint of a run on a device is one of the host's.
    ended = run("--out", "device", "--resume", *options)
    assert ended.returncode == 0, ended.stdout
    assert "going on after step 11" in ended.stdout


@pytest.mark.mpirun
@pytest.mark.parametrize(
    "strategy", ["full_shard", pytest.param("hybrid_shard", marks=pytest.mark.full)]
)
def test_two_ranks_hold_a_model_together_on_devices(
    stand_in: ModuleType, run: Run, tmp_path: Path, mpirun: list[str], strategy: str
) -> None:
    ranks = (*mpirun, "-n", "2")
    options = ("--strategy", strategy, "--units", "70000", "--steps", "4", *QUIET)
    assert run("--out", "host", *options, launcher=ranks).returncode == 0
    ended = run(*("--device", "gpu", "--out", "device", *options), launcher=(*ranks, *ON_STAND_IN))
    assert ended.returncode == 0, ended.stdout
    check_same(tmp_path, "host", "device")


def test_text_on_one_rank(stand_in: ModuleType, run: Run, tmp_path: Path) -> None:
    options = ("--task", "text", "--steps", "4", *QUIET)
    assert run("--out", "host", *options).returncode == 0
    ended = run("--device", "gpu", "--out", "device", *options, launcher=ON_STAND_IN)
    assert ended.returncode == 0, ended.stdout
    check_same(tmp_path, "host", "device")


def test_no_gpu_is_said_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    ended = run("--device", "gpu", "--out", "here", *QUIET)
    assert ended.returncode == 2
    assert "train.py: error: --device gpu: init('hybrid'): " in ended.stdout
    assert "Traceback" not in ended.stdout
    assert not (tmp_path / "here").exists()
