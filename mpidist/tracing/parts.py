"""One rank's part of a trace: a row per event, kept in memory for a second, then in a file.

The file outlives a rank that is killed. It is a sequence of gzip members, each written by one call,
of lines of JSON: objects hold facts about the whole part, arrays hold rows.
"""

from __future__ import annotations

import gzip
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from mpidist._new_file import create

if TYPE_CHECKING:
    from mpidist.observe.recorder import Recorder
    from mpidist.observe.recorder.recorder import Over, Sink
    from mpidist.observe.regions import Marks

FORMAT = 1

_SECONDS = 1.0
"""Seconds that events stay in memory: a killed rank loses at most these."""

_KINDS = ("blocking", "immediate", "message", "wait")
"""The kinds of operations, indexed by `mpidist.observe.recorder.Kind`."""

REGION, TRANSFER = "region", "transfer"


class TraceRow(NamedTuple):
    """One event of a part.

    Attributes
    ----------
    kind : str
        ``blocking``, ``immediate``, ``message``, ``wait``, ``region`` or ``transfer``.
    what, group : str
        Name of the operation, region or transfer; name of the group.
    identity, number : int
        Of the group and the operation; the same on all ranks of a collective. Of a transfer
        `number` is the nanoseconds that were waited for it.
    site : str
        The caller's file and line.
    began, ended : int
        Nanoseconds by the rank's own clock.
    thread : int
        0 for the thread that began the trace, then counted in the order of their first events.
    """

    kind: str
    what: str
    group: str
    identity: int
    number: int
    site: str
    began: int
    ended: int
    thread: int


class Events:
    """The events of a rank that are not written yet: operations of the recorder, and regions.

    The first `limit` events are kept. Where this trace is inside another one, what got the events
    before, the recorder's sink and `marks`, goes on getting them.

    Attributes
    ----------
    dropped : int
        How many events came after the last one that is kept.
    full_at : int or None
        When that one ended, in nanoseconds; None as long as there may be more.
    """

    def __init__(self, recorder: Recorder, limit: int, *, marks: Marks | None = None) -> None:
        self.outer_sink: Sink | None = recorder.sink
        self.outer_marks = marks
        self.dropped = 0
        self.full_at: int | None = None
        self._recorder = recorder
        self._left = limit
        self._kept: list[tuple[Any, int]] = []
        self._thread = threading.get_ident()
        self._others: dict[int, int] = {}
        self._texts: dict[tuple[int, int, int], tuple[str, str, str]] = {}

    def append(self, over: Over) -> None:
        """Take an operation, or a wait, from the recorder."""
        if self.outer_sink is not None:
            self.outer_sink.append(over)
        self._take(over, over[-1])

    def mark(self, name: str, began: int, ended: int) -> None:
        """Take a region."""
        if self.outer_marks is not None:
            self.outer_marks.mark(name, began, ended)
        self._take((name, began, ended), ended)

    def transfer(self, name: str, began: int, ended: int, exposed: int) -> None:
        """Take what was under way, which may overlap with anything."""
        if self.outer_marks is not None:
            self.outer_marks.transfer(name, began, ended, exposed)
        self._take((name, began, ended, exposed), ended)

    def _take(self, event: Any, ended: int) -> None:
        if not self._left:
            self.dropped += 1
            return
        self._left -= 1
        if not self._left:
            self.full_at = ended
        thread = threading.get_ident()
        if thread != self._thread:
            self._kept.append((event, self._others.setdefault(thread, len(self._others) + 1)))
        else:
            self._kept.append((event, 0))

    def drain(self) -> list[TraceRow]:
        """Return what was recorded since the last call; from one thread at a time."""
        kept = self._kept[:]
        # Others may have been appended meanwhile.
        del self._kept[: len(kept)]
        return [self._row(event, thread) for event, thread in kept]

    def _row(self, event: Any, thread: int) -> TraceRow:
        if len(event) == 3:
            name, began, ended = event
            return TraceRow(REGION, name, "", 0, 0, "", began, ended, thread)
        if len(event) == 4:
            name, began, ended, exposed = event
            return TraceRow(TRANSFER, name, "", 0, exposed, "", began, ended, thread)
        kind, what, identity, number, site, began, ended = event
        texts = self._texts.get((what, identity, site))
        if texts is None:
            from mpidist.observe.recorder.recording import decode_events

            ((_, record, *_),) = decode_events(self._recorder.memory, [event])
            texts = record.what, record.group, str(record.site)
            self._texts[what, identity, site] = texts
        name, group, file_line = texts
        return TraceRow(
            _KINDS[kind], name, group, identity, number, file_line, began, ended, thread
        )


