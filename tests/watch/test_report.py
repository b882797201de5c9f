"""Reports in words, of states made up here."""

from __future__ import annotations

import json
import pathlib
import threading
from dataclasses import asdict
from zlib import crc32

import pytest

from mpidist.observe.recorder import Kind
from mpidist.observe.recorder.recorder import Site
from mpidist.observe.recorder.recording import OperationRecord
from mpidist.observe.watch import report
from mpidist.observe.watch.report import (
    Stall,
    callers,
    format_site,
    processes,
    render_report,
)
from mpidist.observe.watch.states import RankState, Stack, Status, Wait

SECOND = 10**9
NOW = 1000 * SECOND
KEY = (7, 42)


def record(
    what: str = "all_reduce SUM float32[3]",
    *,
    number: int = 42,
    group: str = "world",
    identity: int = 7,
    line: int = 31,
    began: float = 60,
    ended: float | None = None,
    sequence: int = 1,
    kind: Kind = Kind.BLOCKING,
) -> OperationRecord:
    over = 0 if ended is None else NOW - int(ended * SECOND)
    site = Site("/elsewhere/train.py", line, "step")
    began_ns = NOW - int(began * SECOND)
    call = crc32(what.encode())
    return OperationRecord(
        sequence, kind, what, group, identity, number, site, began_ns, over, call
    )


