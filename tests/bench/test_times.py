"""How calls are timed: on simulated ranks, whose series write down that they were called."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from mpidist.bench.times import Effort, Series, Times, measure
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks


def test_times_are_the_percentiles_of_numpy() -> None:
    samples = np.random.default_rng(1).random(37)
    times = Times.of(samples)
    assert times.count == 37
    assert times.mean == samples.mean()
    assert times.median == np.median(samples)
    assert times.p5 == np.percentile(samples, 5)
    assert times.p95 == np.percentile(samples, 95)
    assert (times.minimum, times.maximum) == (samples.min(), samples.max())


def called(group: ProcessGroup, effort: Effort) -> tuple[str, dict[str, Times]]:
    calls: list[str] = []
    series = [Series(name, lambda name=name: calls.append(name)) for name in "ab"]
    times = measure(series, group, effort=effort)
    return "".join(calls), dict(times)


def test_series_take_turns_in_blocks_and_directions() -> None:
    for calls, times in run_ranks(2, called, Effort(repeats=10)):
        # Two calls each so that everything exists, six to see how long they take, then a block of
        # eleven: as many as were asked for and one that does not count.
        warm_up = "aabb" + 6 * "a" + 6 * "b"
        assert calls == warm_up + 11 * "a" + 11 * "b"
        assert {name: each.count for name, each in times.items()} == {"a": 10, "b": 10}


def test_more_repeats_than_a_block_has_take_several_rounds() -> None:
    for calls, times in run_ranks(2, called, Effort(repeats=120)):
        blocks = [51 * "a", 51 * "b", 51 * "b", 51 * "a", 51 * "a", 51 * "b"]
        assert calls.endswith("".join(blocks))
        assert times["a"].count == 150


def test_short_efforts_still_make_enough_calls() -> None:
    (_, times), _ = run_ranks(2, called, Effort(seconds=1e-9))
    assert times["a"].count >= 25


def slowest(group: ProcessGroup) -> Times:
    pause = 0.02 if group.rank == 1 else 0.0
    return measure([Series("s", lambda: time.sleep(pause))], group, effort=Effort(repeats=3))["s"]


def test_the_slowest_rank_counts_on_all() -> None:
    first, second = run_ranks(2, slowest)
    assert first == second
    assert 0.02 <= first.minimum < 0.5


def divided(group: ProcessGroup) -> Times:
    series = Series("s", lambda: time.sleep(0.02), operations=10)
    return measure([series], group, effort=Effort(repeats=3))["s"]


def test_a_call_of_several_operations_is_divided() -> None:
    (times,) = run_ranks(1, divided)
    assert 0.002 <= times.median < 0.02


def failing(group: ProcessGroup) -> None:
    measure([Series("s", lambda: 1 / 0)], group, effort=Effort())


def test_the_garbage_collector_is_switched_on_again() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        run_ranks(1, failing)
    assert gc.isenabled()


def clocked(group: ProcessGroup) -> Times:
    series = Series("s", lambda: None, operations=4, clock=lambda call: 1.0 + group.rank)
    return measure([series], group, effort=Effort(repeats=3))["s"]


def test_another_clock_counts_instead_of_the_hosts() -> None:
    assert [times.median for times in run_ranks(2, clocked)] == [0.5, 0.5]
