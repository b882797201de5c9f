"""Schedules as data: what they cost, how they look, and what is refused."""

from __future__ import annotations

import pickle
import random
from xml.etree import ElementTree as ET

import pytest

from mpidist.errors import ScheduleError
from mpidist.parallel import (
    Action,
    Costs,
    Pass,
    Schedule,
    best_of,
    dualpipev,
    fitted,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    zb_h1,
    zbv,
)

GENERATORS = (gpipe, one_f_one_b, interleaved, zb_h1, zbv, dualpipev)

BUBBLES = {
    (2, 4): (0.250, 0.250, 0.125, 0.083, 0.042, 0.042),
    (4, 4): (0.750, 0.750, 0.375, 0.250, 0.125, None),
    (4, 8): (0.375, 0.375, 0.188, 0.125, 0.062, 0.062),
    (4, 16): (0.188, 0.188, 0.094, 0.062, 0.031, 0.031),
    (8, 8): (0.875, 0.875, 0.438, 0.292, 0.146, None),
    (8, 16): (0.438, 0.438, 0.219, 0.146, 0.073, 0.073),
}
"""Of GENERATORS: idle over useful time, by ranks and micro-batches; None where it is refused. The
tables of torch 2.13 give the same, but for ZBV with as many micro-batches as ranks, where they have
0.250 and 0.292."""

FORMULAS = {gpipe: 1, one_f_one_b: 1, interleaved: 2, zb_h1: 3, zbv: 6, dualpipev: 6}
"""By what (P - 1) / m is divided, where there are enough micro-batches."""


@pytest.mark.parametrize(("sizes", "bubbles"), BUBBLES.items())
def test_bubbles_are_those_of_theory(sizes, bubbles):
    ranks, micro = sizes
    for generator, bubble in zip(GENERATORS, bubbles, strict=True):
        if bubble is None:
            with pytest.raises(ScheduleError, match=f"take {2 * ranks}$"):
                generator(ranks, micro)
            continue
        got = simulate(generator(ranks, micro)).bubble
        assert got == pytest.approx(bubble, abs=0.00051), generator
        if generator is not zbv or micro >= 2 * ranks - 1:
            formula = (ranks - 1) / micro / FORMULAS[generator]
            assert got == pytest.approx(formula, rel=1e-12), generator


PEAKS = {
    (gpipe, 4, 8): (8, 8, 8, 8),
    (one_f_one_b, 4, 8): (4, 3, 2, 1),
    (one_f_one_b, 8, 16): (8, 7, 6, 5, 4, 3, 2, 1),
    (interleaved, 2, 4): (5, 3),
    (interleaved, 4, 4): (8, 8, 7, 5),
    (interleaved, 4, 8): (11, 9, 7, 5),
    (interleaved, 8, 8): (16, 16, 16, 16, 15, 13, 11, 9),
    (interleaved, 8, 16): (23, 21, 19, 17, 15, 13, 11, 9),
    (zb_h1, 4, 8): (4, 4, 4, 4),
    (zb_h1, 8, 16): (8,) * 8,
    (zb_h1, 4, 1): (1, 1, 1, 1),
    (zbv, 2, 4): (4, 4),
    (zbv, 4, 8): (8, 8, 8, 8),
    (zbv, 4, 16): (8, 8, 8, 8),
    (zbv, 8, 16): (16,) * 8,
    (dualpipev, 2, 4): (5, 5),
    (dualpipev, 4, 8): (9, 9, 9, 9),
    (dualpipev, 8, 16): (17,) * 8,
}


def test_peaks_are_those_of_theory():
    assert {key: key[0](*key[1:]).peaks for key in PEAKS} == PEAKS


def test_a_limit_of_contexts_is_checked():
    one_f_one_b(3, 6).check(limit=3)
    words = "'gpipe': rank 0 keeps the contexts of up to 6 forward passes at once, .* limit is 5"
    with pytest.raises(ScheduleError, match=words):
        gpipe(3, 6).check(limit=5)
    with pytest.raises(ScheduleError, match="'zbv': rank 0 keeps"):
        zbv(2, 4).check(limit=3)


MESSAGES = {gpipe: 3, one_f_one_b: 3, interleaved: 7, zb_h1: 3, zbv: 6, dualpipev: 6}
"""Of activations, and as many of gradients, of a micro-batch on 4 ranks."""


@pytest.mark.parametrize("generator", GENERATORS)
def test_messages_are_what_stages_of_different_ranks_exchange(generator):
    schedule = generator(4, 8)
    messages = schedule.messages()
    assert sum(map(len, messages.values())) == 2 * 8 * MESSAGES[generator]
    for (sender, receiver), sent in messages.items():
        own = schedule.actions[sender]
        assert [own.index(action) for action in sent] == sorted(map(own.index, sent))
        for stage, kind, micro in sent:
            taker = stage + (1 if kind is Pass.FORWARD else -1)
            assert (schedule.rank_of_stage[stage], schedule.rank_of_stage[taker]) == (
                sender, receiver
            )  # fmt: skip
            assert any(
                (a.stage, a.micro_batch) == (taker, micro) for a in schedule.actions[receiver]
            )
    assert generator(1, 2).messages() == {}


