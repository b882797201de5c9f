"""The recorder keeps what it is told, for whoever reads its memory."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mpidist
from mpidist.backends.verbs import AllGather
from mpidist.group.state import Journal
from mpidist.observe.recorder import Head, Kind, Recorder, is_inside
from mpidist.observe.recorder.recorder import RING, TEXTS_NBYTES
from mpidist.observe.recorder.recording import Recording, decode_events
from mpidist.testing import run_ranks


def pair() -> tuple[Recorder, Recording]:
    memory = memoryview(bytearray(Recorder.nbytes()))
    return Recorder(memory), Recording(memory)


def test_a_record_says_what_where_and_when() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "some group", 77)
    name = journal.name("all_reduce SUM float32[3]", Kind.BLOCKING)
    before = time.monotonic_ns()
    sequence, line = journal.begin(name, 5, sys._getframe()), sys._getframe().f_lineno
    (record,) = recording.records()
    assert record.what == "all_reduce SUM float32[3]"
    assert (record.group, record.identity, record.number) == ("some group", 77, 5)
    assert record.kind is Kind.BLOCKING
    assert record.site.file == __file__
    assert record.site.line == line
    assert record.site.function == "test_a_record_says_what_where_and_when"
    assert str(record.site) == f"{__file__}:{line}"
    assert before <= record.began <= time.monotonic_ns()
    assert record.ended == 0
    journal.end(sequence)
    (record,) = recording.records()
    assert record.began <= record.ended <= time.monotonic_ns()
    assert recording.find((77, 5)) == record
    assert recording.find((77, 6)) is None
    assert recording.find((78, 5)) is None


def test_a_failure_is_told_apart() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "g", 1)
    journal.end(journal.begin(journal.name("x", Kind.BLOCKING), 1, sys._getframe()), failed=True)
    assert recording.records()[0].ended < 0


def test_the_last_records_are_kept_in_order() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "g", 1)
    name = journal.name("x", Kind.BLOCKING)
    for number in range(3 * RING + 5):
        journal.begin(name, number, sys._getframe())
    assert [r.number for r in recording.records()] == list(range(2 * RING + 5, 3 * RING + 5))


def test_the_end_of_a_record_that_is_gone_ends_no_other() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "g", 1)
    name = journal.name("x", Kind.IMMEDIATE)
    first = journal.begin(name, 0, sys._getframe())
    for number in range(RING):
        journal.begin(name, number + 1, sys._getframe())
    journal.end(first)
    assert all(record.ended == 0 for record in recording.records())


def test_texts_for_which_there_is_no_room_are_unknown_and_harm_nothing() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "g", 1)
    known = journal.name("known", Kind.BLOCKING)
    journal.begin(known, 1, sys._getframe())
    for number in range(200):
        journal.name(f"{number:0200d}", Kind.BLOCKING)
    assert recorder.cells[Head.TEXTS] <= TEXTS_NBYTES
    journal.begin(journal.name("one too many" * 20, Kind.BLOCKING), 2, sys._getframe())
    journal.begin(known, 3, sys._getframe())
    assert [record.what for record in recording.records()] == ["known", "?", "known"]


def test_shapes_and_groups_without_end_leave_room_for_all_else() -> None:
    recorder, recording = pair()
    for number in range(3000):
        group = Journal(recorder, f"a group of number {number}", 1 + number)
        group.name(f"all_gather uint8 in parts of {number}", Kind.BLOCKING)
    journal = Journal(recorder, "another group", 7777)
    journal.begin(journal.name("reduce SUM int8[9] root 1", Kind.BLOCKING), 1, sys._getframe())
    odd = group.name("all_gather uint8 in parts of 9999", Kind.BLOCKING)
    journal.begin(odd, 5, sys._getframe())
    first, second = recording.records()
    assert first.what == "reduce SUM int8..."
    assert second.what == "all_gather uint8..."
    assert first.site.file == second.site.file == __file__
    assert recording.find((7777, 1)) == first
    assert recording.find((3000, 5)) == second
    assert first.call != second.call


def test_calls_are_told_apart_by_numbers_also_when_their_texts_are_cut() -> None:
    recorder, _ = pair()
    roomy, _ = pair()
    for number in range(3000):
        recorder.name(f"x[{number}]", (0, 0), Kind.BLOCKING)
    names = [recorder.name(f"all_gather uint8[{n}]", (0, 0), Kind.BLOCKING) for n in range(50)]
    assert len({name.what for name in names}) == 1
    assert len({name.call for name in names}) == 50
    assert names[7].call == roomy.name("all_gather uint8[7]", (0, 0), Kind.BLOCKING).call


def test_only_some_names_are_remembered() -> None:
    recorder, _ = pair()
    journal = Journal(recorder, "g", 1)
    first = journal.name_collective(Kind.BLOCKING, AllGather(None, np.ones(1), (0, 1)))
    for size in range(5000):
        call = AllGather(None, np.ones(1), (size, 1))
        name = journal.name_collective(Kind.BLOCKING, call)
        assert size == 0 or name.call != first.call
    assert len(journal._names) <= 1024


def test_a_wait_is_recorded_while_it_lasts() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "g", 1)
    sequence = journal.begin(journal.name("ix", Kind.IMMEDIATE), 1, sys._getframe())
    journal.wait(sequence, sys._getframe())
    assert recording.cells[Head.WAITS_FOR] == sequence
    assert recording.waits_site().file == __file__
    journal.waited()
    assert recording.cells[Head.WAITS_FOR] == 0


def test_a_sink_collects_what_is_over() -> None:
    recorder, _ = pair()
    journal = Journal(recorder, "g", 3)
    blocking = journal.name("x", Kind.BLOCKING)
    journal.end(journal.begin(blocking, 1, sys._getframe()))
    recorder.sink = sink = []
    journal.end(journal.begin(blocking, 2, sys._getframe()))
    work = journal.begin(journal.name("iy", Kind.IMMEDIATE), 3, sys._getframe())
    journal.wait(work, sys._getframe())
    journal.end(work)
    journal.waited()
    recorder.sink = None
    journal.end(journal.begin(blocking, 4, sys._getframe()))
    events = decode_events(recorder.memory, sink)
    told = [(event.kind, event.record.what, event.record.number) for event in events]
    assert told == [(Kind.BLOCKING, "x", 2), (Kind.IMMEDIATE, "iy", 3), (Kind.WAIT, "iy", 3)]
    assert all(0 < event.began <= event.ended for event in events)
    assert all(event.record.site.file == __file__ for event in events)


def test_a_reader_sees_whole_records_while_another_thread_writes() -> None:
    recorder, recording = pair()
    journal = Journal(recorder, "g", 1)
    names = [journal.name(f"what {number}", Kind.BLOCKING) for number in range(7)]
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            journal.end(journal.begin(names[number % 7], number, sys._getframe()))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            for record in recording.records():
                assert record.what == f"what {record.number % 7}"
                assert record.sequence == record.number + 1
    finally:
        over.set()
        writer.join()


def test_sites_lie_outside_the_package() -> None:
    def calls(group: mpidist.ProcessGroup) -> list[str]:
        x = np.ones(3)
        mpidist.all_reduce(x, group)
        mpidist.iall_reduce(x, group).wait()
        mpidist.all_gather_object("text", group)
        group.split(0).close()
        if group.rank == 0:
            mpidist.send(x, group, dst=1)
        else:
            mpidist.recv(group, src=0)
        recording = Recording(group.transport.recorder.memory)
        return [f"{r.site.file} {r.site.function}" for r in recording.records()[-7:]]

    for sites in run_ranks(2, calls):
        assert sites == [f"{__file__} calls"] * len(sites)


@pytest.mark.parametrize("part", ["bench/verbs.py", "examples/02_ddp.py", "testing/ranks.py"])
def test_programs_of_the_package_call_it_as_others_do(part: str) -> None:
    package = Path(mpidist.__file__).parent
    assert (package / part).is_file()
    assert not is_inside(str(package / part))
    assert is_inside(str(package / "group" / "group.py"))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x, g: mpidist.barrier(g), "barrier"),
        (lambda x, g: mpidist.all_reduce(x, g, op=mpidist.MAX), "all_reduce MAX float32[4, 6]"),
        (lambda x, g: mpidist.iall_reduce(x, g).wait(), "iall_reduce SUM float32[4, 6]"),
        (lambda x, g: mpidist.broadcast(x, g, root=1), "broadcast float32[4, 6] root 1"),
        (lambda x, g: mpidist.reduce(x, g, root=1), "reduce SUM float32[4, 6] root 1"),
        (
            lambda x, g: mpidist.gather(x, g, root=1),
            "gather float32 in parts of 4 rows of [6] root 1",
        ),
        (mpidist.all_gather, "all_gather float32 in parts of 4 rows of [6]"),
        (mpidist.all_to_all, "all_to_all float32 rows of [6]"),
        (
            lambda x, g: mpidist.reduce_scatter(x, g, counts=[1, 3]),
            "reduce_scatter SUM float32 in parts of [1, 3] rows of [6]",
        ),
        (mpidist.scatter, "scatter float32 in parts of 2 rows of [6] root 0"),
        (lambda x, g: g.split(0).close(), "split"),
    ],
)
def test_what_is_recorded_is_the_same_on_all_ranks(call, expected) -> None:
    def one(group: mpidist.ProcessGroup) -> list[str]:
        call(np.ones((4, 6), np.float32), group)
        return [record.what for record in Recording(group.transport.recorder.memory).records()]

    for whats in run_ranks(2, one):
        assert expected in whats


def test_many_counts_are_told_by_a_checksum() -> None:
    counts = tuple(range(20))
    one = AllGather(np.ones(3), np.ones(190), counts).describe()
    other = AllGather(np.ones(3), np.ones(190), counts[::-1]).describe()
    assert "sum 190, checksum" in one
    assert one != other
