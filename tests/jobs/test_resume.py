"""jobs/train.py stopped by a signal, or killed, and started again with --resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests._ranks.launcher import marked_processes
from tests.jobs.running import Run, Start, read_arrays, read_records

STEPS = 120
OPTIONS = ["--steps", str(STEPS), "--log-every", "5", "--no-progress", "--no-plot", "--resume"]
STOPPED = 75

pytestmark = [pytest.mark.mpirun, pytest.mark.timeout(120)]


def wait_for_steps(process: subprocess.Popen[bytes], out: Path, steps: int) -> None:
    deadline, file = time.monotonic() + 60, out / "metrics.jsonl"
    while not (file.exists() and f'"step": {steps}' in file.read_text()):
        assert process.poll() is None, (out.parent / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ranks_of(directory: Path) -> list[int]:
    """Return the process ids of the job's ranks: no launcher runs train.py itself."""
    found = []
    for pid in marked_processes(str(directory)):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"mpirun" not in words[0] and words[1:2] and words[1].endswith(b"train.py"):
            found.append(pid)
    return found


def same_bits(out: Path, expected: Path) -> None:
    mine, theirs = (read_arrays(path / "checkpoints") for path in (out, expected))
    assert mine.keys() == theirs.keys()
    assert len(mine) > 20
    for name, array in mine.items():
        assert array.tobytes() == theirs[name].tobytes(), name