def test_messages_of_a_schedule_by_hand():
    a, b = (
        tuple(map(Action.parse, text.split())) for text in ("0F0 0F1 2B0 2B1", "1F0 1F1 1I0 1I1")
    )
    assert Schedule.parse(BY_HAND).messages() == {(0, 1): a, (1, 0): b}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("generator", GENERATORS)
def test_any_number_of_micro_batches_works_or_is_refused_with_those_that_fit(generator, ranks):
    for micro in range(1, 2 * ranks + 3):
        if generator is interleaved and micro % ranks:
            below = micro // ranks * ranks
            fitting = f"take {below} or {below + ranks}$" if below else f"take {ranks}$"
            with pytest.raises(ScheduleError, match=fitting):
                generator(ranks, micro)
        elif generator is dualpipev and micro < 2 * ranks:
            words = f"at least {2 * ranks} micro-batches, .* got {micro}; take {2 * ranks}$"
            with pytest.raises(ScheduleError, match=words):
                generator(ranks, micro)
        else:
            schedule = generator(ranks, micro)
            assert Schedule.parse(schedule.text()) == schedule
            assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_numbers_below_one_are_refused():
    for generator in GENERATORS:
        with pytest.raises(ScheduleError, match=r"micro_batches of at least 1, got 0"):
            generator(2, 0)
        with pytest.raises(ScheduleError, match=r"ranks of at least 1, got 0"):
            generator(0, 2)
    with pytest.raises(ScheduleError, match=r"chunks of at least 1, got 0"):
        interleaved(2, 2, chunks=0)


def test_more_chunks_wait_less():
    bubbles = [simulate(interleaved(4, 8, chunks=chunks)).bubble for chunks in (1, 2, 4)]
    assert bubbles == pytest.approx([3 / 8, 3 / 16, 3 / 32])


# -- a schedule for given costs --------------------------------------------------------------------


def test_a_fitted_schedule_keeps_its_limit_whatever_the_costs():
    rng = random.Random(3)
    for _ in range(60):
        ranks, more, micro = rng.randrange(1, 4), rng.randrange(3), rng.randrange(1, 6)
        rank_of_stage = [*range(ranks), *(rng.randrange(ranks) for _ in range(more))]
        rng.shuffle(rank_of_stage)
        costs = Costs(*(tuple(rng.random() for _ in rank_of_stage) for _ in range(3)))
        limit = max(map(rank_of_stage.count, range(ranks))) + rng.randrange(4)
        schedule = fitted(rank_of_stage, micro, costs, limit=limit)  # its making checks it
        assert max(schedule.peaks) <= limit


def test_a_fitted_schedule_is_shorter_where_costs_differ():
    costs = Costs(forward=(1, 3, 1), backward_input=(1, 3, 1), backward_weight=(1, 3, 1))
    spans = [simulate(generator(3, 6), costs).span for generator in (one_f_one_b, zb_h1)]
    got = simulate(fitted(range(3), 6, costs, limit=3), costs).span
    # The middle rank works for 54, and begins 1 after the first one.
    assert 55 <= got <= min(spans)


def test_a_limit_that_holds_no_micro_batch_is_refused():
    with pytest.raises(ScheduleError, match="limit of at least 2, got 1"):
        fitted([0, 1, 1], 2, Costs.unit(3), limit=1)
    with pytest.raises(ScheduleError, match="stages of at least 1, got 0"):
        fitted([], 2, Costs.unit(0), limit=1)


def test_the_best_of_several_ends_first():
    costs = Costs(forward=(1, 3, 1), backward_input=(1, 3, 1), backward_weight=(1, 3, 1))
    several = [gpipe(3, 6), zb_h1(3, 6), one_f_one_b(3, 6)]
    assert best_of(several).name == "zb-h1"
    assert best_of(several[::2]).name == "gpipe"  # of two that take equally long the first
    spans = {schedule.name: simulate(schedule, costs, message=0.5).span for schedule in several}
    assert spans[best_of(several, costs, message=0.5).name] == min(spans.values())


# -- the simulation ------------------------------------------------------------------------------


def test_a_simulation_with_costs_is_the_one_by_hand():
    schedule = one_f_one_b(2, 2)  # 0F0 0F1 0B0 0B1, 1F0 1B0 1F1 1B1
    costs = Costs(forward=(1, 2), backward_input=(3, 4), backward_weight=(1, 1))
    timeline = simulate(schedule, costs, message=0.5)
    spans = [[(str(s.action), s.began, s.ended) for s in rank] for rank in timeline.spans]
    assert spans == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 9, 13), ("0B1", 16, 20)],
        [("1F0", 1.5, 3.5), ("1B0", 3.5, 8.5), ("1F1", 8.5, 10.5), ("1B1", 10.5, 15.5)],
    ]
    assert timeline.span == 20
    assert timeline.idle == (10, 6)
    assert timeline.bubble == 16 / 24


