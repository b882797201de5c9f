"""A short form of the fuzzer of mismatches, and what it draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.soaks.mismatch_cases import SIZES, draw
from tests.soaks.mismatches import BAD, PLACES, RANKS, repeat, run, verdict_of

CASES = 16


def test_one_rank_deviates() -> None:
    cases = [draw(0, number, RANKS) for number in range(600)]
    assert cases == [draw(0, number, RANKS) for number in range(600)]
    assert {case.size for case in cases} == set(SIZES)
    kinds = {"none", "verb", "form", "shape", "order", "dtype", "op", "root", "counts", "list"}
    assert {case.kind for case in cases} == kinds
    for case in cases:
        others = [call for rank, call in enumerate(case.calls) if rank != case.guilty]
        if case.kind in ("verb", "form", "op", "root"):
            assert case.calls[case.guilty] not in others, case
        assert len({call.name for call in others}) == 1, case


@pytest.mark.parametrize(
    ("endings", "over", "verdict"),
    [
        (["caught", "caught"], True, "caught"),
        (["caught", "late"], True, "late"),
        (["caught", "returned"], True, "silent"),
        (["late", "returned"], False, "silent"),
        (["caught", ""], False, "late"),
        (["", ""], False, "died"),
        (["foreign", "caught"], True, "foreign"),
    ],
)
def test_verdicts(endings: list[str], over: bool, verdict: str) -> None:
    case = next(c for c in (draw(0, n, RANKS) for n in range(99)) if c.kind == "shape")
    told = [{"ended": ending} if ending else {} for ending in endings]
    assert verdict_of(case, told, over=over, ended=True) == verdict


def test_a_rank_that_cannot_go_on_is_told_of() -> None:
    case = next(c for c in (draw(0, n, RANKS) for n in range(99)) if c.kind == "op")
    told = [{"ended": "caught", "after": "wrong"}, {"ended": "caught"}]
    assert verdict_of(case, told, over=True, ended=True) == "unusable"


@pytest.mark.mpirun
@pytest.mark.any_mpi
@pytest.mark.parametrize("place", PLACES)
def test_no_mismatch_is_silent(
    place: str, mpirun: list[str], hosts_mpirun: Callable[[int, int], list[str]]
) -> None:
    start = hosts_mpirun(2, 2) if place == "hosts" else mpirun
    first = PLACES.index(place) * CASES
    found = run(start, place, range(first, first + CASES), seed=1)
    assert len(found) == CASES
    bad = [repeat(each, 1) for each in found if each.verdict in BAD]
    assert not bad, "\n".join(bad)
