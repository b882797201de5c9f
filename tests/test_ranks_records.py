"""How the words of all ranks about one test become one result."""

from __future__ import annotations

import json

import pytest

from tests._ranks.records import Outcome, Phase, Result, merge


def phase(rank: int, outcome: Outcome, *, when: str = "call", text: str = "") -> Phase:
    return Phase(
        test="t",
        rank=rank,
        when=when,
        outcome=outcome,
        duration=1.0,
        text=text,
        message=text,
        sections=(("stdout", f"said by {rank}"),),
    )


class TestMerge:
    @pytest.mark.parametrize("outcome", list(Outcome))
    def test_equal_outcomes_are_kept(self, outcome: Outcome) -> None:
        assert merge(2, [phase(0, outcome), phase(1, outcome)]).outcome is outcome

    def test_one_failure_fails_the_test_and_names_its_rank(self) -> None:
        result = merge(2, [phase(1, Outcome.FAILED, text="boom"), phase(0, Outcome.PASSED)])
        assert (result.outcome, result.message) == (Outcome.FAILED, "rank 1: boom")

    def test_durations_are_those_of_the_slowest_rank(self) -> None:
        phases = [phase(0, Outcome.PASSED), phase(0, Outcome.PASSED, when="teardown")]
        assert merge(2, [*phases, phase(1, Outcome.PASSED)]).duration == 2.0

    def test_different_outcomes_are_a_failure(self) -> None:
        result = merge(2, [phase(0, Outcome.PASSED), phase(1, Outcome.XFAILED)])
        assert result.outcome is Outcome.FAILED
        assert "rank 0 passed, rank 1 xfailed" in result.message

    def test_output_is_labelled(self) -> None:
        result: Result = merge(2, [phase(1, Outcome.PASSED)])
        assert result.sections == [("rank 1's stdout", "said by 1")]


def test_phase_survives_its_line() -> None:
    one = phase(1, Outcome.XFAILED, text="a\nb")
    assert Phase.from_fields(json.loads(one.line())) == one
