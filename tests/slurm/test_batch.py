"""The batch scripts of jobs/, as they are, submitted to a real Slurm."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests._ranks.launcher import marked_processes
from tests.jobs.running import read_arrays, read_records
from tests.slurm.cluster import ROOT, Cluster, Job, segments

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

NODES = ("--nodes=2", "--ntasks-per-node=1", "jobs/ddp-nodes.sbatch")
FSDP_NODES = ("--nodes=2", "--ntasks-per-node=2", "jobs/fsdp-nodes.sbatch")
PIPELINE_NODES = ("--nodes=2", "--ntasks-per-node=2", "jobs/pipeline-nodes.sbatch")
ONE_NODE = ("--ntasks=2", "jobs/ddp-one-node.sbatch")
STEPS = 120


def submit(cluster: Cluster, script: tuple[str, ...], out: Path, *options: str) -> Job:
    """Submit a script of jobs/ with options of train.py."""
    arguments = (
        *script,
        "--no-plot",
        "--log-every=5",
        f"--steps={STEPS}",
        f"--out={out}",
        *options,
    )
    return cluster.submit(*arguments, PYTHON=sys.executable)


def wait_for_step(job: Job, out: Path, step: int) -> None:
    file = out / "metrics.jsonl"
    job.wait_until(lambda: file.exists() and f'"step": {step},' in file.read_text(), f"step {step}")


@pytest.mark.parametrize(
    ("script", "to", "started"),
    [
        # What --signal=B:USR1 sends, and what scancel --signal=USR1 does: to the ranks only.
        pytest.param(NODES, ["--batch"], "start {n}, on n[0-1]", marks=pytest.mark.full),
        (FSDP_NODES, ["--batch"], "start {n}, on n[0-1]"),
        pytest.param(PIPELINE_NODES, ["--batch"], "start {n}, on n[0-1]", marks=pytest.mark.full),
        pytest.param(ONE_NODE, [], "start {n}, on n0", marks=pytest.mark.full),
    ],
    ids=["two nodes", "two nodes, fsdp", "two nodes, pipeline", "one node"],
)
def test_signalled_requeued_and_resumed_has_the_bits_of_undisturbed(
    pmi2: Cluster, tmp_path: Path, script: tuple[str, ...], to: list[str], started: str
) -> None:
    job = submit(pmi2, script, tmp_path / "stopped")
    wait_for_step(job, tmp_path / "stopped", 10)
    job.signal(*to, "--signal=USR1")
    job.wait_until(lambda: job.fact("Restarts") == "1", "second start")
    whole = submit(pmi2, script, tmp_path / "whole")
    assert job.wait() == "COMPLETED", job.output
    assert whole.wait() == "COMPLETED", whole.output

    said = job.output  # of both starts: --open-mode=append
    assert [started.format(n=n) in said for n in (0, 1, 2)] == [True, True, False]
    (stopped,) = re.findall(r"stopped by SIGUSR1 after step (\d+) of", said)
    assert 10 <= int(stopped) < STEPS
    assert f"going on after step {stopped}" in said
    assert (job.fact("Restarts"), whole.fact("Restarts")) == ("1", "0")
    mine, theirs = (read_arrays(tmp_path / out / "checkpoints") for out in ("stopped", "whole"))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 20
    for name, array in mine.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    records = read_records(tmp_path / "stopped/metrics.jsonl")
    assert records[0]["strategy"] == ("hybrid_shard" if script is FSDP_NODES else "ddp")
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


def test_a_pipeline_has_a_stage_on_each_node(pmi2: Cluster, tmp_path: Path) -> None:
    job = submit(pmi2, PIPELINE_NODES, tmp_path / "out", "--steps=10")
    assert job.wait() == "COMPLETED", job.output
    records = read_records(tmp_path / "out/metrics.jsonl")
    assert records[0]["mesh"] == {"pp": 2, "dp": -1}
    assert records[0]["schedule"] == "zb-h1"
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_a_failure_is_not_queued_again(pmi2: Cluster, tmp_path: Path) -> None:
    job = submit(pmi2, ONE_NODE, tmp_path / "out", "--lr=1e30")
    assert job.wait() == "FAILED", job.output
    assert (job.fact("ExitCode"), job.fact("Restarts")) == ("1:0", "0")
    assert "training has diverged" in job.output


def test_a_killed_rank_ends_the_job(pmi2: Cluster, tmp_path: Path) -> None:
    job = submit(pmi2, NODES, tmp_path / "out", "--steps=100000")
    wait_for_step(job, tmp_path / "out", 5)
    os.kill(ranks_of(pmi2, tmp_path)[-1], signal.SIGKILL)
    assert job.wait(timeout=30) == "FAILED", job.output
    assert job.fact("Restarts") == "0"
    assert ranks_of(pmi2, tmp_path) == []


@pytest.mark.full
def test_a_killed_job_that_is_queued_again_goes_on_from_its_last_save(
    pmi2: Cluster, tmp_path: Path
) -> None:
    two_each = ("--nodes=2", "--ntasks-per-node=2", NODES[-1])
    job = submit(pmi2, two_each, tmp_path / "out", "--checkpoint-every=7")
    wait_for_step(job, tmp_path / "out", 21)
    ranks = ranks_of(pmi2, tmp_path)
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    assert job.wait(timeout=30) == "FAILED", job.output
    # The next start finds the shared memory of the dead; see [Note: names of segments].
    assert len([path for path in segments(int(job.number)) if path.exists()]) == 2
    assert pmi2.run("scontrol", "requeue", job.number).returncode == 0
    assert job.wait() == "COMPLETED", job.output
    (step,) = re.findall(r"going on after step (\d+),", job.output)
    assert int(step) >= 14
    assert int(step) % 7 == 0


def test_a_cancelled_job_saves_and_stays_cancelled(pmi2: Cluster, tmp_path: Path) -> None:
    job = submit(pmi2, NODES, tmp_path / "out", "--steps=100000")
    wait_for_step(job, tmp_path / "out", 5)
    job.signal()
    assert job.wait(timeout=30) == "CANCELLED", job.output
    job.wait_until(lambda: ranks_of(pmi2, tmp_path) == [], "end of its ranks")
    assert "stopped by SIGTERM after step" in job.output
    assert read_arrays(tmp_path / "out/checkpoints")
    assert job.fact("Restarts") == "0"


def ranks_of(cluster: Cluster, directory: Path) -> list[int]:
    """Return the process ids of the ranks that write into this directory."""
    found = []
    for pid in marked_processes(str(cluster.directory)):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        if words.startswith(sys.executable.encode()) and str(directory).encode() in words:
            found.append(pid)
    return found


def test_the_gpus_that_slurm_hands_out_are_asked_for_and_missed(
    pmi2: Cluster, tmp_path: Path
) -> None:
    script = ("--ntasks-per-node=2", "--cpus-per-task=1", "jobs/ddp-gpus.sbatch")
    job = submit(pmi2, script, tmp_path / "out")
    assert job.wait() == "FAILED", job.output
    assert "on n[0-1], GPUs per node: 4" in job.output
    # Slurm counts GPUs that this machine has not.
    assert "train.py: error: --device gpu: init('hybrid'): on rank 0, " in job.output
    # srun's is the highest of its ranks, and 143 that of one which --kill-on-bad-exit has ended.
    assert job.fact("ExitCode") in ("2:0", "143:0")
    assert job.fact("Restarts") == "0"
    assert not (tmp_path / "out").exists()


def lines_of(script: str) -> list[str]:
    return (ROOT / "jobs" / script).read_text().splitlines()


def lines_added(one: str, other: str) -> list[str]:
    """Return the lines of a script that another one has not, without comments."""
    old = lines_of(one)
    return [
        line.strip() for line in lines_of(other) if line not in old and not line.startswith("# ")
    ]


def test_the_scripts_differ_in_their_nodes_only() -> None:
    one, several = lines_of("ddp-one-node.sbatch"), lines_of("ddp-nodes.sbatch")
    changed = [(a, b) for a, b in zip(one, several, strict=True) if a != b]
    assert all(a.startswith(("# ", "#SBATCH --n")) for a, _ in changed)
    assert len(changed) <= 5


def test_the_script_of_pipelines_differs_in_the_mesh_only() -> None:
    assert lines_added("ddp-nodes.sbatch", "pipeline-nodes.sbatch") == [
        "#SBATCH --job-name=pipeline",
        '"${PYTHON:-.venv/bin/python}" jobs/train.py \\',
        '--mesh "pp=$SLURM_JOB_NUM_NODES,dp=-1" --schedule zb-h1 \\',
        '--no-progress --resume --checkpoint-every 100 "$@" &',
    ]


def test_the_script_of_fsdp_differs_in_the_strategy_and_the_memory_only() -> None:
    assert lines_added("ddp-nodes.sbatch", "fsdp-nodes.sbatch") == [
        "#SBATCH --job-name=fsdp",
        "#SBATCH --mem=0",
        '"${PYTHON:-.venv/bin/python}" jobs/train.py --strategy hybrid_shard \\',
        '--no-progress --resume --checkpoint-every 100 "$@" &',
    ]
    assert lines_added("fsdp-nodes.sbatch", "ddp-nodes.sbatch") == [
        "#SBATCH --job-name=ddp",
        *[
            line.strip()
            for line in lines_of("ddp-nodes.sbatch")
            if "jobs/train.py" in line and "PYTHON" in line
        ],
    ]
