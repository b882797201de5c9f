"""Operations of several phases, and what drives them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from datetime import timedelta

import pytest

from mpidist.backends.work import Engine, Steps, StepsWork, WaitTimeout, Work
from mpidist.errors import TransportError


class Fake(Work[None]):
    """Complete after some polls, or fails then."""

    def __init__(self, polls: int, error: Exception | None = None) -> None:
        self.left = polls
        self.error = error

    def done(self) -> bool:
        self.left -= 1
        if self.left <= 0 and self.error is not None:
            raise self.error
        return self.left <= 0

    def wait(self, timeout: float | None = None) -> None:
        raise AssertionError("an operation of several phases only polls")


def phases(works: Iterable[Work[None]], log: list[str]) -> Steps:
    for number, work in enumerate(works):
        log.append(f"phase {number}")
        yield work
    log.append("end")


def test_runs_to_its_first_phase_at_once_and_on_as_phases_complete() -> None:
    log: list[str] = []
    work = StepsWork(phases([Fake(2), Fake(1), Fake(3)], log))
    assert log == ["phase 0"]
    assert [work.done() for _ in range(5)] == [False, False, False, True, True]
    assert log == ["phase 0", "phase 1", "phase 2", "end"]


def test_no_phase_at_all() -> None:
    work = StepsWork(phases([], []))
    assert work.done()
    work.wait(0)


@pytest.mark.parametrize("polls", [0, 1, 3])
def test_an_error_is_raised_whenever_it_is_asked_for(polls: int) -> None:
    log: list[str] = []
    error = TransportError("lost", 5)
    work = StepsWork(phases([Fake(1), Fake(polls, error), Fake(1)], log))
    with pytest.raises(TransportError, match="lost"):
        work.wait(5)
    with pytest.raises(TransportError, match="lost"):
        work.done()
    with pytest.raises(TransportError, match="lost"):
        work.synchronize()
    assert log == ["phase 0", "phase 1"]


def test_an_error_of_the_steps_themselves() -> None:
    def steps() -> Steps:
        yield Fake(2)
        raise ValueError("in between")

    work = StepsWork(steps())
    assert not work.done()
    with pytest.raises(ValueError, match="in between"):
        work.done()

    def at_once() -> Steps:
        raise ValueError("at once")
        yield Fake(1)

    work = StepsWork(at_once())
    with pytest.raises(ValueError, match="at once"):
        work.wait(1)


def test_steps_are_closed_after_an_error() -> None:
    closed = []

    def steps() -> Steps:
        try:
            yield Fake(1, ValueError("no"))
        finally:
            closed.append(True)

    with pytest.raises(ValueError, match="no"):
        StepsWork(steps()).wait(1)
    assert closed == [True]


def test_wait_gives_up() -> None:
    with pytest.raises(WaitTimeout):
        StepsWork(phases([Fake(10**9)], [])).wait(0.02)


def test_engine_drives_all_and_forgets_what_is_over() -> None:
    engine = Engine()
    quick, slow = StepsWork(phases([Fake(2)], [])), StepsWork(phases([Fake(3), Fake(2)], []))
    failing = StepsWork(phases([Fake(2, TransportError("lost", 1))], []))
    engine.running.update(dict.fromkeys([slow, failing, quick]))
    engine.drive()
    assert list(engine.running) == [slow, failing, quick]
    engine.drive()
    assert list(engine.running) == [slow]
    with pytest.raises(TransportError):
        failing.done()
    for _ in range(3):
        engine.drive()
    assert not engine.running
    assert slow.done()


def test_two_threads_drive_one_operation() -> None:
    """A poll that meets another thread's says "not yet" instead of entering the steps twice."""
    inside, leave = threading.Event(), threading.Event()

    class Slow(Fake):
        def done(self) -> bool:
            inside.set()
            return leave.wait(10)

    engine = Engine()
    work = StepsWork(phases([Slow(1)], []))
    engine.running[work] = None
    thread = threading.Thread(target=engine.drive)
    thread.start()
    assert inside.wait(10)
    assert not work.done()
    engine.drive()  # returns at once
    leave.set()
    thread.join(10)
    assert work.done()
    assert not engine.running


def test_works_of_a_generator_are_all_waited_for_each_time() -> None:
    steps = [phases([], []), phases([], [])]
    both = Work.all(StepsWork(each) for each in steps).then(len)
    assert both.done()
    assert both.wait() == 2
    done = Work.all(map(StepsWork, [phases([Fake(9)], [])]))
    assert [done.done(), done.done()] == [False, False]


@pytest.mark.parametrize("method", ["wait", "synchronize"])
def test_works_that_are_waited_for_together_have_one_deadline(method: str) -> None:
    given: list[float | None] = []

    class Slow(Work[None]):
        def done(self) -> bool:
            return False

        def wait(self, timeout: float | None = None) -> None:
            given.append(timeout)
            time.sleep(0.05)

    together = getattr(Work.all([Slow(), Slow(), Slow()]), method)
    together(timedelta(seconds=0.08))
    first, second, third = given
    assert first == pytest.approx(0.08, abs=0.02)
    assert second is not None
    assert 0 < second <= 0.03
    assert third == 0.0
    given.clear()
    together()
    assert given == [None] * 3
