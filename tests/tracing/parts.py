"""Parts of traces made up for tests: times in milliseconds, as people count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpidist.tracing.chrome import write_trace
from mpidist.tracing.parts import FORMAT, TracePart, TraceRow, _packed
from mpidist.tracing.summary import load

MS = 1_000_000


def row(kind: str, what: str, began: float, ended: float, number: int = 0, **more: Any) -> TraceRow:
    """Make a row; of group 7 unless said otherwise."""
    identity = more.pop("identity", 0 if kind == "region" else 7)
    site = more.pop("site", "train.py:1")
    thread = more.pop("thread", 0)
    assert not more
    times = round(began * MS), round(ended * MS)
    return TraceRow(kind, what, "world", identity, number, site, *times, thread)


def part(
    rank: int, rows: list[TraceRow], *, ended: float | None = 100, size: int = 2, **facts: Any
) -> TracePart:
    """Make the part of a rank that was recorded from 0 ms on."""
    known = {
        "format": FORMAT,
        "run": "1",
        "rank": rank,
        "size": size,
        "host": "node0",
        "pid": 100 + rank,
        "clock": "a",
        "limit": 1000,
        "started": "2026-01-01T00:00:00+00:00",
        "began": 0,
        "ended": None if ended is None else round(ended * MS),
        "complete": True,
    }
    facts = {key: value for key, value in (known | facts).items() if value is not None}
    return TracePart.of(_packed([facts, rows]))


def trace_of(parts: list[TracePart], directory: Path, name: str = "trace.json") -> dict[str, Any]:
    """Write the trace of some parts, and read it."""
    path = directory / name
    write_trace(parts, path)
    return load(path)
