"""The summary of a trace: where each rank's time went, and for which rank the others waited."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mpidist.observe.regions import STEP
from mpidist.tracing.chrome import COMPUTE, MAIN, MERGED
from mpidist.tracing.parts import TRANSFER

Spans: TypeAlias = "list[tuple[float, float]]"
"""Disjoint spans of time, in order."""

_BUSY = ("blocking", "wait")


@dataclass(frozen=True, slots=True)
class RankTime:
    """Where the time of one rank's main thread went, in seconds.

    Attributes
    ----------
    rank : int
        The rank in the group that was traced.
    host : str
        Name of its machine.
    wall : float
        All of its part of the trace: the sum of `compute` and `communication`.
    compute : float
        Time in no collective and in no wait.
    communication : float
        Time in blocking collectives and in waits.
    waiting : float
        The part of `communication` in which another rank had not arrived yet.
    in_flight : float
        Time in which an immediate operation or a message was under way.
    hidden : float or None
        The share of `in_flight` in which this rank computed, from 0 to 1; None if that is 0.
    """

    rank: int
    host: str
    wall: float
    compute: float
    communication: float
    waiting: float
    in_flight: float
    hidden: float | None


@dataclass(slots=True)
class CallTime:
    """What the calls of one operation at one place cost, over all ranks.

    Attributes
    ----------
    operation : str
        Name of the verb.
    site : str
        File and line of the caller.
    calls : int
        Number of calls, of all ranks.
    seconds : float
        Time of the ranks' main threads in the calls, and in waits for them.
    waiting : float
        The part of it in which another rank had not arrived yet.
    nbytes : int or None
        Bytes of all arrays together, where they are known.
    """

    operation: str
    site: str
    calls: int
    seconds: float
    waiting: float
    nbytes: int | None


@dataclass(frozen=True, slots=True)
class TransferTime:
    """What the transfers of one kind of one unit took, over all ranks, inside the steps.

    Attributes
    ----------
    name : str
        Such as ``unit 3: reduce``.
    count : int
        Number of transfers, of all ranks.
    seconds : float
        From their starts until they were found complete; the sum of `hidden` and `exposed`.
    hidden : float
        The part of it in which the ranks went on.
    exposed : float
        The part of it in which they waited for the transfer.
    """

    name: str
    count: int
    seconds: float
    hidden: float
    exposed: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One training step.

    Attributes
    ----------
    step : int
        Its number, counted from 0 from the begin of the trace.
    seconds : float
        Time of the rank that took longest.
    last : int or None
        The rank for which another one waited longest; None if nobody waited.
    behind : float
        How many seconds that one waited.
    """

    step: int
    seconds: float
    last: int | None
    behind: float


@dataclass(frozen=True, slots=True)
class Lateness:
    """How often the others waited for a rank.

    Attributes
    ----------
    rank : int
        The rank.
    steps : int
        The number of steps in which it was the `last`.
    mean, worst : float
        Mean and maximum, over these steps, of `behind`, in seconds.
    """

    rank: int
    steps: int
    mean: float
    worst: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A trace added up; the notes say what is missing from it.

    Ranks and units are in order, as are the steps that all ranks made. The longest calls come
    first, and the ranks that were last most often.
    """

    ranks: list[RankTime]
    calls: list[CallTime]
    transfers: list[TransferTime]
    steps: list[StepTime]
    lateness: list[Lateness]
    notes: list[str]


def load(path: Path) -> Any:
    """Return the JSON document of a trace, compressed or not.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it was written by something else.
    """
    data = path.read_bytes()
    try:
        document = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no JSON document: {error}") from error
    about = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(about, dict) or about.get("mpidist") != MERGED:
        raise ValueError(f"{path} is no trace that mpidist.trace or MPIDIST_TRACE has written")
    return document


def summarise(document: Mapping[str, Any]) -> Summary:
    """Add up a trace, as `load` returns it."""
    about = document["otherData"]
    events: dict[int, list[Any]] = {rank["rank"]: [] for rank in about["ranks"]}
    for event in document["traceEvents"]:
        events[event["pid"]].append(event)
    notes = list(about["notes"])
    steps = _steps(events, notes)
    return Summary(
        ranks=[_rank_time(rank, events[rank["rank"]]) for rank in about["ranks"]],
        calls=_calls(event for own in events.values() for event in own),
        transfers=_transfers(events),
        steps=steps,
        lateness=_lateness(steps),
        notes=notes,
    )


def _rank_time(about: Mapping[str, Any], events: Sequence[Any]) -> RankTime:
    main = [event for event in events if event["ph"] == "X" and event["tid"] == MAIN]
    compute = _union(_span(event) for event in main if event["cat"] == COMPUTE)
    busy = [event for event in main if event["cat"] in _BUSY]
    flights = _union(flight[1:] for flight in _flights(events) if flight[0]["cat"] != TRANSFER)
    in_flight = _length(flights)
    return RankTime(
        rank=about["rank"],
        host=about["host"],
        wall=(about["ended"] - about["began"]) / 1e6,
        compute=_length(compute),
        communication=_length(_union(map(_span, busy))),
        waiting=sum(map(_waited, busy)),
        in_flight=in_flight,
        hidden=_length(_common(flights, compute)) / in_flight if in_flight else None,
    )


def _flights(events: Sequence[Any]) -> Iterator[tuple[Any, float, float]]:
    """Yield what was in flight: the event at its begin, and begin and end in seconds."""
    begun = {event["id"]: event for event in events if event["ph"] == "b"}
    for event in events:
        if event["ph"] == "e":
            begin = begun[event["id"]]
            yield begin, begin["ts"] / 1e6, event["ts"] / 1e6


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    """Return begin and end in seconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def _waited(event: Mapping[str, Any]) -> float:
    return float(event["args"].get("waited_ms", 0.0)) / 1e3


