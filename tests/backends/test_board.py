"""The board of arrivals: who has come, and whether with the same call."""

from __future__ import annotations

import pytest

from mpidist.backends.board import ArrivalBoard
from mpidist.backends.meetings import supported


def boards(size: int) -> list[ArrivalBoard]:
    memory = memoryview(bytearray(ArrivalBoard.nbytes(size)))
    return [ArrivalBoard(memory, rank, size) for rank in range(size)]


def test_all_are_here_when_the_last_has_come() -> None:
    first, second, third = boards(3)
    first.arrive(1)
    assert not first.all_here()
    assert first.missing() == [1, 2]
    third.arrive(1)
    assert first.missing() == [1]
    second.arrive(1)
    assert first.all_here()
    assert first.missing() == []


@pytest.mark.skipif(not supported(), reason="elsewhere digests may be seen too late")
def test_one_that_came_with_another_call_is_noticed_by_all() -> None:
    for odd in range(3):
        ranks = boards(3)
        for number in range(5):
            for rank, board in enumerate(ranks):
                board.arrive(100 + number + (number == 3 and rank == odd))
            assert [board.alike() for board in ranks] == [number != 3] * 3


@pytest.mark.skipif(not supported(), reason="elsewhere digests may be seen too late")
def test_one_that_has_gone_on_does_not_disturb_the_others() -> None:
    first, second = boards(2)
    first.arrive(1)
    second.arrive(1)
    assert first.all_here()
    assert first.alike()
    first.arrive(2)  # `second` has not looked yet
    assert second.all_here()
    assert second.alike()
