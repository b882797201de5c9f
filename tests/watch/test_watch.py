"""What ranks see of each other while one keeps the others waiting."""

from __future__ import annotations

import json
import logging
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.backends.simulated.network import Network
from mpidist.errors import CollectiveMismatchError, CollectiveTimeoutError, PeerLostError
from mpidist.group import ProcessGroup
from mpidist.observe.recorder import Head, Kind
from mpidist.observe.watch.report import write_dump
from mpidist.observe.watch.states import Process, Status, own_stacks
from mpidist.testing import run_ranks

LATE = 1  # the rank that keeps the others waiting


@pytest.fixture
def reports(caplog):
    """The reports that this rank has written."""

    def written():
        return [r.message for r in caplog.records if r.name == "mpidist"]

    with caplog.at_level(logging.WARNING, logger="mpidist"):
        yield written


def everywhere(world, mine):
    """What every rank has to say."""
    return mpidist.all_gather_object(mine, world)


@pytest.mark.ranks(2, 4)
def test_everybody_sees_what_everybody_does(world):
    mpidist.all_reduce(np.ones(5), world)
    mpidist.barrier(world)
    if world.rank == 0:
        states = world.watch.all_states()
        assert sorted(states) == list(range(world.size))
        for rank, state in states.items():
            assert state.status is Status.ALIVE
            whats = [record.what for record in state.records]
            assert "all_reduce SUM float64[5]" in whats
            (main,) = (stack for stack in state.stacks if stack.thread == "MainThread")
            assert any("test_everybody" in site.function for site in main.frames), rank
    mpidist.barrier(world)


@pytest.mark.ranks(3, 4)
def test_other_nodes_are_asked(world, monkeypatch):
    monkeypatch.setenv("MPIDIST_RANKS_PER_NODE", "2")
    with mpidist.init("mpi", timeout=20) as again:
        assert again.num_nodes == 2
        mpidist.all_reduce(np.ones(5), again)
        if again.rank == again.size - 1:
            states = again.watch.all_states()
            assert {rank: state.node for rank, state in states.items()} == {
                rank: rank // 2 for rank in range(again.size)
            }
            assert all(state.status is Status.ALIVE for state in states.values())
            assert all(state.stacks for state in states.values())
            assert sorted(again.watch.states()) == [
                rank for rank in range(again.size) if rank // 2 == again.node_rank
            ]
        mpidist.barrier(again)


@pytest.mark.ranks(4)
def test_one_rank_reports_a_missed_deadline_and_names_who_is_missing(world, reports):
    group = world.duplicate("late")
    group.timeout = 0.5
    if group.rank == LATE:
        time.sleep(2.5)
    else:
        with pytest.raises(CollectiveTimeoutError, match=rf"Missing: rank {LATE} \("):
            mpidist.all_reduce(np.ones(3), group)
    written = everywhere(world, reports())
    lines = [report for of_rank in written for report in of_rank]
    assert len(lines) == 1
    cause, operation, cure, _, row, *_ = lines[0].splitlines()
    assert f"Missing: rank {LATE} (" in cause
    assert "not complete after 0.5 s" in operation
    assert "Cure: " in cure
    assert row.split()[0] == str(LATE)
    assert "in test_one_rank_reports" in row  # where its main thread is
    assert f"rank {LATE}, MainThread: " in lines[0]


@pytest.mark.ranks(2, 4)
def test_a_long_wait_is_reported_and_goes_on(world, reports):
    group = world.duplicate("slow")
    group.warn_after = 0.3
    if group.rank == LATE:
        time.sleep(1.0)  # not as long as until a further warning
    assert mpidist.all_reduce(np.ones(3), group)[0] == world.size
    written = [report for of_rank in everywhere(world, reports()) for report in of_rank]
    assert written
    # Any but not all: on a busy machine one more may come when nobody is missing any more.
    assert any(f"Missing: rank {LATE} (" in report for report in written)
    assert all("has waited for" in report for report in written)


CALLS = {
    "barrier": lambda x, g: mpidist.barrier(g),
    "all_reduce": mpidist.all_reduce,
    "long all_reduce": lambda x, g: mpidist.all_reduce(np.ones(100_000), g),
    "iall_reduce": lambda x, g: mpidist.iall_reduce(np.ones(100_000), g).wait(),
    "gather": mpidist.gather,
    "all_to_all": mpidist.all_to_all,
    "small broadcast": mpidist.broadcast,
    "other root": lambda x, g: mpidist.broadcast(x, g, root=1),
    "reduce": lambda x, g: mpidist.reduce(x, g, op=mpidist.MAX),
    "other op": lambda x, g: mpidist.reduce(x, g, op=mpidist.MIN),
    "other dtype": lambda x, g: mpidist.gather(x.astype(np.float32), g),
    "other count": lambda x, g: mpidist.gather(x[:4], g),
    "split": lambda x, g: g.split(0),
}


