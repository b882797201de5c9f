"""The parts of all ranks as one file in the Trace Event Format, which Perfetto and Chrome open.

A process is a rank. Its thread 0 is the thread that began the trace: regions, and inside them
``compute``, blocking collectives and waits, which never overlap. Thread 1 is what is in flight:
immediate operations, messages and transfers of units, as pairs of asynchronous events. Other
threads that communicate follow.

References
----------
Duca, Sinclair et al., Trace Event Format (Google, 2016).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from mpidist._new_file import create_unique
from mpidist.tracing.clock import Clock, Reading
from mpidist.tracing.parts import TRANSFER, TracePart, TraceRow

COMPUTE = "compute"
"""Category and name of the main thread's time in no collective and no wait."""

MAIN, _IN_FLIGHT = 0, 1
"""Threads of a process; others that communicate follow."""

MERGED = 1
"""Version of what this module writes into ``otherData``."""

_BUSY = ("blocking", "wait")
_FLYING = ("immediate", "message", TRANSFER)

_ARRAY = re.compile(r"(\w+)\[([\d, ]*)\]")


_encode = json.JSONEncoder(separators=(",", ":")).encode


class _Arrival(NamedTuple):
    """The rank that arrived last at a collective, as far as is known, and how many arrived."""

    verb: str
    rank: int
    time: int
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class _Lane:
    """A rank's part, by rank 0's clock."""

    part: TracePart
    clock: Clock
    began: int
    ended: int

    @property
    def rank(self) -> int:
        rank: int = self.part.facts["rank"]
        return rank

    def rows(self) -> Iterator[TraceRow]:
        """Yield the rows within the trace, by rank 0's clock."""
        translate = self.clock.translate
        for row in self.part.rows():
            began, ended = translate(row.began), translate(row.ended)
            if ended > self.began and began < self.ended:
                began, ended = max(began, self.began), min(ended, self.ended)
                yield row._replace(began=began, ended=ended)


