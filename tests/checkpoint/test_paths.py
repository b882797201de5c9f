"""A path means what it meant when the call was made, and the same on all ranks."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpidist import checkpoint, cli
from mpidist.checkpoint.directory import find, partial
from mpidist.checkpoint.saving import save as saving
from mpidist.checkpoint.tools.exporting import export_to, import_from
from mpidist.checkpoint.tools.pruning import prunable
from mpidist.collectives import barrier, broadcast_object
from mpidist.errors import (
    CheckpointError,
    CollectiveMismatchError,
    DistributedError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from mpidist.train import Checkpoints
from tests.checkpoint.made import save


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Ranks write their files when it is set."""
    opened = threading.Event()
    write = saving.write_file

    def waiting(*args: Any) -> Any:
        assert opened.wait(20), "nobody has opened the gate"
        return write(*args)

    monkeypatch.setattr(saving, "write_file", waiting)
    yield opened
    opened.set()


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two working directories, with a complete step 1 of another run in the second."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    save(second / "run", {"x": np.full(3, 7.0)}, step=1)
    return first, second


@pytest.mark.parametrize("fails", [False, True], ids=["saved", "failed"])
def test_a_save_stays_where_it_began(
    two: tuple[Path, Path],
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    first, second = two
    monkeypatch.chdir(first)
    if fails:
        monkeypatch.setattr("mpidist.checkpoint.saving.save.commit", _no_space)

    def body(group: ProcessGroup) -> None:
        future = checkpoint.save_async("run", {"x": np.zeros(3)}, group, step=1)
        assert future.directory == first / "run" / "step-000001"
        barrier(group)
        if group.rank == 0:
            os.chdir(second)
            gate.set()
        if fails:
            with pytest.raises(CheckpointError, match="No space left"):
                future.wait()
        else:
            assert future.wait().directory == first / "run" / "step-000001"

    run_ranks(2, body)
    assert (checkpoint.load_full(second / "run")["x"] == 7).all()
    assert checkpoint.verify(second / "run") == []
    assert [c.step for c in checkpoint.list(first / "run")] == [1] * (not fails)


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_found_is_read_where_it_was(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    monkeypatch.chdir(second)
    found = [
        checkpoint.latest("run"),
        checkpoint.list("run")[0],
        find("run", 1),
        checkpoint.Checkpoint(Path("run/step-000001")),
    ]
    run_ranks(1, lambda group: found.append(checkpoint.load("run", {"x": np.zeros(3)}, group)))
    (Path("run") / "step-000000").mkdir()
    would = prunable("run", keep=1, stale=-1.0)
    monkeypatch.chdir(first)
    assert [str(one.arrays["x"].dtype) for one in found if one] == ["float64"] * 5
    assert would == [second / "run" / "step-000000"]


def test_the_directory_of_a_run_stays_the_same(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    monkeypatch.chdir(second)

    def body(group: ProcessGroup) -> None:
        kept = Checkpoints("run", group)
        os.chdir(first)
        assert kept.directory == second / "run"
        assert kept.newest() == 1

    run_ranks(1, body)


@pytest.mark.parametrize("completed", [True, False], ids=["complete", "begun"])
def test_a_failed_save_removes_nothing_of_another_run(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, completed: bool
) -> None:
    """Another job has taken the directory for what a killed save has left."""
    step = tmp_path / "step-000001"

    def body(group: ProcessGroup) -> str:
        future = checkpoint.save_async(tmp_path, {"x": np.zeros(3)}, group, step=1)
        shutil.rmtree(step)
        if completed:
            save(tmp_path / "other", {"x": np.full(3, 7.0)}, step=1)
            shutil.move(tmp_path / "other" / "step-000001", step)
        else:
            step.mkdir()
            (step / "manifest.json.tmp").write_text("another id")
        gate.set()
        with pytest.raises(CheckpointError, match="belongs to another save, and was left") as told:
            future.wait()
        return str(told.value)

    # The gate is for the first save only.
    write = saving.write_file
    monkeypatch.setattr(
        saving,
        "write_file",
        lambda path, *args: (write if path.parent == step else _plain)(path, *args),
    )
    (words,) = run_ranks(1, body)
    if completed:
        assert "File exists" in words
        assert checkpoint.verify(tmp_path, step=1) == []
        assert (checkpoint.load_full(tmp_path)["x"] == 7).all()
    else:
        assert "saves the same step there; let each run have a directory of its own" in words
        assert (step / "manifest.json.tmp").read_text() == "another id"


_plain = saving.write_file


def test_two_groups_do_not_save_the_same_step_at_once(
    tmp_path: Path, gate: threading.Event
) -> None:
    def body(group: ProcessGroup) -> None:
        other = group.duplicate("other")
        future = checkpoint.save_async(tmp_path, {"x": np.zeros(3)}, group, step=1)
        with pytest.raises(CheckpointError, match="this step is still under way"):
            checkpoint.save(tmp_path / ".." / tmp_path.name, {"x": np.ones(3)}, other, step=1)
        gate.set()
        future.wait()
        other.close()

    run_ranks(1, body)
    assert (checkpoint.load_full(tmp_path)["x"] == 0).all()


@pytest.mark.ranks(3)
def test_ranks_with_other_working_directories_are_told(
    world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as own:
        top = Path(broadcast_object(own, world)).resolve()
        here = top / ("a" if world.rank == 0 else "b")
        here.mkdir(exist_ok=True)
        barrier(world)
        checkpoint.save(top / "a" / "run", {"x": np.zeros(3)}, world, step=1)
        monkeypatch.chdir(here)
        state = {"x": np.ones(3)}
        calls: dict[str, Callable[[], Any]] = {
            "save": lambda: checkpoint.save("run", state, world, step=2),
            "save_async": lambda: checkpoint.save_async("run", state, world, step=2),
            "load": lambda: checkpoint.load("run", state, world),
            "newest": lambda: Checkpoints("run", world).newest(),
            "discard": lambda: Checkpoints("run", world).discard(),
        }
        words = []
        for call in calls.values():
            with pytest.raises(CollectiveMismatchError, match="absolute path") as caught:
                call()
            assert f"{top}/b/run" in str(caught.value)
            assert f"{top}/a/run" in str(caught.value)
            words.append(str(caught.value))
        with pytest.raises(CollectiveMismatchError, match=r"rank 2 .* has step 3 of"):
            checkpoint.load(top / "a" / "run", state, world, step=1 + world.rank // 2 * 2)
        assert (state["x"] == 1).all()
        assert broadcast_object(words, world) == words
        assert [found.step for found in checkpoint.list(top / "a" / "run")] == [1]
        assert not (top / "b" / "run").exists()
        # The group is usable, and an absolute path is understood.
        assert checkpoint.load(top / "a" / "run", state, world).step == 1
        monkeypatch.chdir("/")
        barrier(world)


URLS = ["s3://bucket/run", Path("s3://bucket/run"), "gs://bucket/run", "file:///tmp/run"]


@pytest.mark.parametrize("url", URLS, ids=repr)
def test_a_url_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any) -> None:
    monkeypatch.chdir(tmp_path)
    found = save(tmp_path / "run", {"x": np.zeros(3)})

    def body(group: ProcessGroup) -> list[str]:
        calls: list[Callable[[], Any]] = [
            lambda: checkpoint.save(url, {}, group, step=1),
            lambda: checkpoint.save_async(url, {}, group, step=1),
            lambda: checkpoint.load(url, {}, group),
            lambda: checkpoint.load_full(url),
            lambda: checkpoint.list(url),
            lambda: checkpoint.latest(url),
            lambda: checkpoint.prune(url, keep=1),
            lambda: checkpoint.verify(url),
            lambda: checkpoint.reshard(tmp_path / "run", url, 2),
            lambda: checkpoint.reshard(url, tmp_path / "new", 2),
            lambda: Checkpoints(url, group),
            lambda: partial(url),
            lambda: export_to(Path(f"{url}.npz"), found),
            lambda: import_from(Path(f"{url}.npz"), tmp_path / "new", step=1),
        ]
        told = []
        for call in calls:
            with pytest.raises(UnsupportedOperationError, match="is a URL, and checkpoints") as e:
                call()
            told.append(str(e.value))
        return told

    assert len(set(map(tuple, run_ranks(2, body)))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("action", ["list", "show", "verify", "prune", "diff"])
def test_tools_refuse_a_url_in_a_line(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"prune": ["--keep", "1"], "diff": ["gs://b/run"]}.get(action, [])
    assert cli.main(["checkpoint", action, "s3://bucket/run", *more]) == 2
    told = capsys.readouterr().err
    assert "is a URL" in told
    assert told.count("\n") == 1


def test_a_directory_may_have_a_name_like_that(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("./x:"), {"x": np.zeros(3)})
    run_ranks(1, lambda group: checkpoint.save("./s3:/run", {}, group, step=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s3:", "x:"]


def test_a_working_directory_that_is_gone_is_told_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    def body(group: ProcessGroup) -> list[str]:
        told = []
        for call in (checkpoint.save, checkpoint.load):
            with pytest.raises(DistributedError, match="working directory of this process") as e:
                call("run", {}, group, step=1)
            told.append(str(e.value))
        return told

    assert len(set(map(tuple, run_ranks(2, body)))) == 1


def test_what_is_wrong_with_one_rank_only_is_told_to_all(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> str:
        step = -1 if group.rank == 1 else 1
        with pytest.raises(
            UnsupportedOperationError, match="rank 1: a step is a whole number"
        ) as e:
            checkpoint.save(tmp_path, {}, group, step=step)
        return str(e.value)

    assert len(set(run_ranks(3, body, timeout=10.0))) == 1
