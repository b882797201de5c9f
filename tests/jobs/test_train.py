"""jobs/train.py as people run it: another process, a command line, files, an exit code."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.jobs.running import SCRIPT, Run, Start, read_records

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SHORT = ["--steps", "12", "--log-every", "5", "--no-progress"]


def test_help_names_every_option_and_loads_no_numpy(run: Run) -> None:
    ended = run("--help")
    assert ended.returncode == 0
    for option in (
        *("--task", "--epochs", "--steps", "--batch-size", "--optimizer", "--lr", "--seed"),
        *(
            "--device",
            "--strategy",
            "--sharded-optimizer",
            "--mesh",
            "--units",
            "--compression",
            "--log-every",
            "--checkpoint-dir",
            "--checkpoint-every",
            "--keep",
            "--overwrite",
            "--resume",
            "--out",
            "--no-progress",
            "--no-plot",
        ),
    ):
        assert option in ended.stdout
    assert "`" not in ended.stdout
    lines = "import sys, train; train.parser().format_help(); assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", lines], cwd=SCRIPT.parent, check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "0"), "--steps: must be above 0, got 0"),
        (("--lr", "nan"), "--lr: must be above 0, got nan"),
        (("--epochs", "x"), "--epochs: invalid float value: 'x'"),
        (("--seed", "1.5"), "--seed: invalid int value: '1.5'"),
        (
            ("--units", "9", "--strategy", "zero"),
            "--units goes with the strategies of FSDP, not with",
        ),
        (("--seed", "-1"), "--seed: must not be negative, got -1"),
        (("--steps", "1", "--epochs", "1"), "not allowed with argument"),
        (("--task", "speech"), "invalid choice: 'speech'"),
        (
            ("--compression", "bf16", "--strategy", "full_shard"),
            "--compression goes with --strategy ddp or zero, not with full_shard",
        ),
        (
            ("--mesh", "replicate=2,shard=-1"),
            "--mesh replicate=N,shard=M goes with --strategy hybrid_shard, not with ddp",
        ),
        *(
            (
                ("--mesh", text),
                f"for both, as in replicate=2,shard=-1 or dp=2,pp=-1; got '{text}'",
            )
            for text in ("2", "replicate=2", "replicate=2,shard=x", "dp=2,tp=2", "shard=1,shard=2")
        ),
        (("--out", str(SCRIPT)), f"cannot write {SCRIPT}: it is a file; 512 KiB needed"),
    ],
)
def test_bad_arguments(run: Run, arguments: tuple[str, ...], said: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert said in ended.stdout
    assert "Traceback" not in ended.stdout


def test_digits_on_one_rank(run: Run, tmp_path: Path) -> None:
    ended = run(*SHORT, "--out", "a/b", "--seed", "5")
    assert ended.returncode == 0, ended.stdout
    assert "1,617 samples to learn from and 180 held out" in ended.stdout
    assert "held-out accuracy" in ended.stdout
    assert (tmp_path / "a/b/loss.png").read_bytes().startswith(b"\x89PNG")
    header, *records = read_records(tmp_path / "a/b/metrics.jsonl")
    assert (header["kind"], header["ranks"], header["seed"], header["steps"]) == ("run", 1, 5, 12)
    training = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in training] == [5, 10, 12]
    assert all(record["samples_per_second"] > 0 and record["lr"] >= 0 for record in training)
    assert (records[-1]["kind"], records[-1]["step"]) == ("held-out", 12)
    assert records[-1]["loss"] < 2.3


@pytest.mark.parametrize(
    "options",
    [
        ("--optimizer", "sgd", "--no-plot"),
        ("--optimizer", "adam", "--no-plot"),
        ("--compression", "fp16", "--no-plot"),
        ("--compression", "bf16", "--lr", "0.001", "--batch-size", "100", "--no-plot"),
    ],
)
def test_options_are_heard(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    ended = run(*SHORT, *options)
    assert ended.returncode == 0, ended.stdout
    assert sorted(p.name for p in (tmp_path / "runs/digits").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
    ]
    header = read_records(tmp_path / "runs/digits/metrics.jsonl")[0]
    given = dict(zip(options[::2], options[1::2], strict=False))
    for name in ("optimizer", "compression"):
        if f"--{name}" in given:
            assert header[name] == given[f"--{name}"]


@pytest.mark.one_python
def test_text_learns_more_than_how_frequent_each_byte_is(run: Run, tmp_path: Path) -> None:
    ended = run("--task", "text", "--steps", "60", "--no-plot")
    assert ended.returncode == 0, ended.stdout
    assert "unigram entropy: 3." in ended.stdout
    assert "text: 100%" in ended.stdout  # the progress bar
    records = read_records(tmp_path / "runs/text/metrics.jsonl")
    assert records[-1]["loss"] < 3.0


def test_ctrl_c_on_one_rank_says_where_it_stopped(start: Start, tmp_path: Path) -> None:
    process = start("--epochs", "10000", "--no-progress")
    file = tmp_path / "runs/digits/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().count("\n") > 2):
        assert process.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    output = (tmp_path / "output").read_text()
    assert "interrupted after step" in output
    assert "Traceback" not in output
    assert read_records(file)[-1]["step"] > 0  # no line is cut off


IN_A_TERMINAL = """
import os, signal, sys
terminal = os.open(sys.argv[1], os.O_RDWR)  # that of this session from now on
os.dup2(terminal, 1)
os.dup2(terminal, 2)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_run_is_not_lost_with_its_terminal(start: Start, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = start(
        *("--steps", "100000", "--log-every", "1", "--no-plot"),
        launcher=(sys.executable, "-c", IN_A_TERMINAL, os.ttyname(theirs)),
    )
    shown, deadline = b"", time.monotonic() + 60
    while b"loss=" not in shown:  # the bar, which is drawn again and again
        assert process.poll() is None, shown.decode()
        assert time.monotonic() < deadline, shown.decode()
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert process.wait(timeout=30) == 75
    last = read_records(tmp_path / "runs/digits/metrics.jsonl")[-1]["step"]
    kept = tmp_path / f"runs/digits/checkpoints/step-{last:06d}/manifest.json"
    assert kept.exists()


ON_A_DISK_THAT_BECOMES_FULL = """
import errno, os, runpy, sys
from pathlib import Path
from mpidist.train import MetricsFile
write, count = MetricsFile.write, 0
def write_some(self, values):
    global count
    count += 1
    if count > 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    write(self, values)
MetricsFile.write = write_some
del sys.argv[:2]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_is_not_lost_when_its_records_cannot_be_written(run: Run, tmp_path: Path) -> None:
    ended = run(
        *("--steps", "100", "--log-every", "5", "--no-progress", "--no-plot"),
        launcher=(sys.executable, "-c", ON_A_DISK_THAT_BECOMES_FULL),
    )
    assert ended.returncode == 75, ended.stdout
    told = "train.py: error: cannot write metrics.jsonl: No space left on device; the run is saved"
    assert ended.stdout.count(told) == 1
    assert "after step 11 of 100; --resume goes on" in ended.stdout
    assert (tmp_path / "runs/digits/checkpoints/step-000011/manifest.json").exists()


def check_diverged(ended: subprocess.CompletedProcess[str], file: Path) -> None:
    assert ended.returncode == 1, ended.stdout
    assert ended.stdout.count("error: the ") == 1
    assert re.search(r"error: the .* is (nan|inf) after step \d+: .*; the records", ended.stdout)
    assert "Traceback" not in ended.stdout
    assert "held-out accuracy" not in ended.stdout
    lines = file.read_text()
    assert json.loads(lines.splitlines()[0])["kind"] == "run"
    assert "NaN" not in lines
    assert "Infinity" not in lines


def test_training_that_diverges_ends_with_an_error(run: Run, tmp_path: Path) -> None:
    check_diverged(run(*SHORT, "--lr", "1e30"), tmp_path / "runs/digits/metrics.jsonl")


@pytest.mark.mpirun
def test_all_ranks_end_when_training_diverges(run: Run, mpirun: list[str], tmp_path: Path) -> None:
    ended = run(*SHORT, "--lr", "1e30", launcher=(*mpirun, "-n", "3"))
    check_diverged(ended, tmp_path / "runs/digits/metrics.jsonl")


def test_what_draws_may_be_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tqdm", "matplotlib"):
        lines = f"raise ModuleNotFoundError(\"No module named '{module}'\")"
        (tmp_path / f"{module}.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = run("--steps", "3")
    assert ended.returncode == 0, ended.stdout
    first, second, *_ = ended.stdout.splitlines()  # before the training
    assert first.startswith("no progress bar: No module named 'tqdm'; to get it: pip install")
    assert second.startswith("no picture: No module named 'matplotlib'; to get it: pip install")
    assert read_records(tmp_path / "runs/digits/metrics.jsonl")[-1]["step"] == 3
    assert not (tmp_path / "runs/digits/loss.png").exists()
    assert run("--steps", "3", "--no-progress", "--no-plot", "--overwrite").stdout.startswith(
        "digits: "
    )


@pytest.mark.alone
@pytest.mark.mpirun
def test_four_ranks_reach_the_promised_accuracy(
    run: Run, mpirun: list[str], tmp_path: Path
) -> None:
    ended = run("--no-progress", launcher=(*mpirun, "-n", "4"))
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("held-out accuracy") == 1
    header, *records = read_records(tmp_path / "runs/digits/metrics.jsonl")
    assert header["ranks"] == 4
    assert records[-1]["accuracy"] >= 0.97


@pytest.mark.any_mpi
@pytest.mark.mpirun
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.full), 3])
def test_curve_is_the_same_on_any_number_of_ranks(
    run: Run, mpirun: list[str], tmp_path: Path, size: int
) -> None:
    for out, launcher in (("one", ()), ("many", (*mpirun, "-n", str(size)))):
        ended = run(*SHORT, "--no-plot", "--out", out, launcher=launcher)
        assert ended.returncode == 0, ended.stdout
    one, many = (read_records(tmp_path / out / "metrics.jsonl") for out in ("one", "many"))
    assert (one[0]["ranks"], many[0]["ranks"]) == (1, size)
    for mine, theirs in zip(many[1:], one[1:], strict=True):
        # Dropout is on: equal curves also mean that the same elements were dropped.
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.01)


@pytest.mark.any_mpi
@pytest.mark.mpirun
def test_strategies_have_one_curve(run: Run, mpirun: list[str], tmp_path: Path, full: bool) -> None:
    others = (
        "zero",
        "full_shard",
        *(("shard_grad_op", "hybrid_shard", "no_shard") if full else ()),
    )
    for strategy in ("ddp", *others):
        options = ("--strategy", strategy, "--no-plot", "--out", strategy)
        ended = run(*SHORT, *options, launcher=(*mpirun, "-n", "3"))
        assert ended.returncode == 0, ended.stdout
    whole = read_records(tmp_path / "ddp/metrics.jsonl")
    for strategy in others:
        sharded = read_records(tmp_path / strategy / "metrics.jsonl")
        assert sharded[0]["strategy"] == strategy
        # With the optimizer's state alone sharded, gradients are whole, and no bit changes.
        close = 0 if strategy == "zero" else 1e-6
        for mine, theirs in zip(sharded[1:], whole[1:], strict=True):
            assert mine["kind"] == theirs["kind"]
            for key in ("step", "loss", "accuracy"):
                assert mine[key] == pytest.approx(theirs[key], rel=close, abs=0), key
