"""Regions: named spans while somebody listens, and next to nothing while nobody does."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mpidist.observe import regions
from mpidist.observe.regions import listener, region


class Noted:
    def __init__(self) -> None:
        self.regions: list[tuple[str, int, int]] = []

    def mark(self, name: str, began: int, ended: int) -> None:
        self.regions.append((name, began, ended))

    def transfer(self, name: str, began: int, ended: int, exposed: int) -> None:
        raise AssertionError("a region is no transfer")


@contextmanager
def listening() -> Iterator[Noted]:
    noted = Noted()
    token = listener.set(noted)
    try:
        yield noted
    finally:
        listener.reset(token)


def test_a_region_is_told_with_its_times_when_it_is_over() -> None:
    with listening() as noted:
        before = time.monotonic_ns()
        with region("outer"):
            with region("inner"):
                pass
            assert [name for name, _, _ in noted.regions] == ["inner"]
        after = time.monotonic_ns()
    (inner, a, b), (outer, c, d) = noted.regions
    assert (inner, outer) == ("inner", "outer")
    assert before <= c <= a <= b <= d <= after


def test_a_region_that_an_error_leaves_is_told_too() -> None:
    with listening() as noted, pytest.raises(KeyError), region("broken"):
        raise KeyError
    assert [name for name, _, _ in noted.regions] == ["broken"]


def test_other_threads_are_not_listened_to() -> None:
    """Ranks may be threads of one process, each with a trace of its own."""

    def work() -> None:
        with region("elsewhere"):
            pass

    with listening() as noted:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert noted.regions == []


def test_while_nobody_listens_nothing_is_made_and_no_clock_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = []
    monkeypatch.setattr(regions, "monotonic_ns", lambda: read.append(1) or 0)
    calls: list[str] = []

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        for _ in range(100):
            with region("step"):
                pass
    finally:
        sys.setprofile(None)
    assert region("a") is region("b")
    assert read == []
    assert set(calls) == {"region", "__enter__", "__exit__"}
    assert len(calls) <= 300
    with listening():
        assert region("a") is not region("b")
