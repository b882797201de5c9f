from __future__ import annotations

import time
from itertools import count

import pytest

from mpidist.backends.work import WaitTimeout, wait_until


def test_ready_at_once_polls_once_and_drives_nothing() -> None:
    polls: list[str] = []

    def ready() -> bool:
        polls.append("ready")
        return True

    wait_until(ready, timeout=0, progress=lambda: polls.append("progress"))
    assert polls == ["ready"]


def test_progress_between_polls() -> None:
    calls: list[str] = []
    polls = count()

    def ready() -> bool:
        calls.append("ready")
        return next(polls) >= 2

    wait_until(ready, timeout=5, progress=lambda: calls.append("progress"))
    assert calls == ["ready", "progress", "ready", "progress", "ready"]


@pytest.mark.parametrize("timeout", [0.0, 0.05])
def test_timeout(timeout: float) -> None:
    began = time.monotonic()
    with pytest.raises(WaitTimeout):
        wait_until(lambda: False, timeout=timeout)
    assert timeout <= time.monotonic() - began < timeout + 2


def test_ready_wins_over_the_timeout() -> None:
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 0.03, timeout=5)
    assert time.monotonic() - began < 3


def test_patrol_looks_about_ten_times_a_second_and_may_end_the_wait() -> None:
    patrols: list[float] = []

    def patrol(waited: float) -> None:
        patrols.append(waited)
        if len(patrols) == 3:
            raise RuntimeError("seen enough")

    with pytest.raises(RuntimeError, match="seen enough"):
        wait_until(lambda: False, timeout=20, patrol=patrol)
    assert patrols == sorted(patrols)
    assert patrols[0] >= 0.1
    assert patrols[2] >= patrols[0] + 0.2


def test_an_error_of_ready_is_passed_on() -> None:
    def ready() -> bool:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        wait_until(ready, timeout=1)
