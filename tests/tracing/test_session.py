"""A trace from begin to end on simulated ranks: what is in it, and what is left when it fails."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist import nn
from mpidist.group import ProcessGroup
from mpidist.observe.regions import listener
from mpidist.optim import SGD
from mpidist.parallel import DDP
from mpidist.testing import run_ranks
from mpidist.tracing import session
from mpidist.tracing.parts import TracePart
from mpidist.tracing.summary import load, summarise
from tests.tracing.format import check_trace


def events_of(path: Path, **wanted: Any) -> list[Any]:
    document = load(path)
    check_trace(document)
    return [e for e in document["traceEvents"] if wanted.items() <= e.items()]


def test_every_kind_of_operation_is_in_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def body(group: ProcessGroup) -> None:
        x = np.ones(10, np.float32)
        mpidist.barrier(group)
        with mpidist.trace(path, group), mpidist.region("all"):
            mpidist.all_reduce(x, group, out=x)
            mpidist.iall_reduce(x, group).wait()
            pair = group.split(group.rank // 2)
            assert pair is not None
            mpidist.barrier(pair)
            if group.rank == 0:
                mpidist.send(x, group, dst=1)
            if group.rank == 1:
                mpidist.recv(group, src=0)
        mpidist.barrier(group)

    run_ranks(4, body)
    for rank in range(4):
        names = {e["name"] for e in events_of(path, pid=rank)}
        assert {"all", "compute", "all_reduce", "iall_reduce", "split", "barrier"} <= names
        assert len(events_of(path, pid=rank, name="barrier")) == 1
    assert [e["ph"] for e in events_of(path, pid=0, name="send")] == ["b", "e"]
    assert [e["ph"] for e in events_of(path, pid=1, name="recv")] == ["b", "e"]
    (sum_,) = events_of(path, pid=2, name="all_reduce")
    assert sum_["args"]["bytes"] == 40
    assert sum_["args"]["site"].startswith(f"{__file__}:")
    assert len({e["args"]["last"] for e in events_of(path, name="all_reduce")}) == 1
    # Pairs have their own barriers: rank 3's last comer is not rank 0.
    assert events_of(path, pid=3, name="barrier")[0]["args"]["last"] in (2, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_of_some_ranks_counts_them_anew(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        half = group.split(group.rank % 2)
        assert half is not None
        with mpidist.trace(tmp_path / f"{group.rank % 2}.json", half):
            mpidist.barrier(half)

    run_ranks(4, body)
    for half in range(2):
        assert [rank.rank for rank in summarise(load(tmp_path / f"{half}.json")).ranks] == [0, 1]


def test_nothing_is_kept_before_and_after(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> list[bool]:
        recorder = group.transport.recorder
        states = [recorder.sink is None and listener.get() is None]
        with mpidist.trace(tmp_path / "t.json", group):
            states.append(recorder.sink is not None and listener.get() is not None)
        states.append(recorder.sink is None and listener.get() is None)
        states.append(any(t.name == "mpidist-trace" for t in threading.enumerate()))
        return states

    assert run_ranks(1, body) == [[True, True, True, False]]


def test_traces_may_be_nested(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        with mpidist.trace(tmp_path / "outer.json", group):
            with mpidist.region("a"):
                mpidist.ibarrier(group).wait()
            with mpidist.trace(tmp_path / "inner.json", group), mpidist.region("b"):
                mpidist.ibarrier(group).wait()

    run_ranks(2, body)
    for name, regions, waits in (("outer", ["a", "b"], 4), ("inner", ["b"], 2)):
        path = tmp_path / f"{name}.json"
        assert [e["name"] for e in events_of(path, pid=0, cat="region")] == regions
        assert len(events_of(path, name="ibarrier", cat="immediate", ph="b")) == waits


def test_a_full_trace_stops_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.json"

    def body(group: ProcessGroup) -> None:
        with mpidist.trace(path, group, limit=10):
            for _ in range(20):
                mpidist.barrier(group)
            time.sleep(0.2)

    run_ranks(2, body)
    document = load(path)
    assert [rank["dropped"] for rank in document["otherData"]["ranks"]] == [10, 10]
    assert len(events_of(path, pid=1, name="barrier")) == 10
    summary = summarise(document)
    assert summary.notes[:2] == [
        f"rank {rank} was recorded up to its event 10, as many as are kept; 10 more are missing"
        for rank in range(2)
    ]
    assert all(rank.wall < 0.2 for rank in summary.ranks), "what is not recorded is not compute"


def test_an_error_leaves_the_parts_of_the_ranks_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no module can be loaded any more, since the process has too many files open."""
    path = tmp_path / "t.json"

    def body(group: ProcessGroup) -> None:
        with mpidist.trace(path, group):
            mpidist.barrier(group)
            monkeypatch.setitem(sys.modules, "concurrent.futures", None)
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        run_ranks(2, body)
    found = [TracePart.of(p.read_bytes()) for p in sorted((tmp_path / "t.json.parts").iterdir())]
    assert [part.facts["rank"] for part in found] == [0, 1]
    assert [[row.what for row in part.rows()] for part in found] == [["barrier"]] * 2
    assert not path.exists()


