"""One clock for all ranks.

[Note: clocks] All processes of a running kernel read the same `time.monotonic_ns`, so ranks of one
host need no correction. On another host it counts from another moment, and a little faster or
slower. A rank there asks rank 0 for its time, some twenty times. Rank 0 reads its clock between the
question and the answer, so that assuming the middle of the two is wrong by at most half the time
between them. The quickest answer is kept. This is done when the trace begins and when it ends, and
the difference is assumed to change evenly between the two.

References
----------
Cristian (1989), Probabilistic clock synchronization, Distributed Computing 3, section 3.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import NamedTuple

import numpy as np

from mpidist.group import ProcessGroup
from mpidist.point_to_point import recv, send

EXCHANGES = 20
"""Questions that are asked; the quickest answer counts."""


class Reading(NamedTuple):
    """How another clock differed from this one, in nanoseconds.

    At the time `at` of this clock the other was ahead by `offset`, which can be wrong by
    `uncertainty`.
    """

    at: int
    offset: int
    uncertainty: int


class Clock(NamedTuple):
    """Translates a rank's times into rank 0's.

    By the readings at the begin and at the end; by the first alone, the difference is constant.
    Without any, both have the same clock.
    """

    first: Reading | None = None
    last: Reading | None = None

    def translate(self, time: int) -> int:
        """Return rank 0's time at a time of this rank, both in nanoseconds."""
        first, last = self.first, self.last
        if first is None:
            return time
        if last is None or last.at == first.at:
            return time + first.offset
        drift = (last.offset - first.offset) * (time - first.at) // (last.at - first.at)
        return time + first.offset + drift

    @property
    def uncertainty(self) -> int:
        """By how many nanoseconds a time can be wrong, if the clocks drift evenly."""
        readings = (self.first, self.last)
        return max((reading.uncertainty for reading in readings if reading), default=0)


def closest(exchanges: Iterable[tuple[int, int, int]]) -> Reading:
    """Return the reading of the quickest of several exchanges.

    Of each: when the question left, by this clock, the other clock's time, which is the answer, and
    when that came, by this clock.
    """
    asked, answer, answered = min(exchanges, key=lambda exchange: exchange[2] - exchange[0])
    middle = (asked + answered) // 2
    return Reading(middle, answer - middle, (answered - asked + 1) // 2)


def clock_name() -> str:
    """Return a text that is the same for exactly the processes that read the same clock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # A container may have a clock of its own.
        return f"{boot} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return f"{os.uname().nodename} {os.getpid()}"


def compare_clocks(
    group: ProcessGroup, names: Sequence[str], *, now: Callable[[], int] = monotonic_ns
) -> Reading | None:
    """Compare the clocks of all hosts with rank 0's; collective over `group`.

    `names` has the `clock_name` of each rank. One rank of each clock after the other exchanges
    messages with rank 0.

    Returns
    -------
    Reading or None
        On the first rank of each clock other than rank 0's; None elsewhere.
    """
    for leader in leaders(names):
        if group.rank == leader:
            return closest(_ask(group, now))
        if group.rank == 0:
            _answer(group, leader, now)
    return None


def leaders(names: Sequence[str]) -> list[int]:
    """Return the first rank of each clock other than rank 0's."""
    return [names.index(name) for name in dict.fromkeys(names) if name != names[0]]


def _ask(group: ProcessGroup, now: Callable[[], int]) -> Iterator[tuple[int, int, int]]:
    question, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for _ in range(EXCHANGES):
        asked = now()
        send(question, group, dst=0)
        recv(group, src=0, out=answer)
        yield asked, int(answer[0]), now()


def _answer(group: ProcessGroup, leader: int, now: Callable[[], int]) -> None:
    question, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for _ in range(EXCHANGES):
        recv(group, src=leader, out=question)
        answer[0] = now()
        send(answer, group, dst=leader)
