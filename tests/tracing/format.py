"""What the Trace Event Format asks of a file: fields by a schema, the rest by looking."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads(Path(__file__).with_name("trace_event_format.json").read_text())


def check_trace(document: dict[str, Any]) -> None:
    """Raise unless the viewers' rules are kept."""
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    events = document["traceEvents"]
    _check_names(events)
    _check_pairs([event for event in events if event["ph"] in "be"])
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    for mine in threads.values():
        _check_nesting(mine)


def _check_names(events: list[Any]) -> None:
    """Every process and every thread with events has one name."""
    named = [(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"]
    assert len(named) == len(set(named))
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"} <= set(named)
    processes = [e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"]
    assert sorted(processes) == sorted({e["pid"] for e in events})


def _check_pairs(events: list[Any]) -> None:
    """Every begin has one end: the same category, id, name and process, and not before it."""
    open_: dict[Any, float] = {}
    seen = set()
    last: dict[int, float] = defaultdict(float)
    for event in events:
        assert event["ts"] >= last[event["pid"]], "begins and ends are in order"
        last[event["pid"]] = event["ts"]
        key = event["cat"], event["id"], event["name"], event["pid"]
        if event["ph"] == "b":
            assert event["id"] not in seen, "an id is used once, over all processes"
            seen.add(event["id"])
            open_[key] = event["ts"]
        else:
            assert event["ts"] >= open_.pop(key), "an end has a begin before it"
    assert not open_, "a begin has an end"


def _check_nesting(events: list[Any]) -> None:
    """Complete events of a thread are in order, and one ends within the one around it."""
    around: list[int] = []
    last = 0
    for event in events:
        # Whole nanoseconds: the file's microseconds have three decimals.
        began = round(event["ts"] * 1000)
        ended = began + round(event["dur"] * 1000)
        assert began >= last
        last = began
        while around and around[-1] <= began:
            around.pop()
        assert not around or ended <= around[-1], f"{event} ends after the event around it"
        around.append(ended)
