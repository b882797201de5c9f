"""train.py --strategy and --mesh: one curve, one kind of checkpoint, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpidist.testing import run_ranks
from mpidist.train import StopSignal
from tests.jobs.running import read_arrays, read_records

SHARDED = ("zero", "shard_grad_op", "full_shard", "hybrid_shard", "no_shard")
STRATEGIES = ("ddp", *SHARDED)

Train = Callable[..., list[int]]


@pytest.fixture
def train(job: SimpleNamespace) -> Train:
    """Run train.py on threads that are ranks of one node; return their exit codes."""

    def run(out: Path, strategy: str, *options: str, ranks: int = 4) -> list[int]:
        if strategy == "hybrid_shard" and "--mesh" not in options:
            options += ("--mesh", "replicate=2,shard=-1")
        parsed = job.train.parser().parse_args(
            ["--no-progress", "--no-plot", "--out", str(out), "--strategy", strategy, *options]
        )
        parsed.checkpoint_dir = out / "checkpoints"
        return run_ranks(
            ranks,
            lambda world: job.train.run_on(world, parsed, StopSignal()),
            node_memory=True,
        )

    return run


def losses(out: Path) -> list[tuple[int, str, float]]:
    records = read_records(out / "metrics.jsonl")
    return [(r["step"], r["kind"], r["loss"]) for r in records if "loss" in r]


@pytest.mark.parametrize("first", STRATEGIES)
def test_a_run_goes_on_under_another_strategy(
    train: Train, tmp_path: Path, full: bool, first: str
) -> None:
    options = ("--steps", "4", "--log-every", "1", "--checkpoint-every", "2")
    assert train(tmp_path / "whole", first, *options) == [0] * 4
    expected = losses(tmp_path / "whole")
    arrays = read_arrays(tmp_path / "whole/checkpoints")
    following = STRATEGIES[(STRATEGIES.index(first) + 1) % len(STRATEGIES)]
    for second in STRATEGIES if full else (following,):
        out = tmp_path / second
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "checkpoints/step-000004")
        assert train(out, second, *options, "--resume") == [0] * 4
        header, *_, resumed = (
            r for r in read_records(out / "metrics.jsonl") if r["kind"] in ("run", "resume")
        )
        assert (header["strategy"], resumed["strategy"], resumed["step"]) == (first, second, 2)
        got = losses(out)
        assert [record[:2] for record in got] == [record[:2] for record in expected]
        assert [record[2] for record in got] == pytest.approx(
            [record[2] for record in expected], rel=1e-6
        )
        # A DDP has the order of its buckets besides.
        kept = {n for n in read_arrays(out / "checkpoints") if "buckets" not in n}
        assert kept == {name for name in arrays if "buckets" not in name}


def test_the_ledger_shows_what_a_strategy_saves(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {}
    for strategy in STRATEGIES:
        assert train(tmp_path / strategy, strategy, "--steps", "1") == [0] * 4
        said = capsys.readouterr().out
        assert said.count("\nall data (PSS)") == 1
        assert "\nKiB " in said
        rows = [line.rsplit(maxsplit=2) for line in said.splitlines()]
        held[strategy] = {
            name: float(rank.replace(",", ""))
            for name, rank, _ in (row for row in rows if len(row) == 3)
            if name in ("parameters", "gradients", "optimizer state")
        }
    whole = 38_282 * 4 / 1024
    four = {"parameters": whole, "gradients": whole, "optimizer state": 2 * whole}
    shares = {
        "ddp": (1, 1, 1),
        "zero": (4, 1, 4),
        "shard_grad_op": (4, 4, 4),
        "full_shard": (4, 4, 4),
        "hybrid_shard": (2, 2, 2),  # each of two replicas has all, on two ranks
        "no_shard": (1, 1, 1),
    }
    for strategy, by in shares.items():
        expected = {name: four[name] / share for name, share in zip(four, by, strict=True)}
        assert held[strategy] == pytest.approx(expected, rel=0.02), strategy


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("replicate=2,shard=3", "the group has 4 ranks. Expected 6 ranks for replicate=2, shard=3"),
        ("replicate=3,shard=-1", "the group has 4 ranks. Expected"),
        ("replicate=-1,shard=-1", "of which one may be -1 (what is left); got replicate=-1"),
        ("shard=4,replicate=0", "at least 1, of which one may be -1 (what is left); got shard=4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_and_nothing_is_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], mesh: str, said: str
) -> None:
    assert train(tmp_path / "out", "hybrid_shard", "--mesh", mesh) == [2] * 4
    error = capsys.readouterr().err
    assert error.count("train.py: error: --strategy hybrid_shard: DeviceMesh on group") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_mesh_goes_by_the_names_of_its_dimensions(train: Train, tmp_path: Path) -> None:
    options = ("--steps", "2", "--log-every", "1")
    for out, mesh in (("rows", "replicate=1,shard=4"), ("columns", "shard=2,replicate=2")):
        assert train(tmp_path / out, "hybrid_shard", "--mesh", mesh, *options) == [0] * 4
    header = read_records(tmp_path / "columns/metrics.jsonl")[0]
    assert header["mesh"] == {"shard": 2, "replicate": 2}
    rows, columns = losses(tmp_path / "rows"), losses(tmp_path / "columns")
    assert [loss for *_, loss in columns] == pytest.approx([loss for *_, loss in rows], rel=1e-6)
