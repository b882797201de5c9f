"""The learning rate as a function of the step."""

from __future__ import annotations

from math import cos, pi

import pytest

from mpidist.optim import WarmupCosine


def test_rises_linearly_then_falls_along_a_cosine() -> None:
    rate = WarmupCosine(0.4, warmup_steps=4, total_steps=24, final=0.1)
    assert [rate(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for step in range(4, 24):
        assert rate(step) == pytest.approx(0.1 + 0.15 * (1 + cos(pi * (step - 4) / 20)))
    assert rate(14) == pytest.approx(0.25)
    assert rate(24) == rate(1000) == 0.1


def test_is_a_function_of_the_step_alone() -> None:
    rate = WarmupCosine(1.0, warmup_steps=2, total_steps=9)
    forwards = [rate(step) for step in range(12)]
    assert [rate(step) for step in reversed(range(12))] == forwards[::-1]
    assert rate == WarmupCosine(1.0, warmup_steps=2, total_steps=9)


@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (0, 5), (5, 5)])
def test_edges(warmup: int, total: int) -> None:
    rate = WarmupCosine(1.0, warmup_steps=warmup, total_steps=total, final=0.5)
    assert rate(total) == 0.5
    if total:
        assert rate(warmup - 1 if warmup else 0) == 1.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"peak": 1.0, "warmup_steps": 6, "total_steps": 5},
        {"peak": 1.0, "warmup_steps": -1, "total_steps": 5},
        {"peak": -1.0, "warmup_steps": 0, "total_steps": 5},
        {"peak": 1.0, "warmup_steps": 0, "total_steps": 5, "final": -0.1},
    ],
)
def test_bad_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="WarmupCosine"):
        WarmupCosine(**arguments)  # type: ignore[arg-type]