def _union(spans: Iterable[tuple[float, float]]) -> Spans:
    joined: Spans = []
    for began, ended in sorted(spans):
        if joined and began <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(ended, joined[-1][1]))
        else:
            joined.append((began, ended))
    return joined


def _common(a: Spans, b: Spans) -> Spans:
    spans: Spans = []
    i = j = 0
    while i < len(a) and j < len(b):
        began, ended = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if began < ended:
            spans.append((began, ended))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return spans


def _length(spans: Spans) -> float:
    return sum(ended - began for began, ended in spans)


def _calls(events: Iterable[Any]) -> list[CallTime]:
    """Add up the operations of all ranks by verb and call site."""
    calls: dict[tuple[str, str], CallTime] = {}
    for event in events:
        category = event.get("cat")
        if event["ph"] == "e" or category not in ("blocking", "wait", "immediate", "message"):
            continue
        key = event["name"].removeprefix("wait "), event["args"]["site"]
        call = calls.setdefault(key, CallTime(*key, 0, 0.0, 0.0, 0))
        if category != "wait":
            call.calls += 1
            nbytes = event["args"].get("bytes")
            unknown = nbytes is None or call.nbytes is None
            call.nbytes = None if unknown else call.nbytes + nbytes
        if category in _BUSY:
            call.seconds += event["dur"] / 1e6
            call.waiting += _waited(event)
    return sorted(calls.values(), key=lambda call: -call.seconds)


def _transfers(events: Mapping[int, Sequence[Any]]) -> list[TransferTime]:
    """Add up the transfers of all ranks by name: those that begin within a step, if there are any.

    Outside are those of loading a state, for instance.
    """
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for own in events.values():
        steps = _step_spans(own)
        for begin, began, ended in _flights(own):
            inside = any(start <= began < end for start, end in steps)
            if begin["cat"] == TRANSFER and (inside or not steps):
                exposed = begin["args"]["exposed_ms"] / 1e3
                times[begin["name"]].append((ended - began, min(exposed, ended - began)))
    transfers = []
    for name in sorted(times, key=_by_number):
        seconds, exposed = map(sum, zip(*times[name], strict=True))
        transfers.append(TransferTime(name, len(times[name]), seconds, seconds - exposed, exposed))
    return transfers


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return what sorts unit 10 behind unit 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# -- steps -----------------------------------------------------------------------------------------


def _steps(events: Mapping[int, Sequence[Any]], notes: list[str]) -> list[StepTime]:
    """Return the steps that all ranks made, and for which rank the others waited in each."""
    regions = {rank: _step_spans(own) for rank, own in events.items()}
    counts = {len(spans) for spans in regions.values()}
    if counts == {0}:
        notes.append(
            f'no steps: put each in `with mpidist.region("{STEP}"):`, as mpidist.train does'
        )
        return []
    if len(counts) > 1:
        notes.append(
            f"the ranks made from {min(counts)} to {max(counts)} steps; the first ones count"
        )
    behind: list[dict[int, float]] = [{} for _ in range(min(counts))]
    for rank, own in events.items():
        for step, waited in enumerate(_waits(own, regions[rank][: min(counts)])):
            for last, seconds in waited.items():
                behind[step][last] = max(seconds, behind[step].get(last, 0.0))
    lengths = [
        max(ended - began for began, ended in spans)
        for spans in zip(*(regions[rank][: min(counts)] for rank in events), strict=True)
    ]
    return [_step(*measured) for measured in zip(range(min(counts)), lengths, behind, strict=True)]


def _step_spans(events: Sequence[Any]) -> Spans:
    """Return the steps of one rank; a step inside a step counts as a part of it."""
    spans: Spans = []
    for event in events:
        if event["ph"] == "X" and event["cat"] == "region" and event["name"] == STEP:
            began, ended = _span(event)
            if not spans or began >= spans[-1][1]:
                spans.append((began, ended))
    return spans


def _waits(events: Sequence[Any], steps: Spans) -> list[dict[int, float]]:
    """Return how long a rank waited for each other one, by step."""
    waited: list[dict[int, float]] = [{} for _ in steps]
    step = 0
    for event in events:
        if event["ph"] != "X" or event["tid"] != MAIN or event["cat"] not in _BUSY:
            continue
        began = event["ts"] / 1e6
        while step < len(steps) and steps[step][1] <= began:
            step += 1
        if step == len(steps):
            break
        seconds = _waited(event)
        if steps[step][0] <= began and seconds:
            last = event["args"]["last"]
            waited[step][last] = waited[step].get(last, 0.0) + seconds
    return waited


def _step(number: int, seconds: float, behind: Mapping[int, float]) -> StepTime:
    last = max(behind, key=lambda rank: behind[rank], default=None)
    return StepTime(number, seconds, last, 0.0 if last is None else behind[last])


def _lateness(steps: Sequence[StepTime]) -> list[Lateness]:
    times: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        if step.last is not None:
            times[step.last].append(step.behind)
    lateness = [
        Lateness(rank, len(delays), sum(delays) / len(delays), max(delays))
        for rank, delays in times.items()
    ]
    return sorted(lateness, key=lambda entry: (-entry.steps, -entry.mean))