@pytest.mark.parametrize(
    ("usual", "odd"),
    [
        ("barrier", "all_reduce"),
        ("barrier", "gather"),
        ("all_reduce", "long all_reduce"),
        ("all_reduce", "iall_reduce"),
        ("gather", "all_to_all"),
        ("gather", "other dtype"),
        ("gather", "other count"),
        ("small broadcast", "other root"),
        ("reduce", "other op"),
        ("split", "barrier"),
    ],
)
@pytest.mark.ranks(2, 4)
def test_a_rank_that_calls_something_else_is_told_before_the_deadline(world, usual, odd):
    """On one node at arrival, or a moment later where the calls go different ways."""
    group = world.duplicate("different")
    began = time.monotonic()
    with pytest.raises(CollectiveMismatchError) as caught:
        CALLS[odd if group.rank == LATE else usual](np.arange(8.0), group)
    assert time.monotonic() - began < 20
    text = str(caught.value)
    assert f"rank {LATE} called " in text
    assert text.count("test_watch.py:") >= 2
    mpidist.barrier(world)


@pytest.mark.ranks(2)
def test_ranks_with_other_texts_in_their_recorders_call_the_same(world):
    """As in a job that gathers objects of other sizes for days, of which one rank does more."""
    recorder = world.transport.recorder
    for number in range(2000 * world.rank):
        recorder.name(f"something of this rank[{number}]", (0, 0), Kind.BLOCKING)
    for number in [*range(0, 300, 2), *range(300)]:
        gathered = mpidist.all_gather_object("x" * number, world)
        assert gathered == ["x" * number] * world.size
    group = world.duplicate("late")
    sent = [group.rank] * 2  # how much a rank sends is its own affair
    if group.rank == LATE:
        time.sleep(0.5)  # long enough to be compared by what is recorded
    mpidist.all_to_all(np.ones(2), group)
    mpidist.iall_to_all(np.ones(sum(sent)), group, counts=sent, recv_counts=[0, 1]).wait()


def test_a_rank_whose_process_is_dead_is_not_waited_for_until_the_deadline(
    caplog, monkeypatch
) -> None:
    monkeypatch.setattr("mpidist.group.pending.GRACE", 0.5)
    over = threading.Barrier(3)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:

        def one(group: mpidist.ProcessGroup) -> tuple[str, float]:
            if group.rank == LATE:  # stands for the child
                over.wait(25)
                return "", 0.0
            group.watch._processes[LATE] = Process(child.pid)
            began = time.monotonic()
            if group.rank == 0:
                child.kill()
            with pytest.raises(PeerLostError) as caught:
                mpidist.all_reduce(np.ones(3), group)
            seconds = time.monotonic() - began
            over.wait(25)
            return str(caught.value), seconds

        told = run_ranks(3, one, timeout=20)
    for text, seconds in (told[0], told[2]):
        assert f"rank {LATE} was killed" in text
        assert 0.5 <= seconds < 20
    assert f"Missing: rank {LATE}" in caplog.text
    assert "dead" in caplog.text


def test_with_many_ranks_a_report_begins_with_the_cause(caplog) -> None:
    """And a screen holds all of it."""
    size = 40
    ready, over = threading.Barrier(size), threading.Barrier(size)

    def one(group: mpidist.ProcessGroup) -> None:
        mpidist.barrier(group)
        ready.wait(30)
        if group.rank != LATE:
            group.timeout = 1.5
            with pytest.raises(CollectiveTimeoutError):
                mpidist.all_reduce(np.ones(3), group)
        over.wait(30)

    with caplog.at_level(logging.WARNING, logger="mpidist"):
        run_ranks(size, one)
    report = caplog.records[0].message
    lines = report.splitlines()
    assert len(lines) <= 24, report
    assert f"Missing: rank {LATE} (" in lines[0]
    assert "called at tests/watch/test_watch.py:" in lines[0]
    assert "all_reduce #" in lines[1]
    assert "called at tests/watch/test_watch.py:" in lines[1]
    assert lines[2].startswith(f"  Cure: let rank {LATE} make this call")


