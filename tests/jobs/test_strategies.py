"""train.py --strategy and --mesh: one curve, one kind of checkpoint, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpidist.testing import run_ranks
from mpidist.train import StopSignal
from tests.jobs.running import read_arrays, read_records

SHARES = {
    "ddp": (1, 1, 1),
    "zero": (2, 1, 2),
    "shard_grad_op": (2, 2, 2),
    "full_shard": (2, 2, 2),
    "hybrid_shard": (2, 2, 2),
    "no_shard": (1, 1, 1),
}
"""Over how many of two ranks of a node parameters, gradients and state are split."""

STRATEGIES = tuple(SHARES)
OFTEN = ("zero", "full_shard", "hybrid_shard")  # each is followed by the next of these
DIGITS_KIB = 38_282 * 4 / 1024

Train = Callable[..., list[int]]


@pytest.fixture
def train(job: SimpleNamespace) -> Train:
    """Run train.py on threads that are ranks of one node; return their exit codes."""

    def run(
        out: Path, strategy: str, *options: str, ranks: int, ranks_per_node: int | None = None
    ) -> list[int]:
        parsed = job.train.parser().parse_args(
            ["--no-progress", "--no-plot", "--out", str(out), "--strategy", strategy, *options]
        )
        parsed.checkpoint_dir = out / "checkpoints"
        return run_ranks(
            ranks,
            lambda world: job.train.run_on(world, parsed, StopSignal()),
            node_memory=True,
            ranks_per_node=ranks_per_node,
        )

    return run


def losses(out: Path) -> list[tuple[int, str, float]]:
    records = read_records(out / "metrics.jsonl")
    return [(r["step"], r["kind"], r["loss"]) for r in records if "loss" in r]


@pytest.mark.parametrize(
    "first", [pytest.param(s, marks=() if s in OFTEN else pytest.mark.full) for s in STRATEGIES]
)
def test_a_strategy_holds_its_share_and_another_one_goes_on(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], full: bool, first: str
) -> None:
    options = ("--steps", "4", "--log-every", "1", "--checkpoint-every", "2")
    assert train(tmp_path / "whole", first, *options, ranks=2) == [0, 0]
    assert ledger(capsys.readouterr().out) == pytest.approx(
        [
            DIGITS_KIB / SHARES[first][0],
            DIGITS_KIB / SHARES[first][1],
            2 * DIGITS_KIB / SHARES[first][2],
        ],
        rel=0.02,
    )
    expected = losses(tmp_path / "whole")
    arrays = read_arrays(tmp_path / "whole/checkpoints")
    following = OFTEN[(OFTEN.index(first) + 1) % len(OFTEN)] if first in OFTEN else "ddp"
    for second in STRATEGIES if full else (following,):
        out = tmp_path / second
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "checkpoints/step-000004")
        assert train(out, second, *options, "--resume", ranks=2) == [0, 0]
        header, resumed = (r for r in read_records(out / "metrics.jsonl") if "strategy" in r)
        assert (header["strategy"], resumed["strategy"], resumed["step"]) == (first, second, 2)
        got = losses(out)
        assert [record[:2] for record in got] == [record[:2] for record in expected]
        assert [record[2] for record in got] == pytest.approx(
            [record[2] for record in expected], rel=1e-6
        )
        # A DDP has the order of its buckets besides.
        kept = {n for n in read_arrays(out / "checkpoints") if "buckets" not in n}
        assert kept == {name for name in arrays if "buckets" not in name}


def ledger(said: str) -> list[float]:
    """Return what a rank holds, as train.py prints it: parameters, gradients, state, in KiB."""
    (table,) = re.findall(r"^KiB +this rank +its node\n((?:.+\n){7})", said, re.MULTILINE)
    rows = [line.rsplit(maxsplit=2) for line in table.splitlines()]
    assert [name for name, *_ in rows[:3]] == ["parameters", "gradients", "optimizer state"]
    return [float(rank) for _, rank, _ in rows[:3]]


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
    assert train(tmp_path / "out", "hybrid_shard", "--mesh", mesh, ranks=4) == [2] * 4
    error = capsys.readouterr().err
    assert error.count("train.py: error: --strategy hybrid_shard: DeviceMesh on group") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_mesh_goes_by_the_names_of_its_dimensions(train: Train, tmp_path: Path) -> None:
    options = ("--steps", "2", "--log-every", "1")
    for out, mesh in (("rows", "replicate=1,shard=4"), ("columns", "shard=2,replicate=2")):
        assert train(tmp_path / out, "hybrid_shard", "--mesh", mesh, *options, ranks=4) == [0] * 4
    header = read_records(tmp_path / "columns/metrics.jsonl")[0]
    assert header["mesh"] == {"shard": 2, "replicate": 2}
    rows, columns = losses(tmp_path / "rows"), losses(tmp_path / "columns")
    assert [loss for *_, loss in columns] == pytest.approx([loss for *_, loss in rows], rel=1e-6)


def test_over_two_nodes_the_curve_is_the_same(train: Train, tmp_path: Path) -> None:
    options = ("--steps", "3", "--log-every", "1")
    assert train(tmp_path / "ddp", "ddp", *options, ranks=3, ranks_per_node=2) == [0] * 3
    expected = [loss for *_, loss in losses(tmp_path / "ddp")]
    for strategy in ("shard_grad_op", "full_shard"):  # units of less than a layer: gathered
        out, units = tmp_path / strategy, ("--units", "70000")
        assert train(out, strategy, *options, *units, ranks=3, ranks_per_node=2) == [0] * 3
        assert [loss for *_, loss in losses(out)] == pytest.approx(expected, rel=1e-6)


# -- pipelines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "schedule", "following"),
    [
        ("full_shard", "zb-h1", "ddp"),
        pytest.param("ddp", "zbv", "zero", marks=pytest.mark.full),
        pytest.param("zero", "gpipe", "full_shard", marks=pytest.mark.full),
    ],
)
def test_pipelines_have_the_curve_of_one_process_and_their_checkpoints_go_on(
    train: Train, tmp_path: Path, strategy: str, schedule: str, following: str
) -> None:
    common = ("--steps=4", "--log-every=1", "--checkpoint-every=2")
    assert train(tmp_path / "one", "ddp", *common, ranks=1) == [0]
    expected = losses(tmp_path / "one")
    assert len(expected) == 6  # four steps, and two evaluations

    piped = (*common, "--mesh=dp=2,pp=2", f"--schedule={schedule}", "--micro-batches=4")
    assert train(tmp_path / "piped", strategy, *piped, ranks=4) == [0] * 4
    assert_same_curve(losses(tmp_path / "piped"), expected)
    records = read_records(tmp_path / "piped/metrics.jsonl")
    assert [records[0][name] for name in ("mesh", "schedule")] == [{"dp": 2, "pp": 2}, schedule]
    accuracy = [r["accuracy"] for r in records if "accuracy" in r]
    one = [r["accuracy"] for r in read_records(tmp_path / "one/metrics.jsonl") if "accuracy" in r]
    assert accuracy == pytest.approx(one, abs=0.01)

    # On three stages without a data axis, by another strategy; and on one rank.
    for name, ranks, options in (
        ("three", 3, (following, *common, "--mesh=dp=1,pp=-1")),
        ("alone", 1, ("ddp", *common)),
    ):
        shutil.copytree(tmp_path / "piped", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step-000004")
        assert train(tmp_path / name, *options, "--resume", ranks=ranks) == [0] * ranks
        assert_same_curve(losses(tmp_path / name), expected)


def assert_same_curve(
    got: list[tuple[int, str, float]], expected: list[tuple[int, str, float]]
) -> None:
    assert [record[:2] for record in got] == [record[:2] for record in expected]
    assert [record[2] for record in got] == pytest.approx([r[2] for r in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mesh=dp=2,pp=2", "--device=gpu"], "pipelines carry host arrays only"),
        (["--schedule=1f1b"], "--schedule and --micro-batches go with --mesh dp=N,pp=M"),
        (["--mesh=replicate=2,shard=2"], "goes with --strategy hybrid_shard, not with ddp"),
        (["--mesh=dp=2,shard=2"], "as in replicate=2,shard=-1 or dp=2,pp=-1; got 'dp=2,shard=2'"),
        (
            ["--mesh=dp=1,pp=2", "--schedule=zbv", "--strategy=zero"],
            "--schedule zbv, of two stages per rank, goes with --strategy ddp, not with zero",
        ),
    ],
)
def test_options_of_meshes_that_do_not_go_together_are_refused(
    job: SimpleNamespace, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        job.train.main(options)
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_pipeline_that_does_not_fit_is_refused_and_nothing_is_written(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--mesh=dp=1,pp=2", "--schedule=interleaved", "--micro-batches=3")
    assert train(tmp_path / "out", "ddp", *options, ranks=2) == [2] * 2
    assert "micro-batches" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
