"""One clock: the estimate is within its own bound, whatever the clocks and the network do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mpidist.group import ProcessGroup
from mpidist.testing import Faults, run_ranks
from mpidist.tracing.clock import (
    EXCHANGES,
    Clock,
    Reading,
    clock_name,
    closest,
    compare_clocks,
    leaders,
)

SECOND = 1_000_000_000


def test_the_quickest_answer_counts() -> None:
    reading = closest([(0, 5000, 1000), (2000, 7300, 2200), (3000, 9000, 4000)])
    assert reading == Reading(at=2100, offset=5200, uncertainty=100)


@pytest.mark.parametrize("seed", range(20))
def test_an_estimate_is_within_its_bound_on_a_network_that_is_slower_one_way(seed: int) -> None:
    rng = random.Random(seed)
    offset = rng.randrange(-(10**15), 10**15)
    now, exchanges = 0, []
    for _ in range(EXCHANGES):
        there, back = rng.randrange(1_000, 500_000), rng.randrange(1_000, 5_000)
        exchanges.append((now, now + there + offset, now + there + back))
        now += there + back + rng.randrange(1_000)
    reading = closest(exchanges)
    assert abs(reading.offset - offset) <= reading.uncertainty
    assert reading.uncertainty == pytest.approx(min(c - a for a, _, c in exchanges) / 2, abs=1)


def test_between_two_readings_the_difference_changes_evenly() -> None:
    # 3 s ahead at the begin; an hour later 3.036 s: ten parts in a million.
    clock = Clock(Reading(0, 3 * SECOND, 500), Reading(3600 * SECOND, 3 * SECOND + 36_000_000, 900))
    assert clock.translate(0) == 3 * SECOND
    assert clock.translate(1800 * SECOND) == 1803 * SECOND + 18_000_000
    assert clock.translate(3600 * SECOND) == 3603 * SECOND + 36_000_000
    assert clock.uncertainty == 900


def test_one_reading_stands_for_an_even_difference_and_none_for_the_same_clock() -> None:
    assert Clock(Reading(5, -7, 1)).translate(100) == 93
    assert Clock().translate(100) == 100
    assert Clock().uncertainty == 0


def test_one_rank_of_each_other_clock_asks() -> None:
    assert leaders(["a", "a", "b", "c", "b", "a", "c"]) == [2, 3]
    assert leaders(["a", "a"]) == []


def test_processes_of_one_host_have_one_clock() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert clock_name().startswith(boot)
    assert clock_name() == clock_name()


RANKS = [  # clock, seconds that it is ahead, and how much faster it runs
    ("a", 0.0, 0.0),
    ("a", 0.0, 0.0),
    ("b", 1234.5, 50e-6),
    ("b", 1234.5, 50e-6),
    ("c", -99.0, -200e-6),
]
NAMES = [name for name, _, _ in RANKS]


def clock_of(rank: int, start: int) -> Callable[[], int]:
    _, ahead, drift = RANKS[rank]

    def now() -> int:
        passed = time.monotonic_ns() - start
        return start + passed + round(passed * drift) + round(ahead * SECOND)

    return now


@pytest.mark.parametrize("delay", [0.0, 0.002])
def test_simulated_hosts_find_the_clock_of_rank_0(delay: float) -> None:
    """Rank 0's clock is the real one, so what a translated time should be is known."""
    start = time.monotonic_ns()

    def traced(group: ProcessGroup) -> tuple[Clock, list[tuple[int, int]]]:
        now = clock_of(group.rank, start)
        first = compare_clocks(group, NAMES, now=now)
        times = []
        for _ in range(5):
            time.sleep(0.03)
            times.append((time.monotonic_ns(), now()))
        return Clock(first, compare_clocks(group, NAMES, now=now)), times

    found = run_ranks(len(RANKS), traced, faults=Faults(delay=delay), timeout=20)
    for rank, (clock, times) in enumerate(found):
        assert (clock.first is not None) == (rank in (2, 4)), "one rank of each host asks"
        if clock.first is None:
            continue
        for true, local in times:
            # A switch of threads may come between the two clocks that were read above.
            slack = clock.uncertainty + 20_000_000
            assert abs(clock.translate(local) - true) <= slack
        # Within the bound, what the clock was ahead at the time of the reading.
        for reading in (clock.first, clock.last):
            assert reading is not None
            _, ahead, drift = RANKS[rank]
            passed = (reading.at - start - ahead * SECOND) / (1 + drift)
            true_offset = start + passed - reading.at
            assert abs(reading.offset - true_offset) <= reading.uncertainty + 1000