def test_a_rank_whose_helper_does_not_run_is_silent() -> None:
    """Foreign code that holds the interpreter's lock keeps it from running."""

    def one(group: mpidist.ProcessGroup) -> str:
        mpidist.barrier(group)
        if group.rank == LATE:
            group.watch._cells[Head.BEAT] = time.monotonic_ns() - 3 * 10**9
        mpidist.barrier(group)
        return group.watch.describe_stall(group.ranks, None, [])

    told = run_ranks(3, one)
    assert told[0] == told[2]
    silent = rf"Silent: rank {LATE}: .* holds Python's lock \(the GIL\), after "
    assert re.fullmatch(silent + r"tests/watch/test_watch\.py:\d+ in one", told[0])


def test_simulated_ranks_report_too(caplog) -> None:
    def one(group: mpidist.ProcessGroup) -> str:
        group.timeout = 0.3
        if group.rank == LATE:
            time.sleep(0.6)
            return ""
        with pytest.raises(CollectiveTimeoutError) as caught:
            mpidist.all_reduce(np.ones(3), group)
        return str(caught.value)

    with caplog.at_level(logging.WARNING, logger="mpidist"):
        told = run_ranks(3, one)
    assert all(f"Missing: rank {LATE}" in text for text in (told[0], told[2]))
    assert [f"Missing: rank {LATE}" in r.message for r in caplog.records] == [True]


def test_a_report_is_written_as_json(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MPIDIST_DUMP", str(tmp_path))

    def one(group: mpidist.ProcessGroup) -> None:
        mpidist.barrier(group)
        if group.rank == 0:
            group.watch.listen([0, 0])
            group.watch.report("a title", dump=True, ask=False)
        mpidist.barrier(group)

    run_ranks(2, one)
    (path,) = tmp_path.iterdir()
    assert str(path) in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = json.loads(path.read_text())
    assert content["title"] == "a title"
    assert [rank["rank"] for rank in content["ranks"]] == [0, 1]
    assert all("barrier" in [r["what"] for r in rank["records"]] for rank in content["ranks"])


def test_no_report_takes_the_file_of_another(tmp_path, monkeypatch) -> None:
    """As where containers share a directory, their host name and process numbers."""
    monkeypatch.setenv("MPIDIST_DUMP", str(tmp_path))
    titles = ["one", "two", "three"]
    told = [write_dump(title, {}) for title in titles]
    files = [Path(words.rpartition(" ")[2]) for words in told]
    assert [json.loads(file.read_text())["title"] for file in files] == titles


def test_a_directory_that_cannot_be_written_is_told_and_harms_nothing(monkeypatch, caplog) -> None:
    monkeypatch.setenv("MPIDIST_DUMP", "/dev/full")

    def one(group: mpidist.ProcessGroup) -> None:
        group.watch.listen([0])
        group.watch.report("a title", dump=True, ask=False)

    run_ranks(1, one)
    assert "could not be written to /dev/full: " in caplog.text


def test_of_many_threads_the_main_one_is_told() -> None:
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, name=f"loader-{n}") for n in range(100)]
    for thread in threads:
        thread.start()
    try:
        text = own_stacks()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    stacks = json.loads(text)
    assert len(text) <= 8000
    assert stacks[0]["thread"] == "MainThread"
    assert stacks[0]["frames"][1]["function"] == "test_of_many_threads_the_main_one_is_told"
    assert len(stacks) > 3


def test_a_report_needs_no_current_directory(tmp_path, monkeypatch, caplog) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    def one(group: mpidist.ProcessGroup) -> None:
        group.watch.listen([0])
        mpidist.barrier(group)
        group.watch.report("a title", dump=True, ask=False)

    monkeypatch.delenv("MPIDIST_DUMP", raising=False)
    monkeypatch.chdir(gone)
    gone.rmdir()
    run_ranks(1, one)
    assert f"{__file__}:" in caplog.text
    assert "could not be written to .: " in caplog.text


def test_ranks_that_report_at_once_write_one_report(caplog) -> None:
    ready = threading.Barrier(4)

    def one(group: mpidist.ProcessGroup) -> float:
        ready.wait()
        began = time.monotonic()
        group.watch.report("together", ask=False)
        return time.monotonic() - began

    assert max(run_ranks(4, one)) < 5
    assert len(caplog.records) == 1


def test_a_rank_that_never_comes_is_missed_before_anything_is_known_of_it():
    backend = SimulatedBackend(Network(3), 0)
    with pytest.raises(CollectiveTimeoutError, match="all_gather #1 on group 'world', rank 0 of 3"):
        ProcessGroup.over(backend, timeout=0.05, warn_after=1.0)