def state(rank: int, *records: OperationRecord, **more: object) -> RankState:
    fields = {"status": Status.ALIVE, "records": records, "now": NOW} | more
    return RankState(rank, rank // 2, f"host{rank // 2}:{100 + rank}", **fields)


def world(*states: RankState) -> dict[int, RankState]:
    return {each.rank: each for each in states}


def test_a_rank_that_has_not_come_is_named_with_what_it_did_last() -> None:
    late = record("barrier", number=41, line=29, ended=55)
    states = world(state(0, record()), state(1, record()), state(2, late))
    told = str(Stall(states, [0, 1, 2], KEY, []))
    assert told == (
        "Missing: rank 2 (host1:102), done 55.0 s ago with barrier #41 of group 'world', called at "
        "/elsewhere/train.py:29 in step"
    )
    assert Stall(states, [0, 1, 2], KEY, []).stragglers() == [2]


def test_a_difference_that_is_over_on_all_ranks_is_not_blamed_for_a_later_wait() -> None:
    caught = [record(what, number=40, ended=50) for what in ("gather float32[3] root 0", "barrier")]
    states = world(
        state(0, caught[0], record(sequence=2)),
        state(1, caught[1], record("barrier", number=41, ended=45, sequence=2)),
    )
    assert str(Stall(states, [0, 1], KEY, [])).startswith("Missing: rank 1 ")
    assert Stall(states, [0, 1], KEY, []).stragglers() == [1]


def test_a_rank_in_another_group_is_named_with_that_group() -> None:
    other = record(number=3, group="pipeline", identity=8, began=12)
    told = str(Stall(world(state(0, record()), state(1, other)), [0, 1], KEY, [1]))
    assert "rank 1 (host0:101), for 12.0 s in all_reduce SUM float32[3] #3 of group 'pi" in told


def test_a_rank_that_waits_for_an_immediate_operation_is_named_with_both_lines() -> None:
    pending = record("iall_gather", number=40, kind=Kind.IMMEDIATE, line=20)
    waiting = Wait(sequence=1, site=Site("/elsewhere/train.py", 25, "step"), seconds=9.0)
    states = world(state(0, record()), state(1, pending, wait=waiting))
    told = str(Stall(states, [0, 1], KEY, []))
    assert "waiting at /elsewhere/train.py:25 in step for iall_gather #40" in told
    assert "called at /elsewhere/train.py:20" in told
    assert "waits 9.0 s" in render_report("title", states.values(), [])


def test_a_rank_that_has_begun_an_immediate_operation_and_does_not_wait_for_it_is_named() -> None:
    begun = record("iall_gather", kind=Kind.IMMEDIATE, began=30)
    waiting = Wait(sequence=1, site=Site("/elsewhere/train.py", 25, "step"), seconds=9.0)
    here = (Stack("MainThread", (Site("/elsewhere/data.py", 9, "load"),)),)
    last = record("barrier", number=43, ended=20, sequence=2)
    states = world(state(0, begun, wait=waiting), state(1, begun, last, stacks=here))
    stall = Stall(states, [0, 1], KEY, [])
    assert str(stall) == (
        "Begun, but not waited for: rank 1 (host0:101), now at /elsewhere/data.py:9 in load, done "
        "20.0 s ago with barrier #43 of group 'world', called at /elsewhere/train.py:31 in step"
    )
    assert stall.stragglers() == [1]
    assert stall.cure().startswith("let rank 1 wait for it")
    inside = record("barrier", number=3, identity=8, began=12, sequence=2)
    assert not str(
        Stall(world(state(0, begun, wait=waiting), state(1, begun, inside)), [0, 1], KEY, [])
    )


def test_where_a_rank_is_names_the_callers_lines_not_the_packages() -> None:
    path, ours = Site(pathlib.__file__, 10, "read_text"), Site(report.__file__, 20, "place")
    step, wait = Site("/elsewhere/train.py", 31, "step"), Site(threading.__file__, 5, "wait")
    for frames, expected in [
        ((path, ours, step), "/elsewhere/train.py:31"),
        ((wait, step), format_site(wait)),
        ((step, ours, step), "/elsewhere/train.py:31"),
        ((wait, path), format_site(wait)),
    ]:
        row = render_report(
            "title", [state(0, record(), stacks=(Stack("MainThread", frames),))], []
        )
        assert row.splitlines()[2].split("  ")[-1].startswith(expected)


@pytest.mark.parametrize("status", [Status.ALIVE, Status.DEAD])
def test_a_rank_that_is_far_beyond_an_operation_has_come_to_it(status: Status) -> None:
    """Its record has been overwritten meanwhile."""
    later = record("ibarrier", number=300, kind=Kind.IMMEDIATE)
    late = record("barrier", number=41, ended=55)
    states = world(state(0, record()), state(1, later, status=status), state(2, late))
    told = str(Stall(states, [0, 1, 2], KEY, []))
    assert told.startswith("Missing: rank 2 (")
    assert "rank 1 (" not in told
    assert told.endswith("Dead: rank 1") == (status is Status.DEAD)
    expected = [2] if status is Status.ALIVE else [1, 2]
    assert Stall(states, [0, 1, 2], KEY, []).stragglers() == expected


@pytest.mark.parametrize("status", [Status.DEAD, Status.STOPPED])
def test_a_rank_that_came_and_is_gone_is_named(status: Status) -> None:
    states = world(state(0, record()), state(1, record(), status=status))
    assert str(Stall(states, [0, 1], KEY, [])) == f"{status.value.capitalize()}: rank 1"
    assert Stall(states, [0, 1], KEY, []).stragglers() == [1]


def test_the_status_of_a_missing_rank_is_told() -> None:
    states = world(state(0, record()), state(1, status=Status.SILENT))
    assert str(Stall(states, [0, 1], KEY, [1])) == (
        "Missing: rank 1 (host0:101, silent), which has called nothing. Silent: rank 1: nothing is "
        "heard from host0"
    )


def test_a_rank_that_came_and_is_silent_has_a_sentence() -> None:
    """It is not missing, and neither dead nor stopped."""
    states = world(state(0, record()), state(1, record(), status=Status.SILENT))
    for key, missing in ((KEY, []), (None, [])):
        (told,) = Stall(states, [0, 1], key, missing).causes()
        assert told.startswith("Silent: rank 1: no thread of it runs: foreign code holds Python's")
        assert told.endswith(" (the GIL), after /elsewhere/train.py:31 in step")
    assert "py-spy dump --native --pid 101" in Stall(states, [0, 1], KEY, []).cure()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.ALIVE, "let rank 1 make this call"),
        (Status.STOPPED, "kill -CONT 101"),
        (Status.DEAD, "dmesg"),
        (Status.SILENT, "gdb -p 101"),
        (Status.LEAVING, "let rank 1 make as many calls"),
    ],
)
def test_the_cure_is_that_of_the_missing_rank(status: Status, expected: str) -> None:
    states = world(state(0, record()), state(1, record(number=41, ended=5), status=status))
    assert expected in Stall(states, [0, 1], KEY, []).cure()


