"""Reports: which ranks are missing, and what every rank was doing."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict

from mpidist import env
from mpidist._formatting import columns, format_ranges
from mpidist._new_file import create_unique
from mpidist.observe.recorder import is_inside
from mpidist.observe.recorder.recorder import Site
from mpidist.observe.recorder.recording import OperationRecord
from mpidist.observe.watch.states import RankState, Stack, Status

_NAMED = 4
"""Ranks that a sentence lists one by one."""

_ROWS = 8
"""Ranks of which each has a line; of more, those that do the same share one."""

_LINES = 12
"""Lines of the table, which must leave room on the screen for what stands around it."""

_FRAMES = 6

_THREADS = 3
"""Threads of a rank whose stacks are shown."""

_LINE = 400
"""Characters of the line that says where the ranks of a job are."""

_LIBRARY = os.__file__.removesuffix("os.py")

Key = tuple[int, int]
States = Mapping[int, RankState]


def format_site(site: Site) -> str:
    """Return a call site as text: file, relative to this directory, line, and function."""
    if not site.file:
        return "?"
    try:
        directory = os.getcwd() + os.sep  # noqa: PTH109  # a text is wanted
    except OSError:  # it has been removed
        directory = ""
    file = site.file.removeprefix(directory)
    inside = f" in {site.function}" if site.function not in ("", "<module>") else ""
    return f"{file}:{site.line}{inside}"


class Stall:
    """What keeps an operation from being complete, as far as is known.

    Parameters
    ----------
    states : mapping of int to RankState
        What is known, by rank of the world.
    members : sequence of int
        The ranks of the group, in the world.
    key : (int, int), optional
        Identity of the group and number of the collective.
    missing : sequence of int
        Ranks of the world that are known not to have arrived.
    """

    def __init__(
        self, states: States, members: Sequence[int], key: Key | None, missing: Sequence[int]
    ) -> None:
        self._states = states
        self._members = members
        self._key = key
        self._known = known = {rank: states[rank] for rank in members if rank in states}
        came: set[int] = set()
        if key is not None:
            came = {r for r, state in known.items() if state.came_to(key) or state.has_passed(key)}
            missing = [*missing, *(rank for rank, state in known.items() if state.records)]
        self._absent = sorted({*missing} - came)
        # These have arrived, but cannot go on.
        self._gone = [
            rank
            for rank, state in known.items()
            if state.status in (Status.DEAD, Status.STOPPED) and rank not in self._absent
        ]
        self._away = [r for r, state in known.items() if key is not None and state.stays_away(key)]
        self._difference = None if key is None else _first_difference(known, key)

    def __str__(self) -> str:
        """Return the causes as one text, for an error."""
        return ". ".join(self.causes())

    def causes(self) -> list[str]:
        """Return a sentence for each thing that keeps the operation from being complete."""
        states, absent, sentences = self._states, self._absent, []
        if self._difference is not None:
            where = "" if self._difference == self._key else f" in #{self._difference[1]}"
            calls = callers(states, self._members, self._difference)
            sentences.append(f"The ranks called different things{where}: {calls}")
        for word, ranks in (("Missing", absent), ("Begun, but not waited for", self._away)):
            named = [_absence(rank, states.get(rank)) for rank in ranks[:_NAMED]]
            if len(ranks) > _NAMED:
                named.append(f"and {len(ranks) - _NAMED} more: {format_ranges(ranks[_NAMED:])}")
            if named:
                sentences.append(f"{word}: {'; '.join(named)}")
        for status in (Status.DEAD, Status.STOPPED):
            ranks = [rank for rank in self._gone if states[rank].status is status]
            if ranks:
                sentences.append(f"{status.value.capitalize()}: rank {format_ranges(ranks)}")
        return sentences + _silences(states, [*self._members, *absent])

    def cure(self) -> str:
        """Return what to do about the first of the causes; empty where there is none."""
        if self._difference is not None:
            return "let all ranks make the same calls in the same order"
        silent = [rank for rank, state in self._known.items() if state.status is Status.SILENT]
        for rank in (*self._absent, *self._gone, *silent):
            return _cure(rank, self._states.get(rank))
        for rank in self._away:
            return (
                f"let rank {rank} wait for it soon: it may need every rank again before it ends; "
                "if that is only slow, give it longer: init(timeout=...)"
            )
        if self._key is None:
            return ""
        return (
            "all have come, as far as is known; MPIDIST_DEBUG=1 compares calls on device arrays, "
            "too, before they begin"
        )

    def stragglers(self) -> list[int]:
        """Return the ranks that are missing or gone, or called something else than most."""
        calls: dict[int, list[int]] = {}
        for rank, record in _came(self._known, self._difference).items():
            calls.setdefault(record.call, []).append(rank)
        odd = sorted(calls.values(), key=len)[:-1]
        named = [*self._absent, *self._gone, *self._away]
        return sorted({*named, *(rank for ranks in odd for rank in ranks)})


def _came(known: States, key: Key | None) -> dict[int, OperationRecord]:
    """Return the record of a collective of each rank that has arrived at it."""
    if key is None:
        return {}
    records = {rank: state.came_to(key) for rank, state in known.items()}
    return {rank: record for rank, record in records.items() if record is not None}


def _first_difference(known: States, key: Key) -> Key | None:
    """Return the first collective, up to this one, in which ranks are recorded to differ.

    A rank may have passed it, and wait for the others somewhere else.
    """
    records_of: dict[int, list[OperationRecord]] = {}
    for state in known.values():
        for record in state.records:
            if record.number <= key[1] and record.is_of((key[0], record.number)):
                records_of.setdefault(record.number, []).append(record)
    # A difference in a call that has ended on all ranks was reported, and keeps no rank waiting.
    different = [
        number
        for number, records in records_of.items()
        if len({r.call for r in records}) > 1 and any(not r.ended for r in records)
    ]
    return (key[0], min(different)) if different else None


def _silences(states: States, ranks: Iterable[int]) -> list[str]:
    """Return a sentence for ranks that cannot say where they are, and one for such nodes."""
    silent = [rank for rank in sorted({*ranks} & {*states}) if states[rank].status is Status.SILENT]
    held = [rank for rank in silent if states[rank].records]
    unheard = [rank for rank in silent if not states[rank].records]
    sentences = []
    if held:
        last = states[held[0]].current
        where = f", after {format_site(last.site)}" if last is not None and len(held) == 1 else ""
        sentences.append(
            f"Silent: rank {format_ranges(held)}: no thread of it runs: foreign code holds "
            f"Python's lock (the GIL){where}"
        )
    if unheard:
        hosts = sorted({states[rank].process.partition(":")[0] for rank in unheard})
        named = ", ".join(hosts[:_NAMED]) + ", ..." * (len(hosts) > _NAMED)
        sentences.append(f"Silent: rank {format_ranges(unheard)}: nothing is heard from {named}")
    return sentences


def _cure(rank: int, state: RankState | None) -> str:
    """Return what to do about a rank that others wait for."""
    status = Status.UNKNOWN if state is None else state.status
    pid = "PID" if state is None else state.process.rpartition(":")[2]
    if status is Status.DEAD:
        return f"look in rank {rank}'s output, the launcher's, and dmesg, for who ended it, and why"
    if status is Status.STOPPED:
        return f"let it go on (kill -CONT {pid}), and find out who has stopped it"
    if status is Status.SILENT:
        return f"see where it is from outside: py-spy dump --native --pid {pid}, or gdb -p {pid}"
    if status is Status.LEAVING:
        return f"let rank {rank} make as many calls as the others, or raise an exception"
    return (
        f"let rank {rank} make this call, too; if it is only slow, give it longer: "
        "init(timeout=...)"
    )


def callers(states: States, members: Sequence[int], key: Key) -> str:
    """Return which ranks called what at which lines, as far as is known; the rarest calls first."""
    calls: dict[tuple[int, str], list[int]] = {}
    known = {rank: states[rank] for rank in members if rank in states}
    for rank, record in _came(known, key).items():
        call = f"{record.what} at {format_site(record.site)}"
        calls.setdefault((record.call, call), []).append(rank)
    ordered = sorted(calls.items(), key=lambda call: len(call[1]))
    sentences = [
        f"rank {format_ranges(ranks)} called {call}" for (_, call), ranks in ordered[:_NAMED]
    ]
    return "; ".join([*sentences, "..."] if len(ordered) > _NAMED else sentences)


def _absence(rank: int, state: RankState | None) -> str:
    if state is None:
        return f"rank {rank} (on another node)"
    status = "" if state.status is Status.ALIVE else f", {state.status}"
    now = _now_at(state)
    head = f"rank {rank} ({state.process}{status}), " + (f"now at {now}, " if now else "")
    record = state.current
    if record is None:
        return f"{head}which has called nothing"
    call = f"{record} of group {record.group!r}, called at {format_site(record.site)}"
    if state.wait is not None and state.wait.sequence == record.sequence:
        return f"{head}waiting at {format_site(state.wait.site)} for {call}"
    return f"{head}{_when(state, record)} {'with' if record.ended else 'in'} {call}"


def render_report(
    title: str,
    states: Iterable[RankState],
    first: Collection[int],
    *,
    causes: Sequence[str] = (),
    cure: str = "",
) -> str:
    """Return a report: the causes, the title, the cure, a table, and the stacks of some ranks.

    The ranks in `first` stand at the top of the table, and their stacks are shown.
    """
    ordered = sorted(states, key=lambda state: (state.rank not in first, state.rank))
    rows = [_row(state) for state in ordered]
    if len(rows) > _ROWS:
        rows = _joined(rows, first)
    lines = "\n  ".join([*causes, title, *([f"Cure: {cure}"] if cure else [])]).splitlines()
    header = ("rank", "node", "process", "state", "last operation", "called at", "when", "now at")
    lines += _table(header, rows[:_LINES]) if rows else []
    if len(rows) > _LINES:
        lines.append(f"  and {len(rows) - _LINES} lines more")
    for state in [state for state in ordered if state.rank in first][:_NAMED]:
        stacks = [stack for stack in state.stacks if _outside(stack)]
        for stack in stacks[:_THREADS]:
            called = " < ".join(map(format_site, _outside(stack)[:_FRAMES]))
            lines.append(f"  rank {state.rank}, {stack.thread}: {called}")
        if len(stacks) > _THREADS:
            lines.append(f"  rank {state.rank} has {len(stacks) - _THREADS} threads more")
    return "\n".join(lines)


def _row(state: RankState) -> tuple[str, ...]:
    record, now = state.current, _now_at(state)
    head = (str(state.rank), str(state.node), state.process, str(state.status))
    if record is None:
        return (*head, "none", "", "", now)
    name = f"{record} of {record.group}"
    return (*head, name, format_site(record.site), _when(state, record), now)


def _when(state: RankState, record: OperationRecord) -> str:
    if state.wait is not None and state.wait.sequence == record.sequence:
        return f"waits {state.wait.seconds:.1f} s"
    if not record.ended:
        return f"for {state.seconds(record.began):.1f} s"
    word = "failed" if record.ended < 0 else "done"
    return f"{word} {state.seconds(record.ended):.1f} s ago"


def _now_at(state: RankState) -> str:
    """Return the innermost line outside this package at which the main thread is."""
    for stack in state.stacks:
        if stack.thread == "MainThread":
            frames = _outside(stack)
            return format_site(frames[0]) if frames else ""
    return ""


def _outside(stack: Stack) -> list[Site]:
    """Return the frames outside this package, and outside what it calls of Python's library."""
    sites: list[Site] = []
    library: list[Site] = []  # their callers follow
    for site in stack.frames:
        if is_inside(site.file):
            library.clear()
        elif site.file.startswith(_LIBRARY) and "-packages" not in site.file:
            library.append(site)
        else:
            sites += [*library, site]
            library.clear()
    return sites + library


