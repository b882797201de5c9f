"""torch's own schedules are valid here, cost what theory says, and are those of our generators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpidist.errors import ScheduleError
from mpidist.parallel import (
    Action,
    Schedule,
    dualpipev,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    zbv,
)

torch = pytest.importorskip("torch")
schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

V_SHAPED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")

BUBBLES = {
    "ScheduleGPipe": {(4, 4): 0.750, (4, 8): 0.375, (4, 16): 0.188, (8, 8): 0.875, (8, 16): 0.438},
    "ScheduleInterleaved1F1B": {
        (4, 4): 0.375,
        (4, 8): 0.188,
        (4, 16): 0.094,
        (8, 8): 0.438,
        (8, 16): 0.219,
    },
    "ScheduleInterleavedZeroBubble": {
        (4, 4): 0.125,
        (4, 8): 0.062,
        (4, 16): 0.031,
        (8, 8): 0.146,
        (8, 16): 0.073,
    },
    "ScheduleZBVZeroBubble": {
        (4, 4): 0.250,
        (4, 8): 0.062,
        (4, 16): 0.031,
        (8, 8): 0.292,
        (8, 16): 0.073,
    },
    "ScheduleDualPipeV": {(4, 8): 0.062, (4, 16): 0.031, (8, 16): 0.073},
}
"""Idle over useful time, by ranks and micro-batches, all passes costing 1."""

CASES = [(name, *sizes, bubble) for name, row in BUBBLES.items() for sizes, bubble in row.items()]

OURS = {
    "ScheduleGPipe": gpipe,
    "ScheduleInterleaved1F1B": interleaved,
    "ScheduleZBVZeroBubble": zbv,
    "ScheduleDualPipeV": dualpipev,
}


def text_of(name, ranks, micro):
    """Return a schedule of torch as the text that `Schedule.parse` reads."""
    single = name in ("ScheduleGPipe", "Schedule1F1B")
    stages = ranks if single else 2 * ranks
    submod = torch.nn.Identity()
    stage = SimpleNamespace(submod=submod, num_stages=stages, group_size=ranks, group_rank=0)
    made = getattr(schedules, name)(stage if single else [stage, stage], micro)
    rank_of_stage = list(range(ranks)) * (1 if single else 2)
    if name in V_SHAPED:
        rank_of_stage[ranks:] = reversed(range(ranks))
    lines = [f"{name}: {micro} micro-batches"]
    lines += ["ranks of the stages: " + " ".join(map(str, rank_of_stage))]
    for rank in range(ranks):
        actions = [a for a in made.pipeline_order[rank] if a is not None]
        single_ones = [part for a in actions for part in (a.sub_actions or (a,))]
        # What is left out sends, receives and scales; nothing here depends on it.
        lines.append(" ".join(str(a) for a in single_ones if a.is_compute_op))
    return "\n".join(lines)


@pytest.mark.parametrize(("name", "ranks", "micro", "bubble"), CASES)
def test_they_can_be_run_and_cost_what_theory_says(name, ranks, micro, bubble):
    theirs = Schedule.parse(text_of(name, ranks, micro))
    assert simulate(theirs).bubble == pytest.approx(bubble, abs=0.00051)
    if name not in OURS:
        return
    ours = OURS[name](ranks, micro)
    if name == "ScheduleZBVZeroBubble" and micro < 2 * ranks - 1:
        assert simulate(ours).span < simulate(theirs).span  # the rule has too few micro-batches
    else:
        assert (ours.rank_of_stage, ours.actions) == (theirs.rank_of_stage, theirs.actions)


def test_their_1f1b_has_a_micro_batch_too_many_on_the_last_rank():
    """As the pictures are drawn that torch exports; what it runs is another function."""
    text = text_of("Schedule1F1B", 4, 8)
    with pytest.raises(ScheduleError, match=r"rank 3 has 3F8 as its action 14, but there are .* 8"):
        Schedule.parse(text)
    ours = one_f_one_b(4, 8).actions
    for line, actions in zip(text.splitlines()[2:-1], ours[:-1], strict=True):
        assert tuple(map(Action.parse, line.split())) == actions
