from __future__ import annotations

import os
import shutil
import threading
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.checkpoint import directory
from mpidist.checkpoint.directory import find, partial, remove, step_directory, step_of
from mpidist.checkpoint.saving import save as saving
from mpidist.checkpoint.tools.pruning import prunable
from mpidist.collectives import barrier
from mpidist.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from mpidist.testing import run_ranks


def saved(path, *steps):
    def body(group):
        for step in steps:
            checkpoint.save(path, {"x": np.full(4, step)}, group, step=step)

    run_ranks(1, body)


def left_by_a_kill(path, step, *, age=0.0):
    """A directory without a manifest, last changed some seconds ago."""
    directory = step_directory(path, step)
    directory.mkdir(parents=True)
    file = directory / "rank-00000.h5.tmp"
    file.write_bytes(b"part")
    then = time.time() - age
    for entry in (file, directory):
        os.utime(entry, (then, then))
    return directory


def steps(path):
    return [found.step for found in checkpoint.list(path)]


def find_newest(path):
    return find(path, "latest")


def prune(path):
    return checkpoint.prune(path, keep=1)


def test_steps_and_directories(tmp_path):
    for step in (0, 5, 999_999, 1_000_000, 10**12):
        assert step_of(step_directory(tmp_path, step)) == step
    for name in ("step-5", "step-00000x", "step-0000050 ", "astep-000005", "step--00005"):
        with pytest.raises(ValueError, match="not the directory of a step"):
            step_of(tmp_path / name)


def test_what_is_complete_is_listed_by_step(tmp_path):
    assert checkpoint.list(tmp_path / "nowhere") == []
    assert checkpoint.latest(tmp_path) is None
    saved(tmp_path, 20, 3, 1_000_000, 100)
    left_by_a_kill(tmp_path, 2_000_000)
    (tmp_path / "step-000007").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == [3, 20, 100, 1_000_000]
    assert checkpoint.latest(str(tmp_path)).step == 1_000_000
    assert find(tmp_path, "latest") == checkpoint.latest(tmp_path)
    assert find(tmp_path, 20).directory == tmp_path / "step-000020"


def test_what_is_not_there_is_told_with_what_is(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no such directory"):
        find(tmp_path / "nowhere", "latest")
    with pytest.raises(CheckpointNotFoundError, match="complete are: none"):
        find(tmp_path, "latest")
    saved(tmp_path, 1, 2)
    left_by_a_kill(tmp_path, 3)
    with pytest.raises(CheckpointNotFoundError, match=r"of step 3 in .*; complete are: 1, 2"):
        find(tmp_path, 3)
    with pytest.raises(
        CheckpointNotFoundError, match=r"a step is a whole number .* got 'newest'; or give 'latest'"
    ):
        find(tmp_path, "newest")
    with pytest.raises(CheckpointNotFoundError, match=r"a step is a whole number .* got 2\.0"):
        find(tmp_path, 2.0)
    assert find(tmp_path, np.int64(2)).step == 2


def test_a_checkpoint_reads_its_manifest_when_asked(tmp_path):
    saved(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    path = found.directory / "manifest.json"
    path.write_bytes(path.read_bytes()[:-5])
    assert found.step == 1
    with pytest.raises(CheckpointCorruptError):
        _ = found.world_size
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match="no complete checkpoint"):
        _ = found.world_size


def test_prune_keeps_the_newest(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    removed = checkpoint.prune(tmp_path, keep=2)
    assert [step_of(directory) for directory in removed] == [1, 2]
    assert steps(tmp_path) == [3, 4]
    assert checkpoint.prune(tmp_path, keep=5) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def cut_off(directory):
    file = directory / "rank-00000.h5"
    os.truncate(file, file.stat().st_size - 1)


def edited(directory):
    file = directory / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"world_size", b"world_sizf"))


def without_a_file(directory):
    (directory / "rank-00000.h5").unlink()


def with_a_directory(directory):
    without_a_file(directory)
    (directory / "rank-00000.h5").mkdir()


@pytest.mark.parametrize("damage", [cut_off, edited, without_a_file, with_a_directory])
def test_prune_does_not_count_what_is_damaged(tmp_path, damage):
    saved(tmp_path, 1, 2, 3)
    damage(step_directory(tmp_path, 3))
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=1)] == [1]
    assert checkpoint.load_full(tmp_path, step=2)["x"].tolist() == [2] * 4
    assert prunable(tmp_path, keep=2) == []
    saved(tmp_path, 4)
    saved(tmp_path, 5)
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=2)] == [2, 3]
    assert steps(tmp_path) == [4, 5]


def test_prune_goes_by_the_time_of_the_save(tmp_path):
    """A run that has gone back to step 80, saves 84 and 88."""
    saved(tmp_path, 80, 90, 100)
    saved(tmp_path, 84, 88)
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=3)] == [80, 90]
    assert steps(tmp_path) == [84, 88, 100]
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=2)] == [100]


def test_prune_keeps_what_this_process_saved_last(tmp_path, monkeypatch):
    """Also where the clocks of two hosts differ."""
    saved(tmp_path, 90, 100)
    with monkeypatch.context() as patch:
        past = SimpleNamespace(now=lambda zone: datetime.now(zone) - timedelta(hours=2))
        patch.setattr("mpidist.checkpoint.saving.plan.datetime", past)
        saved(tmp_path, 84)
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    assert [step_of(gone) for gone in checkpoint.prune(link, keep=1)] == [90]
    assert steps(tmp_path) == [84, 100]