def test_what_to_do_where_nobody_is_missing() -> None:
    states = world(state(0, record()), state(1, record()))
    assert "MPIDIST_DEBUG=1" in Stall(states, [0, 1], KEY, []).cure()
    odd = world(state(0, record()), state(1, record("barrier")))
    cure = Stall(odd, [0, 1], KEY, []).cure()
    assert cure == "let all ranks make the same calls in the same order"


def test_different_calls_are_told_the_rarest_first() -> None:
    odd = record("broadcast float32[3] root 0", line=77)
    states = world(*(state(rank, odd if rank == 2 else record()) for rank in range(5)))
    assert callers(states, range(5), KEY) == (
        "rank 2 called broadcast float32[3] root 0 at /elsewhere/train.py:77 in step; "
        "rank 0-1, 3-4 called all_reduce SUM float32[3] at /elsewhere/train.py:31 in step"
    )
    told = str(Stall(states, range(5), KEY, []))
    assert told.startswith("The ranks called different things: rank 2 called broadcast")
    assert Stall(states, range(5), KEY, []).stragglers() == [2]


def test_a_difference_in_a_collective_that_is_over_is_told_with_its_number() -> None:
    theirs, ours = record("gather", number=40, line=20), record("reduce", number=40)
    states = world(
        state(0, ours, record(sequence=2)),
        state(1, theirs, record(number=41, sequence=2)),
        state(2, ours, record(sequence=2)),
    )
    told = str(Stall(states, range(3), KEY, [1]))
    assert told.startswith("The ranks called different things in #40: rank 1 called gather at")
    assert "Missing: rank 1" in told
    assert Stall(states, range(3), KEY, [1]).stragglers() == [1]


def test_messages_have_the_number_of_no_collective() -> None:
    message = record("send float32[3] to 1", kind=Kind.MESSAGE)
    states = world(state(0, record()), state(1, message))
    assert Stall(states, [0, 1], KEY, []).stragglers() == [1]


def test_many_missing_ranks_are_counted() -> None:
    states = world(state(0, record()), *(state(rank, record(number=1)) for rank in range(1, 9)))
    told = str(Stall(states, range(9), KEY, []))
    assert told.count("(host") == 4
    assert told.endswith("and 4 more: 5-8")


def test_ranks_of_other_nodes_that_are_not_known_are_not_accused_without_evidence() -> None:
    states = world(state(0, record()), state(1, record()))
    assert str(Stall(states, range(4), KEY, [])) == ""
    assert str(Stall(states, range(4), KEY, [3])) == "Missing: rank 3 (on another node)"


def test_all_have_come_and_called_the_same() -> None:
    states = world(state(0, record()), state(1, record()))
    assert str(Stall(states, [0, 1], KEY, [])) == ""
    assert Stall(states, [0, 1], KEY, []).stragglers() == []


