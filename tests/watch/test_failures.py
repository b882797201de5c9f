"""Ranks that end for the same reason: one of them says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest

from mpidist.observe.recorder import Head, Recorder
from mpidist.observe.recorder.recording import Recording
from mpidist.observe.watch import failures as module
from mpidist.observe.watch.failures import Ending, Failures


class Node:
    """Ranks of one node, each a thread."""

    def __init__(self, size: int, alive: Callable[[int], bool] = lambda rank: True) -> None:
        memories = [memoryview(bytearray(Recorder.nbytes())) for _ in range(size)]
        self.recordings = {rank: Recording(memory) for rank, memory in enumerate(memories)}
        self.failures = [Failures(rank, self.recordings, alive) for rank in range(size)]
        self.endings: dict[int, Ending] = {}

    def end(self, reasons: Mapping[int, str], *, later: Mapping[int, float] | None = None) -> None:
        """Let ranks end, each for its reason, some so many seconds later."""

        def one(rank: int) -> None:
            time.sleep((later or {}).get(rank, 0.0))
            self.endings[rank] = self.failures[rank].join(reasons[rank])
            if self.endings[rank].ranks:
                self.failures[rank].spoken()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in reasons]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)

    @property
    def speakers(self) -> list[tuple[int, ...]]:
        return sorted(ending.ranks for ending in self.endings.values() if ending.ranks)


def test_one_speaks_for_all_that_end_for_the_same_reason() -> None:
    node = Node(8)
    node.end(dict.fromkeys(range(8), "a typo"))
    assert node.speakers == [tuple(range(8))]
    assert not any(ending.others for ending in node.endings.values() if ending.ranks)


def test_each_reason_is_said() -> None:
    node = Node(6)
    reasons = {rank: "a typo" if rank % 2 else "another" for rank in range(6)}
    node.end(reasons)
    assert node.speakers == [(0, 2, 4), (1, 3, 5)]
    assert sorted(each.earlier for each in node.endings.values() if each.ranks) == [0, 1]


def test_a_rank_that_ends_alone_says_that_there_are_others(monkeypatch) -> None:
    node = Node(4)
    node.end({2: "a typo"})
    assert node.endings[2] == Ending((2,), 2, others=True)


def test_one_that_comes_later_speaks_for_itself(monkeypatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.02)
    node = Node(3)
    node.end({1: "a typo"})
    node.end({0: "a typo", 2: "a typo"})
    assert node.speakers == [(0,), (1,), (2,)]
    assert node.endings[0].first == node.endings[2].first == 1


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "stuck"])
def test_one_that_does_not_come_to_speak_is_not_waited_for(monkeypatch, dead: bool) -> None:
    monkeypatch.setattr(module, "_SPEAKING", 0.2)
    node = Node(3, alive=lambda rank: not (dead and rank == 0))
    first = node.recordings[0].cells
    first[Head.FAILED], first[Head.FAILED_AT] = module.digest_of("a typo"), 1
    node.end({1: "a typo", 2: "a typo"})
    spoken = {rank for ranks in node.speakers for rank in ranks}
    assert spoken == {1, 2}
