"""The file: what the format asks, whom a collective waited for, and nothing lost in between."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from mpidist.tracing.chrome import bytes_of
from tests.tracing.format import check_trace
from tests.tracing.parts import part, row, trace_of

SUM = "all_reduce SUM float32[1000]"


def two_ranks() -> list[Any]:
    """Rank 1 comes 20 ms late to a sum, and its immediate one is waited for."""
    return [
        part(
            0,
            [
                row("blocking", SUM, 10, 35, 1),
                row("region", "forward", 5, 40),
                row("immediate", f"i{SUM}", 50, 80, 2, site="train.py:9"),
                row("wait", f"i{SUM}", 60, 81, 2),
                row("region", "step", 5, 90),
                row("message", "send", 91, 95, 1),
                row("wait", "send", 92, 95, 1),
            ],
        ),
        part(
            1,
            [
                row("blocking", SUM, 30, 35, 1),
                row("immediate", f"i{SUM}", 75, 80, 2),
                row("wait", f"i{SUM}", 76, 81, 2),
                row("region", "step", 5, 90),
                row("blocking", "barrier", 91, 92, 3, thread=1),
            ],
        ),
    ]


def found(document: dict[str, Any], **wanted: Any) -> list[Any]:
    return [e for e in document["traceEvents"] if wanted.items() <= e.items()]


def test_a_trace_keeps_the_rules_of_the_format(tmp_path: Path) -> None:
    document = trace_of(two_ranks(), tmp_path)
    check_trace(document)
    names = {e["args"]["name"] for e in found(document, ph="M") if "name" in e["args"]}
    assert names == {"rank 0 (node0)", "rank 1 (node0)", "main", "in flight", "thread 1"}


def changed(document: dict[str, Any], change: Any, **wanted: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    change(found(document, **wanted)[0], document["traceEvents"])
    return document


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        ({"ph": "X"}, lambda event, _: event.pop("dur")),
        ({"ph": "X"}, lambda event, _: event.pop("cat")),
        ({"ph": "X"}, lambda event, _: event.update(dur=-1)),
        ({"ph": "X"}, lambda event, _: event.update(ph="Y")),
        ({"ph": "X"}, lambda event, _: event.update(pid="0")),
        ({"ph": "X", "name": "forward"}, lambda event, _: event.update(dur=60_000)),
        ({"ph": "X", "name": "forward"}, lambda event, _: event.update(ts=99_000)),
        ({"ph": "X"}, lambda event, _: event.update(tid=7)),
        ({"ph": "b"}, lambda event, _: event.pop("id")),
        ({"ph": "b"}, lambda event, _: event.update(id="x")),
        ({"ph": "b"}, lambda event, _: event.update(id="0x77")),
        ({"ph": "b"}, lambda event, events: events.remove(event)),
        ({"ph": "e"}, lambda event, events: events.remove(event)),
        ({"ph": "e"}, lambda event, _: event.update(ts=1)),
        ({"ph": "M", "name": "process_name"}, lambda event, _: event.update(args={})),
        ({"ph": "M", "name": "thread_name"}, lambda event, events: events.remove(event)),
    ],
)
def test_what_breaks_the_rules_is_found(tmp_path: Path, wanted: Any, change: Any) -> None:
    document = changed(trace_of(two_ranks(), tmp_path), change, **wanted)
    with pytest.raises((AssertionError, KeyError, jsonschema.ValidationError)):
        check_trace(document)


def test_a_collective_says_who_came_last_and_how_long_this_rank_waited(tmp_path: Path) -> None:
    document = trace_of(two_ranks(), tmp_path)
    waited = {
        (e["pid"], e["name"]): (e["args"]["last"], e["args"]["waited_ms"])
        for e in document["traceEvents"]
        if "last" in e.get("args", {})
    }
    assert waited == {
        (0, "all_reduce"): (1, 20),
        (1, "all_reduce"): (1, 0),
        (0, "iall_reduce"): (1, 25),
        (1, "iall_reduce"): (1, 0),
        (0, "wait iall_reduce"): (1, 15),
        (1, "wait iall_reduce"): (1, 0),
    }


def test_an_operation_carries_what_is_known_of_it(tmp_path: Path) -> None:
    document = trace_of(two_ranks(), tmp_path)
    (sum_,) = found(document, pid=0, name="all_reduce")
    assert sum_["args"] | {"last": 0, "waited_ms": 0} == {
        "what": SUM,
        "group": "world",
        "site": "train.py:1",
        "number": 1,
        "bytes": 4000,
        "last": 0,
        "waited_ms": 0,
    }
    assert (sum_["ts"], sum_["dur"]) == (10_000, 25_000)


def test_compute_and_communication_fill_the_main_thread(tmp_path: Path) -> None:
    document = trace_of(two_ranks(), tmp_path)
    compute = [(e["ts"], e["ts"] + e["dur"]) for e in found(document, pid=0, name="compute")]
    assert compute == [
        (0, 5_000),
        (5_000, 10_000),
        (35_000, 40_000),
        (40_000, 60_000),
        (81_000, 90_000),
        (90_000, 92_000),
        (95_000, 100_000),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_any_calls_are_nested_and_filled(tmp_path: Path, seed: int) -> None:
    """Random trees of regions and operations, and now and then one that ends too late."""
    rng = np.random.default_rng(seed)
    rows = []

    def fill(began: int, ended: int, depth: int) -> None:
        times = sorted(rng.integers(began, ended + 1, 2 * rng.integers(0, 4)))
        for a, b in zip(times[::2], times[1::2], strict=True):
            kind = ["region", "blocking", "wait"][rng.integers(3)]
            late = int(rng.integers(0, 3) == 0) * int(rng.integers(0, 5))
            rows.append(row(kind, "barrier", int(a), int(b) + late, len(rows)))
            if depth:
                fill(int(a), int(b), depth - 1)

    fill(0, 1000, 3)
    document = trace_of([part(0, rows, ended=1000, size=1)], tmp_path)
    check_trace(document)
    busy = np.zeros(1000, bool)
    for event in document["traceEvents"]:
        if event["ph"] == "X" and event["cat"] in ("blocking", "wait"):
            busy[int(event["ts"]) // 1000 : int(event["ts"] + event["dur"]) // 1000] = True
    compute = np.zeros(1000, int)
    for event in found(document, name="compute"):
        compute[int(event["ts"]) // 1000 : int(event["ts"] + event["dur"]) // 1000] += 1
    assert (compute + busy == 1).all()


def test_what_lies_outside_the_trace_is_cut_off(tmp_path: Path) -> None:
    rows = [row("blocking", "barrier", -5, 10, 1), row("immediate", "ibarrier", 90, 120, 2)]
    rows += [row("blocking", "barrier", -9, -8, 3), row("blocking", "barrier", 110, 111, 4)]
    document = trace_of([part(0, rows, size=1)], tmp_path)
    check_trace(document)
    (barrier,) = found(document, name="barrier")
    assert (barrier["ts"], barrier["dur"]) == (0, 10_000)
    assert [e["ts"] for e in found(document, name="ibarrier")] == [90_000, 100_000]


def test_numbers_of_messages_and_of_collectives_are_not_mixed_up(tmp_path: Path) -> None:
    rows = [row("message", "send", 1, 9, 1), row("wait", "send", 2, 9, 1)]
    parts = [part(0, rows), part(1, [row("blocking", SUM, 50, 60, 1)])]
    parts.append(part(2, [row("blocking", SUM, 55, 60, 1)]))
    document = trace_of(parts, tmp_path)
    assert all("last" not in event["args"] for event in found(document, pid=0, cat="wait"))
    assert found(document, pid=1, name="all_reduce")[0]["args"]["last"] == 2


def test_ranks_of_another_host_are_moved_to_the_clock_of_rank_0(tmp_path: Path) -> None:
    """Their clock is 7000 ms ahead at the begin, and gains 1 ms in 100."""
    ahead, later = 7000, 7101
    readings = [
        [ahead * 1_000_000, -7_000_000_000, 4000],
        [later * 1_000_000, -7_001_000_000, 9000],
    ]
    rows = [row("blocking", "barrier", ahead + 50.5, ahead + 60.6, 1)]
    facts: dict[str, Any] = {"clock": "b", "began": ahead * 1_000_000, "ended": later * 1_000_000}
    parts = [
        part(0, [row("blocking", "barrier", 10, 60, 1)], size=3),
        part(1, rows, size=3, readings=readings, **facts),
        part(2, rows, size=3, **facts),  # on the host of rank 1, which has asked for both
    ]
    document = trace_of(parts, tmp_path)
    for rank in (1, 2):
        (barrier,) = found(document, pid=rank, name="barrier")
        assert barrier["ts"] == pytest.approx(50_000, abs=1)
        assert barrier["dur"] == pytest.approx(10_000, abs=1)
        assert document["otherData"]["ranks"][rank]["clock_uncertainty"] == 9
    (barrier,) = found(document, pid=0, name="barrier")
    assert barrier["args"]["waited_ms"] == pytest.approx(40, abs=0.01)


def test_a_broken_job_leaves_what_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    parts = [
        part(0, [row("blocking", "barrier", 1, 30, 1)], size=4, ended=None, complete=None),
        part(2, [row("blocking", "barrier", 2, 30, 1)], size=4, dropped=5, full_at=40_000_000),
        part(3, [], size=4, clock="elsewhere"),
    ]
    document = trace_of(parts, tmp_path)
    check_trace(document)
    assert document["otherData"]["notes"] == [
        "nothing is known of rank 1",
        "rank 0 did not come to the trace's end; its last events are missing",
        "rank 2 was recorded up to its event 1,000, as many as are kept; 5 more are missing",
        "the clock of rank 3 was never compared with rank 0's",
    ]
    ended = {rank["rank"]: rank["ended"] for rank in document["otherData"]["ranks"]}
    assert ended == {0: 30_000, 2: 40_000, 3: 100_000}


def test_a_name_that_ends_with_gz_is_compressed(tmp_path: Path) -> None:
    trace_of(two_ranks(), tmp_path, "a.json.gz")
    trace_of(two_ranks(), tmp_path, "b.json")
    plain = (tmp_path / "b.json").read_bytes()
    assert gzip.decompress((tmp_path / "a.json.gz").read_bytes()) == plain
    assert json.loads(plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json.gz", "b.json"]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_trace_is_written_through_no_link(tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    for link in (name, f"{name}.new"):
        (tmp_path / link).symlink_to(target)
    assert trace_of(two_ranks(), tmp_path, name)["traceEvents"]
    assert target.read_text() == "precious"
    assert not (tmp_path / name).is_symlink()


@pytest.mark.parametrize(
    ("what", "nbytes"),
    [
        ("all_reduce SUM float32[1000]", 4000),
        ("broadcast bfloat16[2, 3] root 0", 12),
        ("broadcast complex128[] root 0", 16),
        ("all_reduce LOR bool[5]", 5),
        ("all_gather float32 in parts of 3 rows of [6]", None),
        ("iall_to_all float64 rows of [2]", None),
        ("new_group([0, 1])", None),
        ("barrier", None),
    ],
)
def test_bytes_are_read_from_the_words(what: str, nbytes: int | None) -> None:
    assert bytes_of(what) == nbytes
