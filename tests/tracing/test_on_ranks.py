"""Traces of real jobs: their figures agree with clocks of the script's own."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist import nn
from mpidist.group import ProcessGroup
from mpidist.optim import SGD
from mpidist.parallel import DDP
from mpidist.tracing.summary import Summary, load, summarise
from tests.tracing.format import check_trace

STEPS = 12


def trained(path: Path, world: ProcessGroup, *, sleeper: int = -1, nap: float = 0.0) -> Any:
    """Train with a trace on; return each rank's times of the whole and of its steps."""
    rng = np.random.default_rng(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(256, 256, rng=rng), nn.ReLU())]
    model = nn.Sequential(*layers)
    optimizer = SGD(model.named_parameters(), lr=1e-3)
    x = np.random.default_rng(world.rank).standard_normal((512, 256), np.float32)
    seconds = []
    with DDP(model, world) as ddp, mpidist.trace(path, world):
        began = time.perf_counter()
        for _ in range(STEPS):
            start = time.perf_counter()
            with mpidist.region("step"):
                if world.rank == sleeper:
                    time.sleep(nap)
                optimizer.zero_grad()
                y, ctx = ddp.forward(x, nn.Mode(training=True))
                ddp.backward(ctx, y / y.size)
                optimizer.step()
            seconds.append(time.perf_counter() - start)
        wall = time.perf_counter() - began
    return mpidist.all_gather_object((wall, seconds), world)


def read(path: Path, world: ProcessGroup) -> tuple[Summary, Any]:
    """Return the summary on all ranks, of a file that rank 0 has checked."""
    found = None
    if world.rank == 0:
        document = load(path)
        check_trace(document)
        found = summarise(document), document
    told: tuple[Summary, Any] = mpidist.broadcast_object(found, world)
    return told


@pytest.mark.any_mpi
@pytest.mark.ranks(4)
def test_the_summary_of_a_training_agrees_with_the_clock(
    world: ProcessGroup, tmp_path: Path
) -> None:
    measured = trained(tmp_path / "t.json.gz", world)
    summary, document = read(tmp_path / "t.json.gz", world)
    assert summary.notes == []
    for rank, (wall, seconds) in zip(summary.ranks, measured, strict=True):
        assert rank.wall == pytest.approx(wall, rel=0.05)
        assert rank.compute + rank.communication == pytest.approx(wall, rel=0.05)
        assert rank.compute + rank.communication == pytest.approx(rank.wall, rel=1e-6)
        assert 0 < rank.communication < wall
        assert rank.waiting <= rank.communication
        spans = [
            event["dur"] / 1e6
            for event in document["traceEvents"]
            if event["pid"] == rank.rank and event["name"] == "step"
        ]
        assert spans == pytest.approx(seconds, rel=0.05, abs=2e-3)
    slowest = [max(times) for times in zip(*(times for _, times in measured), strict=True)]
    assert [step.seconds for step in summary.steps] == pytest.approx(slowest, rel=0.05, abs=2e-3)


@pytest.mark.any_mpi
@pytest.mark.ranks(4)
def test_a_rank_that_sleeps_in_each_step_is_the_slowest(
    world: ProcessGroup, tmp_path: Path
) -> None:
    nap = 0.15
    trained(tmp_path / "t.json", world, sleeper=2, nap=nap)
    summary, _ = read(tmp_path / "t.json", world)
    assert len(summary.steps) == STEPS
    first = summary.lateness[0]
    assert first.rank == 2
    assert first.steps >= STEPS - 1
    assert first.mean > nap / 2
    # It is the one that does not wait.
    waiting = [rank.waiting for rank in summary.ranks]
    assert waiting[2] == min(waiting)
    assert min(waiting[:2] + waiting[3:]) > STEPS * nap / 3


@pytest.mark.ranks(2)
def test_all_ranks_of_a_host_have_one_clock(world: ProcessGroup, tmp_path: Path) -> None:
    with mpidist.trace(tmp_path / "t.json", world):
        mpidist.barrier(world)
        if world.rank == 1:
            time.sleep(0.1)
        mpidist.barrier(world)
    _, document = read(tmp_path / "t.json", world)
    assert [rank["clock_uncertainty"] for rank in document["otherData"]["ranks"]] == [0, 0]
    waits = [e for e in document["traceEvents"] if e["name"] == "barrier" and e["pid"] == 0]
    assert waits[1]["args"]["last"] == 1
    assert waits[1]["args"]["waited_ms"] == pytest.approx(100, abs=50)