def check_records(out: Path, expected: Path) -> None:
    """Each step is in one record, and the evaluations are those of the run that was left alone."""
    records, whole = (read_records(path / "metrics.jsonl") for path in (out, expected))
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert {record["step"] for record in whole if record["kind"] == "train"} <= set(steps)
    mine, theirs = (
        [(r["step"], r["loss"]) for r in file if r["kind"] == "held-out"]
        for file in (records, whole)
    )
    assert mine == theirs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run on two ranks is kept that nobody stops."""
    return tmp_path_factory.mktemp("undisturbed") / "out"


@pytest.fixture
def whole(run: Run, mpirun: list[str], undisturbed: Path) -> Path:
    """That run, made when it is needed first."""
    if not undisturbed.exists():
        ended = run(*OPTIONS, "--out", str(undisturbed), launcher=(*mpirun, "-n", "2"))
        assert ended.returncode == 0, ended.stdout
    return undisturbed


def check_goes_on(run: Run, out: Path, whole: Path, launcher: tuple[str, ...]) -> None:
    """Resume, and compare with a run that nobody disturbed."""
    stopped_at = read_records(out / "metrics.jsonl")[-1]["step"]
    assert 0 < stopped_at < STEPS
    ended = run(*OPTIONS, "--out", str(out), launcher=launcher)
    assert ended.returncode == 0, ended.stdout
    assert f"going on after step {stopped_at}" in ended.stdout
    same_bits(out, whole)
    check_records(out, whole)


@pytest.mark.parametrize(
    ("to", "number"),
    [
        pytest.param("one rank", signal.SIGUSR1, marks=pytest.mark.any_mpi),
        pytest.param("one rank", signal.SIGTERM, marks=[pytest.mark.any_mpi, pytest.mark.full]),
        pytest.param("mpirun", signal.SIGUSR1, marks=pytest.mark.full),
        ("mpirun", signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_the_bits_are_those_of_an_undisturbed_run(
    start: Start,
    run: Run,
    mpirun: list[str],
    whole: Path,
    tmp_path: Path,
    to: str,
    number: signal.Signals,
) -> None:
    launcher, out = (*mpirun, "-n", "2"), tmp_path / "stopped"
    process = start(*OPTIONS, "--out", "stopped", launcher=launcher)
    wait_for_steps(process, out, 20)
    ranks = ranks_of(tmp_path)
    assert len(ranks) == 2
    os.kill(ranks[-1] if to == "one rank" else process.pid, number)
    code = process.wait(timeout=30)
    output = (tmp_path / "output").read_text()
    if to == "mpirun" and number == signal.SIGTERM and "--oversubscribe" in mpirun:
        # Open MPI's mpirun ends the job at SIGTERM, without waiting for the ranks.
        assert code not in (0, STOPPED), output
        return
    assert code == STOPPED, output
    assert output.count(f"stopped by {number.name} after step ") == 1
    assert "Traceback" not in output
    check_goes_on(run, tmp_path / "stopped", whole, launcher)


def test_more_signals_do_not_disturb_the_save(
    start: Start, run: Run, mpirun: list[str], whole: Path, tmp_path: Path
) -> None:
    launcher = (*mpirun, "-n", "2")
    process = start(*OPTIONS, "--out", "stopped", launcher=launcher)
    wait_for_steps(process, tmp_path / "stopped", 20)
    ranks, number = ranks_of(tmp_path), 0
    while process.poll() is None and any(_alive(pid) for pid in ranks):
        for pid in ranks:
            if _alive(pid):
                os.kill(pid, signal.SIGTERM if number % 2 else signal.SIGUSR1)
        number += 1
        time.sleep(0.001)
    assert process.wait(timeout=30) == STOPPED, (tmp_path / "output").read_text()
    assert number > 3
    check_goes_on(run, tmp_path / "stopped", whole, launcher)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    "sharded",
    [pytest.param((), marks=pytest.mark.full, id="whole"), ("--sharded-optimizer",)],
)
def test_a_run_that_is_killed_goes_on_from_its_last_save(
    start: Start,
    run: Run,
    mpirun: list[str],
    whole: Path,
    tmp_path: Path,
    sharded: tuple[str, ...],
) -> None:
    launcher, options = (*mpirun, "-n", "2"), ("--checkpoint-every", "17", *sharded)
    process = start(*OPTIONS, *options, "--out", "stopped", launcher=launcher)
    wait_for_steps(process, tmp_path / "stopped", 50)
    os.kill(ranks_of(tmp_path)[0], signal.SIGKILL)
    assert process.wait(timeout=30) not in (0, STOPPED)
    before = read_records(tmp_path / "stopped/metrics.jsonl")[-1]["step"]
    ended = run(*OPTIONS, *options, "--out", "stopped", launcher=launcher)
    assert ended.returncode == 0, ended.stdout
    (step,) = [
        record["step"]
        for record in read_records(tmp_path / "stopped/metrics.jsonl")
        if record["kind"] == "resume"
    ]
    assert step % 17 == 0
    assert before - 22 <= step <= before  # written, and committed, beside the next steps
    same_bits(tmp_path / "stopped", whole)
    check_records(tmp_path / "stopped", whole)


@pytest.mark.any_mpi
def test_other_ranks_and_another_optimizer_go_on(
    start: Start, run: Run, mpirun: list[str], tmp_path: Path
) -> None:
    process = start(*OPTIONS, "--sharded-optimizer", "--out", "x", launcher=(*mpirun, "-n", "3"))
    wait_for_steps(process, tmp_path / "x", 20)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == STOPPED
    ended = run(*OPTIONS, "--out", "x")  # one rank, unsharded
    assert ended.returncode == 0, ended.stdout
    records = read_records(tmp_path / "x/metrics.jsonl")
    assert [r["ranks"] for r in records if r["kind"] in ("run", "resume")] == [3, 1]
    assert records[-1]["step"] == STEPS
    assert run(*OPTIONS, "--out", "x").returncode == 0  # done already: says the result again


@pytest.mark.any_mpi
def test_what_cannot_be_loaded_is_said_and_begins_nothing(
    run: Run, mpirun: list[str], tmp_path: Path
) -> None:
    launcher = (*mpirun, "-n", "2")
    begin = ("--steps", "3", "--out", "x", "--checkpoint-every", "2")
    assert run(*OPTIONS[2:], *begin).returncode == 0
    ended = run(*OPTIONS, "--seed", "1", "--out", "x", launcher=launcher)
    assert ended.returncode == 2
    assert ended.stdout.count("error: --resume takes the options of the run: ") == 1
    assert ended.stdout.count("seed is 1 here and 0 in the state") == 1
    assert "Traceback" not in ended.stdout
    top = tmp_path / "x/checkpoints"
    file = top / "step-000003/rank-00000.h5"
    file.write_bytes(file.read_bytes()[:10_000])
    ended = run(*OPTIONS, "--out", "x", launcher=launcher)
    assert ended.returncode == 2
    assert ended.stdout.count("train.py: error: CheckpointCorruptError: ") == 1
    assert "Traceback" not in ended.stdout
    assert "steps: 2; --resume STEP goes on from one of them" in ended.stdout
    assert file.stat().st_size == 10_000
    # Slurm starts the job again: it goes back by itself, whatever the first start was told.
    again = ("--resume", "1", "--steps", "4", "--out", "x")
    ended = run(*OPTIONS, *again, launcher=(*launcher, "env", "SLURM_RESTART_COUNT=1"))
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("GOING BACK to step 2 of") == 1
    assert "going on after step 2," in ended.stdout
    names = sorted(path.name for path in top.iterdir())
    assert names == ["step-000002", "step-000003.aside-1", "step-000004"]
    ended = run(*OPTIONS, *again)
    assert ended.returncode == 2
    assert "CheckpointNotFoundError: no complete checkpoint of step 1" in ended.stdout
    ended = run(*OPTIONS, "--resume", "2", "--steps", "4", "--out", "x")
    assert ended.returncode == 0, ended.stdout
    assert "going on after step 2," in ended.stdout
    assert (top / "step-000004.aside-1").exists()


@pytest.mark.any_mpi
def test_checkpoints_are_removed_only_if_that_is_said(run: Run, tmp_path: Path) -> None:
    begin = ("--steps", "2", "--no-plot", "--no-progress", "--out", "x")
    assert run(*begin).returncode == 0
    before = read_arrays(tmp_path / "x/checkpoints")
    ended = run(*begin, "--seed", "1")
    assert ended.returncode == 2
    assert "has checkpoints of a run up to step 2: go on from there with --resume" in ended.stdout
    ended = run(*begin, "--resume", "--steps", "1")  # the last --steps counts
    assert ended.returncode == 0
    assert "nothing to do: the run in x/checkpoints has 2 steps, and this one" in ended.stdout
    after = read_arrays(tmp_path / "x/checkpoints")
    assert all(array.tobytes() == before[name].tobytes() for name, array in after.items())
    assert run(*begin, "--seed", "1", "--overwrite").returncode == 0
    assert any(
        (array != before[n]).any() for n, array in read_arrays(tmp_path / "x/checkpoints").items()
    )
    assert [r["step"] for r in read_records(tmp_path / "x/metrics.jsonl")[1:]] == [2, 2]


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("task", "steps"), [("digits", 40), pytest.param("text", 12, marks=pytest.mark.full)]
)
def test_saved_by_four_ranks_and_loaded_by_any(
    run: Run, mpirun: list[str], tmp_path: Path, task: str, steps: int, full: bool
) -> None:
    """On four ranks with the same bits; on fewer, equal but for the order of sums."""
    half = str(steps // 2)
    options = ("--task", task, "--steps", str(steps), "--no-progress", "--no-plot")
    options += ("--log-every", "2", "--checkpoint-every", half)
    ended = run(*options, "--out", "whole", launcher=(*mpirun, "-n", "4"))
    assert ended.returncode == 0, ended.stdout
    whole = read_arrays(tmp_path / "whole/checkpoints")
    losses = [r["loss"] for r in read_records(tmp_path / "whole/metrics.jsonl")[1:]]
    for size in (4, 2, 1) if full else (4, 2):
        out = tmp_path / f"on{size}"
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / f"checkpoints/step-{steps:06d}")
        ended = run(*options, "--out", str(out), "--resume", launcher=(*mpirun, "-n", str(size)))
        assert ended.returncode == 0, ended.stdout
        assert f"going on after step {half}, ranks: {size}" in ended.stdout
        arrays = read_arrays(out / "checkpoints")
        assert arrays.keys() == whole.keys()
        records = read_records(out / "metrics.jsonl")
        kept = [r["loss"] for r in records if r["kind"] not in ("run", "resume")]
        if size == 4:
            assert kept == losses
            assert all(arrays[name].tobytes() == whole[name].tobytes() for name in whole)
        else:
            assert kept == pytest.approx(losses, rel=1e-4)
            for name, array in arrays.items():
                np.testing.assert_allclose(array, whole[name], rtol=1e-2, atol=1e-4, err_msg=name)