def _joined(rows: Sequence[tuple[str, ...]], first: Collection[int]) -> list[tuple[str, ...]]:
    """Merge the rows of ranks that do the same; the smallest sets first, after those in `first`.

    The process shown is that of the lowest rank.
    """
    alike: dict[tuple[object, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        top = int(row[0]) in first
        alike.setdefault((not top, row[3], row[4], row[5], row[7]), []).append(row)
    ordered = sorted(alike.items(), key=lambda item: (item[0][0], len(item[1])))
    return [
        (
            format_ranges([int(row[0]) for row in same]),
            format_ranges(sorted({int(row[1]) for row in same})),
            same[0][2] + ", ..." * (len(same) > 1),
            *same[0][3:],
        )
        for _, same in ordered
    ]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table without the columns that are empty."""
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    table = [[row[i] for i in shown] for row in (header, *rows)]
    return [f"  {line}" for line in columns(table[0], table[1:], left=len(shown))]


def processes(
    nodes: Sequence[int], hosts: Sequence[str], pids: Sequence[int], *, short: bool = True
) -> str:
    """Return which ranks are on which host, and the numbers of their processes, one per rank.

    `short` leaves out process numbers, and then hosts, where there are too many for a line.
    """
    ranks: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    lists = ranks.values()
    where = [
        f"rank {format_ranges(members, ordered=True)} on {hosts[members[0]]}" for members in lists
    ]
    numbers = [
        f"pid {format_ranges((pids[r] for r in members), ordered=True)}" for members in lists
    ]
    text = ", ".join(f"{on} ({numbered})" for on, numbered in zip(where, numbers, strict=True))
    if not short or len(text) <= _LINE:
        return text
    if len(", ".join(where)) > _LINE:
        where = [f"{len(nodes)} ranks on {len(where)} nodes", *where[:_NAMED], "...", where[-1]]
    return f"{', '.join(where)} (MPIDIST_LOG=debug names all processes)"


def write_dump(title: str, states: Mapping[int, RankState]) -> str:
    """Write what is known of the ranks as JSON, and return a sentence that says where it is.

    The file is new, and readable by its owner alone; see `mpidist.env.dump_directory`.
    """
    content = {
        "format": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "title": title,
        "ranks": [asdict(state) for _, state in sorted(states.items())],
    }
    directory = env.dump_directory()
    path = ""
    try:
        directory = os.path.abspath(directory)  # noqa: PTH100  # it may have been removed
        stem = f"mpidist-report-{os.uname().nodename}-{os.getpid()}"
        descriptor, path = create_unique(directory, stem, ".json")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError as error:
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108  # half of it is of no use
        return f"The records could not be written to {directory}: {error}"
    return f"The last operations and all stacks of these ranks are in {path}"
