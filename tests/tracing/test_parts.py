"""A rank's part: what is kept, how much of it, and what a killed rank leaves."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mpidist.observe.recorder import Kind, Recorder
from mpidist.tracing import parts
from mpidist.tracing.parts import Events, PartFile, TracePart, TraceRow, part_path


class Recorded:
    """A recorder, and operations as it tells them."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        group = self.recorder.name_group("world", 7)
        self.names = [self.recorder.name("barrier", group, kind) for kind in Kind]

    def events(self, limit: int, **more: Any) -> Events:
        events = Events(self.recorder, limit, **more)
        self.recorder.sink = events
        return events

    def operate(self, number: int, kind: Kind = Kind.BLOCKING) -> None:
        frame = sys._getframe()
        sequence = self.recorder.begin(self.names[kind], number, frame)
        if kind is Kind.WAIT:
            self.recorder.wait(sequence, frame)
            self.recorder.waited()
        else:
            self.recorder.end(sequence)


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_events_become_rows_in_their_order(recorded: Recorded) -> None:
    events = recorded.events(10)
    before = time.monotonic_ns()
    for kind in Kind:
        recorded.operate(kind + 1, kind)
    events.mark("step", 1, 99)
    rows = events.drain()
    assert [row.kind for row in rows] == ["blocking", "immediate", "message", "wait", "region"]
    assert [row.number for row in rows] == [1, 2, 3, 4, 0]
    first = rows[0]
    assert (first.what, first.group, first.identity, first.thread) == ("barrier", "world", 7, 0)
    assert first.site.startswith(f"{__file__}:")
    assert before <= first.began <= first.ended <= rows[1].began <= time.monotonic_ns()
    assert rows[4] == TraceRow("region", "step", "", 0, 0, "", 1, 99, 0)
    assert events.drain() == []


def test_only_so_many_events_are_kept_and_the_others_counted(recorded: Recorded) -> None:
    events = recorded.events(3)
    for number in range(1, 6):
        recorded.operate(number)
    rows = events.drain()
    assert [row.number for row in rows] == [1, 2, 3]
    assert (events.dropped, events.full_at) == (2, rows[2].ended)


def test_other_threads_have_numbers_of_their_own(recorded: Recorded) -> None:
    events = recorded.events(10)
    recorded.operate(1)
    for _ in range(2):
        thread = threading.Thread(target=lambda: [recorded.operate(n) for n in (2, 3)])
        thread.start()
        thread.join()
    rows = events.drain()
    # A thread that has ended may leave its identity to the next one.
    assert [row.thread for row in rows] in ([0, 1, 1, 2, 2], [0, 1, 1, 1, 1])


def test_a_trace_inside_another_tells_it_too(recorded: Recorded) -> None:
    outer = recorded.events(10)
    inner = recorded.events(1, marks=outer)
    recorded.operate(1)
    inner.mark("step", 0, 9)
    assert [row.kind for row in inner.drain()] == ["blocking"]
    assert [row.kind for row in outer.drain()] == ["blocking", "region"]


def make(path: Path) -> tuple[PartFile, Events]:
    events = Events(Recorder(), 100)
    return PartFile(path, events, {"rank": 3}), events


def test_a_file_holds_what_was_known_and_what_came(tmp_path: Path) -> None:
    file, events = make(part_path(tmp_path / "t.json", 3))
    assert file.path == tmp_path / "t.json.parts" / "rank-00003.jsonl.gz"
    file.note({"began": 5})
    events.mark("a", 1, 2)
    file.close()
    part = TracePart.of(file.path.read_bytes())
    assert part.facts == {"format": 1, "rank": 3, "began": 5}
    assert [row.what for row in part.rows()] == ["a"]
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_events_of_a_second_are_in_the_file_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_SECONDS", 0.02)
    file, events = make(tmp_path / "part")
    events.mark("a", 1, 2)
    deadline = time.monotonic() + 10
    while not [*TracePart.of(file.path.read_bytes()).rows()] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [row.what for row in TracePart.of(file.path.read_bytes()).rows()] == ["a"]
    file.close()


def test_a_file_that_was_cut_off_anywhere_gives_whole_rows(tmp_path: Path) -> None:
    file, events = make(tmp_path / "part")
    for batch in range(3):
        for number in range(5):
            events.mark(f"{5 * batch + number}", 1, 2)
        file._write()
    file.close()
    data = file.path.read_bytes()
    lengths = []
    for end in range(len(data) + 1):
        try:
            rows = [*TracePart.of(data[:end]).rows()]
        except ValueError:
            assert not lengths, "the first lines are cut off"
            continue
        assert [row.what for row in rows] == [str(number) for number in range(len(rows))]
        lengths.append(len(rows))
    assert lengths == sorted(lengths)
    assert lengths[-1] == 15
    assert len(set(lengths)) >= 4


def test_a_disk_that_fails_is_told_and_nothing_is_written_after_it(tmp_path: Path) -> None:
    file, events = make(tmp_path / "here" / "part")
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), file._file.fileno())
    events.mark("a", 1, 2)
    file.close()
    assert isinstance(file.problem, OSError)
    assert file.problem.errno == errno.ENOSPC


def test_two_jobs_of_one_name_write_no_common_file(tmp_path: Path) -> None:
    """As two traces of one path, or of one directory in containers that are alike."""
    (one, first), (other, second) = (make(tmp_path / "t.parts" / "part") for _ in range(2))
    first.mark("first", 1, 2)
    second.mark("second", 1, 2)
    assert [row.what for row in TracePart.of(one.finish()).rows()] == ["first"]
    written = other.finish()
    assert [row.what for row in TracePart.of(written).rows()] == ["second"]
    one.remove()
    assert other.path.read_bytes() == written, "removed only what is its own"
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_for_its_owner_and_follows_no_link(tmp_path: Path) -> None:
    path, target = tmp_path / "part", tmp_path / "target"
    target.write_text("precious")
    path.symlink_to(target)
    file, _ = make(path)
    file.close()
    assert target.read_text() == "precious"
    assert path.lstat().st_mode & 0o777 == 0o600
    assert TracePart.of(path.read_bytes()).facts["rank"] == 3


def test_another_file_is_refused() -> None:
    with pytest.raises(ValueError, match="no part of a trace"):
        TracePart.of(b"something else")
