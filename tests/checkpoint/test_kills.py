"""Jobs that save are killed; three hundred by ``python -m tests.soaks.checkpoints.kills``."""

from __future__ import annotations

import random

import pytest

from mpidist import checkpoint
from mpidist.checkpoint.format.manifest import MANIFEST
from tests.soaks.checkpoints import kills, loop
from tests.soaks.checkpoints.kills import Kill

pytestmark = pytest.mark.timeout(300)

RUNS = 6


@pytest.mark.mpirun
def test_jobs_that_are_killed_leave_their_newest_checkpoint(tmp_path, mpirun):
    seen = list(kills.soak(mpirun, tmp_path / "run", runs=RUNS, ranks=4, seed=2))
    assert len(seen) == RUNS
    assert {bool(kill.fatal) for kill, _ in seen} == {False, True}
    newest = [report.newest for _, report in seen]
    assert newest == sorted(newest)
    assert newest[-1] > 0
    assert sorted(tmp_path.iterdir()) == [tmp_path / "run"]


@pytest.mark.any_mpi
@pytest.mark.mpirun
def test_a_checkpoint_that_is_lost_is_found(tmp_path, mpirun, monkeypatch):
    kill = Kill(1, "itself", (0,), fatal=95)
    monkeypatch.setattr(Kill, "draw", lambda rng, most: kill)
    soak = kills.soak(mpirun, tmp_path / "run", runs=2, ranks=1, seed=2)
    next(soak)
    (checkpoint.list(tmp_path / "run")[-1].directory / MANIFEST).unlink()
    with pytest.raises(AssertionError, match=r"seed 2, run 1, .*: (loaded|the newest is)"):
        next(soak)


def test_kills_are_of_all_kinds():
    drawn = [Kill.draw(random.Random(number), 4) for number in range(400)]
    assert {kill.size for kill in drawn} == {1, 2, 3, 4}
    kinds = {(kill.victim, bool(kill.fatal)) for kill in drawn}
    outside = {(victim, False) for victim in ("one rank", "several ranks", "all ranks", "mpirun")}
    assert kinds == outside | {("itself", True), ("all ranks", True)}
    assert all(set(kill.ranks) <= set(range(kill.size)) for kill in drawn)


@pytest.mark.parametrize(("fatal", "where"), [(3, "before"), (4, "after")])
def test_the_call_at_which_a_rank_is_killed(fatal, where, tmp_path):
    log, done = loop.Log(tmp_path, 0), []
    log.begin("save")
    killer = loop.Killer(log, fatal, lambda: done.append(loop.mark_of(tmp_path / "rank-0.mark")))
    call = loop.Call(0, "os.fsync", "step-000001/rank-00000.h5.tmp")
    for _ in range(9):
        killer(call, lambda: None, ())
    assert done == [f"save: {where} os.fsync of the rank's file"]


def test_the_call_is_found_though_other_threads_make_calls_meanwhile(tmp_path):
    log, done = loop.Log(tmp_path, 0), []
    log.begin("save")
    killer = loop.Killer(log, 2, lambda: done.append(loop.mark_of(tmp_path / "rank-0.mark")))
    write = loop.Call(0, "os.pwrite", "step-000001/rank-00000.h5.tmp")
    view = loop.Call(0, "hdf5.create_view", "step-000001/view.h5")
    killer(view, lambda: None, ())
    killer(write, lambda: killer(view, lambda: None, ()), ())
    assert done == ["save: after os.pwrite of the rank's file"]