def part_path(trace: Path, rank: int) -> Path:
    """Return where a rank's part of a trace is kept until the trace is written."""
    return trace.with_name(trace.name + ".parts") / f"rank-{rank:05d}.jsonl.gz"


class PartFile:
    """Writes a rank's events into a new file, from a thread of its own.

    The file is readable by its owner alone, and replaces what has its name. It stays open until
    `close` or `remove`. Another job that begins a trace of the same path takes the name away; the
    two never write into one file, nor read each other's.

    Raises
    ------
    OSError
        If the file cannot be made.
    """

    def __init__(self, path: Path, events: Events, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.problem: OSError | None = None
        self._events = events
        self._facts: list[Mapping[str, Any]] = []
        self._writing = threading.Lock()
        self._over = threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(create(path, replace=True), "r+b", buffering=0)
        self._made = os.fstat(self._file.fileno())
        try:
            _write_all(self._file, _packed([{"format": FORMAT, **facts}]))
        except OSError:
            self.remove()
            raise
        self._thread = threading.Thread(target=self._work, name="mpidist-trace", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._over.wait(_SECONDS):
            self._write()

    def _write(self) -> None:
        """Write what there is; an error is kept as `problem`, and nothing is written after it."""
        with self._writing:
            lines: list[Any] = self._facts
            self._facts = []
            if rows := self._events.drain():
                lines.append(rows)
            if self.problem is not None or not lines:
                return
            try:
                _write_all(self._file, _packed(lines))
            except OSError as error:
                self.problem = error

    def note(self, facts: Mapping[str, Any]) -> None:
        """Add facts about the whole part, to be written with the next events."""
        with self._writing:
            self._facts.append(facts)

    def finish(self) -> bytes:
        """Write the last events, and return all that was written; the file stays open."""
        self._over.set()
        self._thread.join()
        self._write()
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        data = bytearray()
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        return bytes(data)

    def close(self) -> None:
        """Write the last events and leave the file behind; may be called twice."""
        if not self._file.closed:
            with self._file:
                self.finish()

    def remove(self) -> None:
        """Close and delete the file, and its directory after the last rank's."""
        self._file.close()
        try:
            if os.path.samestat(self._made, self.path.lstat()):  # else it is another job's
                self.path.unlink()
            self.path.parent.rmdir()
        except OSError:
            return  # parts of others are still there


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _packed(lines: Iterable[Any]) -> bytes:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    return gzip.compress(text.encode(), 1, mtime=0)


@dataclass(frozen=True, slots=True)
class TracePart:
    """One rank's part, as it was written: the contents of the file, and the facts in it.

    These are ``run``, ``rank``, ``size``, ``host``, ``pid``, ``clock``, ``limit``, ``started``, and
    those that became known later: ``began``, ``readings``, ``ended``, ``dropped``, ``full_at`` and
    ``complete``.
    """

    data: bytes
    facts: dict[str, Any]

    @classmethod
    def of(cls, data: bytes) -> TracePart:
        """Read what a `PartFile` has written, whole or cut off.

        Raises
        ------
        ValueError
            If it was written by something else.
        """
        facts: dict[str, Any] = {}
        for line in _lines(data):
            if line.startswith("{"):
                facts.update(json.loads(line))
        if facts.get("format") != FORMAT:
            raise ValueError(f"this is no part of a trace of format {FORMAT}")
        return cls(data, facts)

    def rows(self) -> Iterator[TraceRow]:
        """Yield the events in the order in which they ended."""
        for line in _lines(self.data):
            if line.startswith("["):
                for row in json.loads(line):
                    yield TraceRow(*row)


def _lines(data: bytes) -> Iterator[str]:
    """Yield the complete lines of a file that may have been cut off anywhere."""
    while data:
        member = zlib.decompressobj(wbits=31)
        try:
            text = member.decompress(data)
        except zlib.error:
            return
        yield from text[: text.rfind(b"\n") + 1].decode().splitlines()
        data = member.unused_data