def test_costs_of_another_number_of_stages_are_refused():
    with pytest.raises(ValueError, match=r"'gpipe': expected costs of its 2 stages, got \[3, 3, 3"):
        simulate(gpipe(2, 2), Costs.unit(3))
    with pytest.raises(
        ValueError, match=r"'fitted': expected costs of its 3 stages, got \[2, 2, 2"
    ):
        fitted([0, 1, 1], 2, Costs.unit(2), limit=3)


def test_a_schedule_has_a_rank():
    with pytest.raises(ScheduleError, match="expected at least 1 rank, got 0"):
        Schedule("none", (), 1, ())


def test_a_picture_has_a_line_per_rank():
    assert str(simulate(one_f_one_b(2, 2))).splitlines() == [
        "rank 0 F0 F1 ......B0--- ...B1---",
        "rank 1 ...F0 B0--- F1 B1--- ......",
    ]
    assert simulate(interleaved(1, 1)).picture() == "rank 0 0F0 1F0 1B0---- 0B0----"
    for width in range(1, 40):  # also where actions have no room
        lines = simulate(one_f_one_b(2, 3), Costs((1, 50), (1, 1), (0, 1))).picture(width=width)
        assert {len(line) for line in lines.splitlines()} <= {width + 6, width + 7}
    assert len(simulate(gpipe(2, 2)).picture(width=40).splitlines()[1]) == len("rank 1 ") + 40


def test_a_drawing_has_a_box_per_action_as_wide_as_it_takes():
    schedule = interleaved(2, 2)
    timeline = simulate(schedule)
    root = ET.fromstring(timeline.svg(width=48 + 10 * 18))
    boxes = {
        (title.text or "").partition(":")[0]: rect
        for rect in root.iter("{http://www.w3.org/2000/svg}rect")
        for title in rect
    }
    assert boxes.keys() == {str(action) for actions in schedule.actions for action in actions}
    scale = 10 * 18 / timeline.span
    for rank, spans in enumerate(timeline.spans):
        for action, began, ended in spans:
            box = boxes[str(action)].attrib
            assert float(box["x"]) == pytest.approx(48 + began * scale, abs=0.06)
            assert float(box["width"]) == pytest.approx((ended - began) * scale, abs=0.06)
            assert int(box["y"]) // 24 == rank


# -- text ----------------------------------------------------------------------------------------

BY_HAND = """
by-hand: 2 micro-batches      # comments do not count
ranks of the stages: 0 1 0

0F0 0F1 2F0 2B0 2F1 0B0 2B1 0B1
1F0 1F1 1I0 1W0 1I1 1W1
"""


def test_a_schedule_may_be_written_by_hand():
    schedule = Schedule.parse(BY_HAND)
    assert (schedule.name, schedule.rank_of_stage, schedule.micro_batches) == (
        "by-hand",
        (0, 1, 0),
        2,
    )
    assert schedule.actions[1][2] == Action(1, Pass.BACKWARD_INPUT, 0)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("by-hand: 2 micro-batches", "by hand", "expected the lines 'NAME: 8 micro-batches'"),
        ("0 1 0", "zero", "ranks of the stages: 0 1 2 3"),
        ("1I0", "1X0", "'1X0' is no action"),
        ("2 micro", "0 micro", "at least 1 micro-batch"),
        ("0 1 0", "0 2 0", "stages on each of the ranks 0 to 1"),
        ("0 1 0", "0 1", "rank 0 has 2F0 as its action 2, but there are 2 stages"),
        ("0 1 0", "1 0 0", "rank 0 has 0F0 as its action 0, but stage 0 is on rank 1"),
        ("1W1", "", "stage 1 has the passes 'FI' of micro-batch 1 on rank 1"),
        ("1W1", "1W1 1B1", "stage 1 has the passes 'FBIW' of micro-batch 1"),
        ("2B1", "2B0 2B1", "stage 2 has the passes 'FBB' of micro-batch 0 on rank 0"),
        ("1F0 1F1", "1F1 1F0", "rank 1 runs 1F0 after 1F1"),
        ("1W0 1I1 1W1", "1I1 1W1 1W0", "rank 1 runs 1W0 after 1W1"),
        ("1I0 1W0", "1W0 1I0", "rank 1 at its action 2, 1W0, needs 1I0, action 3 of rank 1"),
        (
            "0F0 0F1 2F0 2B0 2F1 0B0",
            "0F0 2F0 2B0 0B0 0F1 2F1",
            (
                "rank 0 at its action 3, 0B0, needs 1I0, action 2 of rank 1; "
                "rank 1 at its action 1, 1F1, needs 0F1, action 4 of rank 0"
            ),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_with_the_reason(old, new, words):
    text = BY_HAND.replace(old, new)
    assert text != BY_HAND
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    assert words in str(caught.value)