@pytest.mark.parametrize("asker", [0, 1])
def test_prune_leaves_what_is_being_written(tmp_path, monkeypatch, asker):
    opened = threading.Event()
    write = saving.write_file

    def waiting(*args):
        assert opened.wait(20)
        return write(*args)

    def body(group):
        checkpoint.save(tmp_path, {"x": np.zeros(3)}, group, step=100)
        monkeypatch.setattr(saving, "write_file", waiting)
        barrier(group)
        future = checkpoint.save_async(tmp_path, {"x": np.ones(3)}, group, step=84)
        try:
            if group.rank == asker:
                assert checkpoint.prune(tmp_path, keep=1, stale=-1.0) == []
        finally:
            barrier(group)
            opened.set()
        assert future.wait().step == 84
        if group.rank == asker:
            left_by_a_kill(tmp_path, 70)
            gone = checkpoint.prune(tmp_path, keep=1, stale=-1.0)
            assert [step_of(directory) for directory in gone] == [70, 100]

    run_ranks(2, body)
    assert steps(tmp_path) == [84]


def test_prune_reads_a_manifest_once(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2, 3)
    read = []
    original = directory.manifest_of
    monkeypatch.setattr(
        directory, "manifest_of", lambda *args: read.append(args[0].name) or original(*args)
    )
    for _ in range(3):
        checkpoint.prune(tmp_path, keep=2)
    assert sorted(read) == ["step-000001", "step-000002", "step-000003"]


def test_prune_leaves_what_a_later_mpidist_has_written(tmp_path):
    saved(tmp_path, 1)
    path = step_directory(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"version":1', '"version":9'))
    saved(tmp_path, 2, 3)
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=1)] == [2]
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_stays(tmp_path, keep):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.prune(tmp_path, keep=keep)
    assert steps(tmp_path) == [1]


def test_prune_cleans_up_after_kills_but_not_after_the_living(tmp_path):
    saved(tmp_path, 5)
    going_back = left_by_a_kill(tmp_path, 4)  # another job may have gone back to step 3
    old = left_by_a_kill(tmp_path, 6, age=7200)
    fresh = left_by_a_kill(tmp_path, 7)
    moving = left_by_a_kill(tmp_path, 8, age=7200)
    (moving / "rank-00000.h5.tmp").touch()
    assert checkpoint.prune(tmp_path, keep=1) == [old]
    assert fresh.exists()
    assert moving.exists()
    assert checkpoint.prune(tmp_path, keep=1, stale=0.0) == [going_back, fresh, moving]
    assert steps(tmp_path) == [5]


def test_prune_without_any_complete_one(tmp_path):
    left_by_a_kill(tmp_path, 0)
    assert checkpoint.prune(tmp_path, keep=1) == []
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=1, stale=-1.0)] == [0]
    assert checkpoint.prune(tmp_path / "nowhere", keep=1) == []


@pytest.mark.parametrize("call", [checkpoint.list, checkpoint.latest, partial, find_newest, prune])
def test_what_cannot_be_seen_is_not_taken_for_absent(tmp_path, monkeypatch, call):
    saved(tmp_path, 1, 2)

    def unseen(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", unseen)
    with pytest.raises(CheckpointError, match="cannot be read: PermissionError"):
        call(tmp_path)


def test_prune_says_in_one_way_what_it_cannot_look_at(tmp_path, monkeypatch):
    left_by_a_kill(tmp_path, 1)

    def unseen(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mpidist.checkpoint.tools.pruning._age", unseen)
    with pytest.raises(CheckpointError, match="cannot be read: PermissionError"):
        prune(tmp_path)


def test_of_a_link_only_the_link_is_removed(tmp_path):
    kept, run = tmp_path / "kept", tmp_path / "run"
    saved(kept, 1)
    saved(run, 2)
    (run / "step-000001").symlink_to(kept / "step-000001")
    assert steps(run) == [1, 2]
    assert [step_of(gone) for gone in checkpoint.prune(run, keep=1)] == [1]
    assert steps(run) == [2]
    assert checkpoint.verify(kept, step=1) == []


def test_what_is_removed_is_no_checkpoint_from_the_first_moment(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)

    def killed(directory, *_, **__):
        raise OSError("killed here")

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(CheckpointError, match="killed here"):
        remove(tmp_path / "step-000001")
    assert steps(tmp_path) == [2]
    monkeypatch.undo()
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=1, stale=0.0)] == [1]


def test_each_step_has_one_name(tmp_path):
    """Other directories are not of a step, and stay."""
    run_ranks(1, lambda group: checkpoint.save(tmp_path, {}, group, step=1))
    others = [
        "step-0000001",
        "step-00001",
        "step-\u0660\u0660\u0660\u0660\u0660\u0661",
        f"step-{2**63}",
        "step-" + "9" * 200,
    ]
    for name in others:
        shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    assert [found.directory.name for found in checkpoint.list(tmp_path)] == ["step-000001"]
    assert checkpoint.prune(tmp_path, keep=1) == []
    for name in others:
        with pytest.raises(ValueError, match="is not the directory of a step"):
            step_of(tmp_path / name)