def test_the_table_has_a_row_per_rank_and_the_suspects_first() -> None:
    frames = (Site("/elsewhere/load.py", 5, "read"), Site("/elsewhere/train.py", 80, "<module>"))
    late = state(2, record(number=41, ended=55), stacks=(Stack("MainThread", frames),))
    lines = render_report("title", [state(0, record()), state(1, record()), late], [2]).splitlines()
    assert lines[0] == "title"
    assert [line.split()[0] for line in lines[1:5]] == ["rank", "2", "0", "1"]
    assert "done 55.0 s ago  /elsewhere/load.py:5 in read" in lines[2]
    assert "for 60.0 s" in lines[3]
    assert lines[5] == (
        "  rank 2, MainThread: /elsewhere/load.py:5 in read < /elsewhere/train.py:80"
    )


def test_of_many_ranks_those_that_do_the_same_share_a_row() -> None:
    states = [state(rank, record(number=41 if rank == 70 else 42)) for rank in range(100)]
    lines = render_report("title", states, [70]).splitlines()
    assert len(lines) == 4
    assert lines[2].split()[:3] == ["70", "35", "host35:170"]
    assert lines[3].startswith("  0-69, 71-99  0-49  host0:100, ...")


def test_a_report_has_room_on_the_screen_whatever_the_ranks_do() -> None:
    """Each is somewhere else, with many threads."""
    frames = tuple(Site("/elsewhere/load.py", line, "read") for line in range(30))
    stacks = tuple(Stack(name, frames) for name in ("MainThread", *map(str, range(50))))
    states = [
        state(rank, record(number=rank, line=rank, ended=1), stacks=stacks) for rank in range(64)
    ]
    found = Stall(world(*states), range(64), KEY, []).causes()
    what_to_do = Stall(world(*states), range(64), KEY, []).cure()
    lines = render_report("title", states, range(42), causes=found, cure=what_to_do).splitlines()
    assert len(lines) < 40
    assert lines[0].startswith("Missing: rank 0 (host0:100), now at /elsewhere/load.py:0 in read")
    assert lines[1:3] == ["  title", f"  Cure: {what_to_do}"]
    assert "  and 52 lines more" in lines
    assert sum("threads more" in line for line in lines) == 4


def test_the_processes_of_a_node_are_a_range() -> None:
    hosts = ["n1"] * 4 + ["n2"] * 3
    pids = [10, 11, 12, 14, 9, 8, 7]
    assert processes([0] * 4 + [1] * 3, hosts, pids) == (
        "rank 0-3 on n1 (pid 10-12, 14), rank 4-6 on n2 (pid 9, 8, 7)"
    )


@pytest.mark.parametrize("per_node", [1, 4, 1000])
def test_a_thousand_ranks_have_a_short_line(per_node: int) -> None:
    """Also where the process numbers of a node are no range."""
    nodes = [rank // per_node for rank in range(1000)]
    arguments = nodes, [f"node{node:04}" for node in nodes], [7 * rank for rank in range(1000)]
    line = processes(*arguments)
    assert len(line) < 500
    assert "MPIDIST_LOG=debug" in line
    assert f"on node{nodes[-1]:04}" in line
    assert "6993" in processes(*arguments, short=False)


def test_a_failed_operation_is_told_apart() -> None:
    failed = OperationRecord(
        1, Kind.BLOCKING, "x", "g", 7, 1, Site("", 0, ""), NOW, -(NOW - SECOND), 0
    )
    assert "failed 1.0 s ago" in render_report("title", [state(0, failed)], [])


def test_places_are_short(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert format_site(Site(f"{tmp_path}/a/b.py", 3, "f")) == "a/b.py:3 in f"
    assert format_site(Site("/else/b.py", 3, "<module>")) == "/else/b.py:3"
    assert format_site(Site("", 0, "")) == "?"


def test_a_state_survives_json() -> None:
    wait = Wait(1, Site("a.py", 2, "f"), 0.5)
    stacks = (Stack("MainThread", (Site("a.py", 3, "g"),)),)
    before = state(3, record(), record("b", number=1), wait=wait, stacks=stacks, claimed=0.25)
    after = RankState.from_json(json.loads(json.dumps(asdict(before))))
    assert after == before
