from __future__ import annotations

import os
import time

import numpy as np
import pytest

from mpidist import checkpoint
from mpidist.checkpoint.directory import find, partial, remove, step_directory, step_of
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
    with pytest.raises(CheckpointNotFoundError, match="a number, or 'latest'; got 'newest'"):
        find(tmp_path, "newest")
    with pytest.raises(CheckpointNotFoundError, match=r"a number, or 'latest'; got 2\.0"):
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


@pytest.mark.parametrize("keep", [0, -1])
def test_at_least_one_stays(tmp_path, keep):
    saved(tmp_path, 1)
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.prune(tmp_path, keep=keep)
    assert steps(tmp_path) == [1]


def test_prune_cleans_up_after_kills_but_not_after_the_living(tmp_path):
    saved(tmp_path, 5)
    before = left_by_a_kill(tmp_path, 4)  # nobody saves a step before the newest any more
    old = left_by_a_kill(tmp_path, 6, age=7200)
    fresh = left_by_a_kill(tmp_path, 7)
    moving = left_by_a_kill(tmp_path, 8, age=7200)
    (moving / "rank-00000.h5.tmp").touch()
    assert checkpoint.prune(tmp_path, keep=1) == [before, old]
    assert fresh.exists()
    assert moving.exists()
    assert checkpoint.prune(tmp_path, keep=1, stale=0.0) == [fresh, moving]
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

    monkeypatch.setattr("mpidist.checkpoint.directory._age", unseen)
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
    assert [step_of(gone) for gone in checkpoint.prune(tmp_path, keep=1)] == [1]
