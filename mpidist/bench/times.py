"""Times of calls: the ranks start together, and the series take turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from time import perf_counter

import numpy as np

from mpidist._types import MAX, Array
from mpidist.collectives import all_reduce, barrier
from mpidist.group import ProcessGroup

_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 200

_SHORTEST_BLOCK, _LONGEST_BLOCK = 6, 51

_BLOCK_SECONDS = 2e-3
"""Blocks of short calls are longer than the shortest one, up to about this time."""


@dataclass(frozen=True, slots=True)
class Series:
    """Something to measure.

    Attributes
    ----------
    name : str
        How tables call it.
    call : callable
        Called without arguments, again and again; by all ranks alike.
    operations : int
        How many operations one call makes one after another: the time is divided by it.
    before : callable or None
        Called before each call, and not timed.
    clock : callable or None
        ``clock(call)`` makes the call and returns the seconds that it took, such as those of a
        device; None for the seconds that the host spends in the call.
    """

    name: str
    call: Callable[[], object]
    operations: int = 1
    before: Callable[[], object] | None = None
    clock: Callable[[Callable[[], object]], float] | None = None


def in_a_row(series: Series, number: int) -> Series:
    """Return a series whose calls are so many of the given one's; the time is that of one."""

    def call(one: Callable[[], object] = series.call) -> None:
        for _ in range(number):
            one()

    return replace(series, call=call, operations=number)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure.

    Attributes
    ----------
    seconds : float
        About how long all series of one size take together. There are never fewer than 25 timed
        calls of each, so that large sizes take longer.
    repeats : int or None
        How many calls of each series are timed, rounded up to whole blocks; None for as many as
        fit in `seconds`.
    """

    seconds: float = 2.0
    repeats: int | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """How long one operation took, over all timed calls, in seconds.

    Attributes
    ----------
    count : int
        Number of timed calls.
    mean : float
        Arithmetic mean of the timed calls.
    minimum, p5, p25, median, p75, p95, p99, maximum : float
        The percentiles 0, 5, 25, 50, 75, 95, 99 and 100, interpolated linearly.
    """

    count: int
    mean: float
    minimum: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float] | Array) -> Times:
        """Summarise the times of single operations, in seconds; at least one."""
        percentiles = np.percentile(samples, [0, 5, 25, 50, 75, 95, 99, 100]).tolist()
        return cls(len(samples), float(np.mean(samples)), *percentiles)


def measure(
    series: Sequence[Series], group: ProcessGroup, *, effort: Effort
) -> Mapping[str, Times]:
    """Time several series against each other.

    Parameters
    ----------
    series : sequence of Series
        The same on all ranks, in the same order.
    group : ProcessGroup
        The ranks taking part.
    effort : Effort
        How long to measure, or how many calls.

    Returns
    -------
    mapping of str to Times
        By name; the same on all ranks.

    Notes
    -----
    Collective over `group`; blocks. All ranks leave a barrier before each call, and its time is
    that of the slowest rank. Series take turns in blocks of at least 6 calls in a row: whatever
    slows the machine for a while meets all of them, and since the first call of a block is not
    counted, each finds in the caches what its own calls left there, as in a loop that makes one
    kind of call only. Every second round goes backwards through the series. Python's garbage
    collector is off meanwhile.

    References
    ----------
    Hoefler, Belli (2015), Scientific Benchmarking of Parallel Computing Systems, rules 8 and 10,
    on percentiles and on the times of several processes.
    """
    with _no_garbage_collection():
        length, rounds = _extent(series, group, effort)
        return _alternated(series, group, rounds, length)


def measure_rounds(
    series: Sequence[Series], group: ProcessGroup, *, rounds: int
) -> Mapping[str, Times]:
    """Time long calls against each other: each round has one call of each series.

    As `measure`, for calls of which none prepares the next, such as those that write to a disk. One
    round more comes first, which is not counted. Collective over `group`; blocks.
    """
    with _no_garbage_collection():
        return _alternated(series, group, rounds + 1, 1, uncounted=1)


def _alternated(
    series: Sequence[Series], group: ProcessGroup, rounds: int, length: int, *, uncounted: int = 0
) -> Mapping[str, Times]:
    """Time a block of each series in each round, in every second one backwards.

    The first rounds are not counted, nor the first call of a block of several.
    """
    samples: dict[str, list[Array]] = {one_series.name: [] for one_series in series}
    for number in range(rounds):
        for one_series in series if number % 2 == 0 else series[::-1]:
            times = _calls(one_series, group, length)
            samples[one_series.name].append(times[1:] if length > 1 else times)
    return {
        name: Times.of(all_reduce(np.concatenate(times[uncounted:]), group, op=MAX))
        for name, times in samples.items()
    }


def _extent(series: Sequence[Series], group: ProcessGroup, effort: Effort) -> tuple[int, int]:
    """Warm up, and return how many calls a block has and how many rounds there are."""
    for one_series in series:
        _calls(one_series, group, 2)
    medians = [
        np.median(_calls(one_series, group, _SHORTEST_BLOCK)[1:]) * one_series.operations
        for one_series in series
    ]
    times = all_reduce(np.array(medians), group, op=MAX)
    fitting = int(_BLOCK_SECONDS / max(times.max(), 1e-9))
    length = min(max(fitting, _SHORTEST_BLOCK), _LONGEST_BLOCK)
    if effort.repeats is not None:
        length = min(length, effort.repeats + 1)
        return length, ceil(effort.repeats / (length - 1))
    rounds = int(effort.seconds / (times.sum() * length))
    return length, min(max(rounds, _FEWEST_ROUNDS), _MOST_ROUNDS)


def _calls(series: Series, group: ProcessGroup, length: int) -> Array:
    """Call `length` times and return this rank's times, per operation."""
    times, call = np.empty(length), series.call
    for number in range(length):
        if series.before is not None:
            series.before()
        barrier(group)
        if series.clock is not None:
            times[number] = series.clock(call)
            continue
        start = perf_counter()
        call()
        times[number] = perf_counter() - start
    return times / series.operations


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