def write_trace(parts: Iterable[TracePart], path: Path) -> None:
    """Write the trace of all ranks; of a job that ended badly, parts may be missing or cut off.

    The file appears when it is complete; it is compressed if its name ends with ``.gz``. The memory
    taken is that for the events of one rank, and a few numbers for each collective.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    lanes = _lanes(sorted(parts, key=lambda part: int(part.facts["rank"])))
    arrivals = _arrivals(lanes)
    origin = min(lane.began for lane in lanes)
    # It becomes the trace, so it is as readable as any file that the user makes.
    descriptor, name = create_unique(path.parent, path.name, ".new", mode=0o666)
    fresh = Path(name)
    try:
        with _open(descriptor, compressed=path.suffix == ".gz") as file:
            about = {"displayTimeUnit": "ms", "otherData": _about(lanes, origin)}
            file.write(json.dumps(about, indent=1)[:-2] + ',\n "traceEvents": [\n')
            comma = ""
            for lane in lanes:
                for event in _events(lane, arrivals, origin):
                    file.write(comma + _encode(event))
                    comma = ",\n"
            file.write("\n]}\n")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _open(descriptor: int, *, compressed: bool) -> Iterator[IO[str]]:
    with os.fdopen(descriptor, "wb") as raw:
        binary: Any = raw
        if compressed:
            binary = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=5, mtime=0)
        with io.TextIOWrapper(binary, encoding="utf-8") as file:
            yield file


def _lanes(parts: Sequence[TracePart]) -> list[_Lane]:
    clocks = {parts[0].facts["clock"]: Clock()}
    for part in parts:
        readings = [Reading(*fields) for fields in part.facts.get("readings", ())]
        if readings:
            clocks[part.facts["clock"]] = Clock(*readings)
    lanes = []
    for part in parts:
        facts = part.facts
        clock = clocks.get(facts["clock"], Clock())
        ended = facts.get("full_at") or facts.get("ended")
        if ended is None:  # the rank was killed
            ended = max((row.ended for row in part.rows()), default=facts["began"])
        lanes.append(_Lane(part, clock, *map(clock.translate, (facts["began"], ended))))
    return lanes


def _arrivals(lanes: Sequence[_Lane]) -> dict[tuple[int, int], _Arrival]:
    """Return who arrived last at each collective, by group identity and number."""
    arrivals: dict[tuple[int, int], _Arrival] = {}
    for lane in lanes:
        for row in lane.rows():
            if row.identity and row.kind in ("blocking", "immediate"):
                key = (row.identity, row.number)
                new = _Arrival(_verb(row), lane.rank, row.began)
                old = arrivals.get(key)
                if old is not None:
                    last = new if new.time > old.time else old
                    new = last._replace(verb=old.verb, ranks=old.ranks + 1)
                arrivals[key] = new
    return arrivals


def _verb(row: TraceRow) -> str:
    return row.what.partition(" ")[0]


# -- the head of the file --------------------------------------------------------------------------


def _about(lanes: Sequence[_Lane], origin: int) -> dict[str, Any]:
    ranks = [
        {
            "rank": lane.rank,
            "host": lane.part.facts["host"],
            "pid": lane.part.facts["pid"],
            "began": _microseconds(lane.began - origin),
            "ended": _microseconds(lane.ended - origin),
            "clock_uncertainty": _microseconds(lane.clock.uncertainty),
            "dropped": lane.part.facts.get("dropped", 0),
            "complete": lane.part.facts.get("complete", False),
        }
        for lane in lanes
    ]
    return {
        "mpidist": MERGED,
        "size": lanes[0].part.facts["size"],
        "started": lanes[0].part.facts["started"],
        "ranks": ranks,
        "notes": [*_notes(lanes)],
    }


def _notes(lanes: Sequence[_Lane]) -> Iterator[str]:
    size = lanes[0].part.facts["size"]
    missing = sorted(set(range(size)) - {lane.rank for lane in lanes})
    if missing:
        yield f"nothing is known of rank {', '.join(map(str, missing))}"
    for lane in lanes:
        facts = lane.part.facts
        if facts.get("dropped"):
            yield (
                f"rank {lane.rank} was recorded up to its event {facts['limit']:,}, as many as "
                f"are kept; {facts['dropped']:,} more are missing"
            )
        if not facts.get("complete"):
            yield f"rank {lane.rank} did not come to the trace's end; its last events are missing"
        if facts["clock"] != lanes[0].part.facts["clock"] and lane.clock.first is None:
            yield f"the clock of rank {lane.rank} was never compared with rank 0's"


# -- events ----------------------------------------------------------------------------------------


def _events(
    lane: _Lane, arrivals: dict[tuple[int, int], _Arrival], origin: int
) -> Iterator[dict[str, Any]]:
    """Yield the events of one rank, those of each thread in the order of their times."""
    rows = sorted(lane.rows(), key=lambda row: (row.thread, row.began, -row.ended))
    flying = [row for row in rows if row.kind in _FLYING]
    threads = sorted({row.thread for row in rows} | {0})
    yield from _names(lane, threads)
    for thread in threads:
        own = [row for row in rows if row.thread == thread and row.kind not in _FLYING]
        # Only of the main thread it is known that it computes when it does not communicate.
        spans = _with_compute(own, lane.began, lane.ended) if thread == 0 else _nested(own)
        for row in spans:
            busy = row.kind in _BUSY
            event = {
                "ph": "X",
                "name": "wait " * (row.kind == "wait") + (_verb(row) if busy else row.what),
                "cat": row.kind,
                "pid": lane.rank,
                "tid": thread + 1 if thread else MAIN,
                "ts": _microseconds(row.began - origin),
                "dur": _microseconds(row.ended - row.began),
            }
            yield event | {"args": _args(row, arrivals)} if busy else event
    yield from _pairs(flying, lane, arrivals, origin)


def _names(lane: _Lane, threads: Sequence[int]) -> Iterator[dict[str, Any]]:
    def named(what: str, thread: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": lane.rank, "tid": thread, "args": args}

    yield named("process_name", MAIN, name=f"rank {lane.rank} ({lane.part.facts['host']})")
    yield named("process_sort_index", MAIN, sort_index=lane.rank)
    names = {MAIN: "main", _IN_FLIGHT: "in flight"}
    names |= {thread + 1: f"thread {thread}" for thread in threads if thread}
    for number, name in names.items():
        yield named("thread_name", number, name=name)
        yield named("thread_sort_index", number, sort_index=number)


def _pairs(
    rows: Sequence[TraceRow],
    lane: _Lane,
    arrivals: dict[tuple[int, int], _Arrival],
    origin: int,
) -> Iterator[dict[str, Any]]:
    """Yield the begins and ends of what was in flight, in the order of their times."""
    timed: list[tuple[int, int, dict[str, Any]]] = []
    for count, row in enumerate(sorted(rows, key=lambda row: row.began)):
        common = {
            "name": row.what if row.kind == TRANSFER else _verb(row),
            "cat": row.kind,
            "id": hex(lane.rank << 32 | count),
            "pid": lane.rank,
            "tid": _IN_FLIGHT,
        }
        begin = {"ph": "b", **common, "ts": _microseconds(row.began - origin)}
        end = {"ph": "e", **common, "ts": _microseconds(row.ended - origin)}
        timed.append((row.began, 2 * count, begin | {"args": _args(row, arrivals)}))
        timed.append((row.ended, 2 * count + 1, end))
    timed.sort(key=lambda entry: entry[:2])
    for _, _, event in timed:
        yield event


def _nested(rows: Iterable[TraceRow]) -> Iterator[TraceRow]:
    """Cut off rows that end after the row around them, as a region in a generator can."""
    around: list[int] = []
    for row in rows:
        while around and around[-1] <= row.began:
            around.pop()
        ended = min(row.ended, around[-1]) if around else row.ended
        around.append(ended)
        yield row._replace(ended=ended)


def _with_compute(rows: Iterable[TraceRow], began: int, ended: int) -> Iterator[TraceRow]:
    """Add a row of computing where there is no collective and no wait, within one region each."""
    around: list[TraceRow] = []
    done = began
    end = TraceRow("", "", "", 0, 0, "", ended, ended, 0)
    for row in (*_nested(rows), end):
        while around and around[-1].ended <= row.began:
            yield from _filling(done, around[-1].ended, around)
            done = max(done, around.pop().ended)
        yield from _filling(done, row.began, around)
        done = max(done, row.began)
        if row is not end:
            yield row
            around.append(row)


def _filling(began: int, ended: int, around: Sequence[TraceRow]) -> Iterator[TraceRow]:
    if began < ended and not any(row.kind in _BUSY for row in around):
        yield TraceRow(COMPUTE, COMPUTE, "", 0, 0, "", began, ended, 0)


def _args(row: TraceRow, arrivals: dict[tuple[int, int], _Arrival]) -> dict[str, Any]:
    """Describe an operation; of a collective also for which rank it waited, and how long."""
    if row.kind == TRANSFER:
        return {"exposed_ms": row.number / 1e6}
    args: dict[str, Any] = {"what": row.what, "group": row.group, "site": row.site}
    args["number"] = row.number
    nbytes = bytes_of(row.what)
    if nbytes is not None:
        args["bytes"] = nbytes
    arrival = arrivals.get((row.identity, row.number))
    # A message has a number of its own, which may be that of a collective.
    if arrival is not None and arrival.ranks > 1 and arrival.verb == _verb(row):
        args["last"] = arrival.rank
        args["waited_ms"] = max(0, min(arrival.time, row.ended) - row.began) / 1e6
    return args


def bytes_of(what: str) -> int | None:
    """Return the bytes of the array that the description of an operation names, or None.

    Examples
    --------
    >>> bytes_of("all_reduce SUM float32[10, 100]")
    4000
    >>> bytes_of("barrier") is None
    True
    """
    match = _ARRAY.search(what)
    if match is None:
        return None
    bits = re.search(r"\d+$", match[1])
    if bits is None and match[1] != "bool":
        return None
    shape = [int(length) for length in match[2].split(",") if length.strip()]
    return prod(shape) * (int(bits[0]) // 8 if bits else 1)


def _microseconds(nanoseconds: int) -> float:
    return nanoseconds / 1000