def test_parts_of_an_earlier_trace_are_not_taken_for_this_one_s(tmp_path: Path) -> None:
    old = tmp_path / "t.json.parts"
    old.mkdir()
    (old / "rank-00007.jsonl.gz").write_bytes(b"old")

    def body(group: ProcessGroup) -> None:
        with mpidist.trace(tmp_path / "t.json", group):
            pass

    run_ranks(2, body)
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_directory_of_parts_that_is_a_link_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rank-00000.jsonl.gz").write_bytes(b"another job's")
    (tmp_path / "t.json.parts").symlink_to(elsewhere)

    def body(group: ProcessGroup) -> None:
        with (
            pytest.raises(OSError, match=r"rank 0: .*t\.json\.parts is a symbolic link; remove it"),
            mpidist.trace(tmp_path / "t.json", group),
        ):
            pytest.fail("the block was entered")

    run_ranks(2, body)
    assert [path.name for path in elsewhere.iterdir()] == ["rank-00000.jsonl.gz"]


def test_a_path_that_cannot_be_written_is_told_on_all_ranks_before_the_block(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()

    def body(group: ProcessGroup) -> list[str]:
        told = []
        for path in (tmp_path, tmp_path / "file" / "t.json"):
            with (
                pytest.raises(OSError, match="rank 0: ") as raised,
                mpidist.trace(path, group),
            ):
                pytest.fail("the block was entered")
            told.append(str(raised.value))
        mpidist.barrier(group)
        return told

    first, second = run_ranks(2, body)
    assert first == [each.replace("rank 1 of", "rank 0 of") for each in second]
    assert str(tmp_path) in first[0]


def test_a_trace_that_cannot_be_written_at_the_end_is_told_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "write_trace", no_room)

    def body(group: ProcessGroup) -> None:
        with (
            pytest.raises(OSError, match=r"rank 0: .*No space left"),
            mpidist.trace(tmp_path / "t.json", group),
        ):
            mpidist.barrier(group)

    run_ranks(2, body)
    assert len([*(tmp_path / "t.json.parts").iterdir()]) == 2, "nothing is thrown away"


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    def body(group: ProcessGroup) -> None:
        with (
            pytest.raises(ValueError, match="limit must be positive, got 0"),
            mpidist.trace(tmp_path / "t.json", group, limit=0),
        ):
            pass

    run_ranks(1, body)


def test_the_strategies_name_what_they_do(tmp_path: Path) -> None:
    path = tmp_path / "t.json"

    def body(group: ProcessGroup) -> None:
        model = nn.Sequential(nn.Linear(4, 8, rng=0), nn.ReLU(), nn.Linear(8, 2, rng=1))
        optimizer = SGD(model.named_parameters(), lr=0.1)
        with DDP(model, group) as ddp, mpidist.trace(path, group):
            for _ in range(2):
                with mpidist.region("step"):
                    y, ctx = ddp.forward(np.ones((3, 4), np.float32), nn.Mode(training=True))
                    ddp.backward(ctx, y)
                    optimizer.step()
                    optimizer.zero_grad()

    run_ranks(2, body)
    for rank in range(2):
        names = [e["name"] for e in events_of(path, pid=rank, cat="region")]
        assert names == ["step", "forward", "backward", "gradients", "optimizer"] * 2
    summary = summarise(load(path))
    assert len(summary.steps) == 2
    assert any(call.operation == "iall_reduce" for call in summary.calls)
