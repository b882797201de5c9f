"""Of all orders of actions, exactly those are schedules that ranks can run to their end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import numpy as np
import pytest

from mpidist.errors import CollectiveTimeoutError, PeerLostError, ScheduleError
from mpidist.nn import Context, Mode, Module, Sequential, mse_loss
from mpidist.parallel import Action, Pass, Pipeline, Schedule
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.testing import DeliveryMode, run_ranks

F, W = Pass.FORWARD, Pass.BACKWARD_WEIGHT
Actions = tuple[tuple[Action, ...], ...]

on_schedules = pytest.mark.parametrize("name", SCHEDULES)


def unchecked(schedule: Schedule, actions: Actions) -> Schedule:
    """Return a schedule of other actions, whether it can be run or not."""
    made = object.__new__(Schedule)
    vars(made).update(
        name="unchecked",
        rank_of_stage=schedule.rank_of_stage,
        micro_batches=schedule.micro_batches,
        actions=actions,
    )
    return made


def checked(schedule: Schedule, actions: Actions) -> Schedule:
    return Schedule("changed", schedule.rank_of_stage, schedule.micro_batches, actions)


def ascend_together(a: Action, b: Action) -> bool:
    """Whether two actions are of one stage, and have forward, gradient or weights in common."""
    parts = {"F": "f", "B": "gw", "I": "g", "W": "w"}  # forward, gradient, weights
    return a.stage == b.stage and not set(parts[a.kind]).isdisjoint(parts[b.kind])


def swapped(schedule: Schedule, swaps: int, rng: random.Random) -> Actions:
    """Exchange neighbours, but for those of which the micro-batches ascend."""
    ranks = [list(actions) for actions in schedule.actions]
    while swaps:
        actions = rng.choice(ranks)
        i = rng.randrange(len(actions) - 1)
        if not ascend_together(*actions[i : i + 2]):
            actions[i : i + 2] = reversed(actions[i : i + 2])
            swaps -= 1
    return tuple(map(tuple, ranks))


def permutations(count: int) -> Iterator[tuple[Schedule, bool]]:
    """Yield schedules that nothing has checked, and whether they may be made."""
    rng = random.Random(0)
    for _ in range(count):
        name, ranks = rng.choice(list(SCHEDULES)), rng.choice([2, 3, 4])
        rounds = 2 if name == "dualpipev" else rng.choice([1, 2])
        schedule = SCHEDULES[name](ranks, ranks * rounds)
        actions = swapped(schedule, rng.randrange(1, 8), rng)
        try:
            checked(schedule, actions)
            accepted = True
        except ScheduleError as error:
            if "never ends" not in str(error):
                raise
            accepted = False
        yield unchecked(schedule, actions), accepted


def needs(action: Action, last: int) -> list[tuple[int, str, int]]:
    """Return what has to be over before an action begins, by the rules of a pipeline alone."""
    stage, kind, micro = action
    if kind is F:
        return [(stage - 1, "F", micro)] if stage else []
    if kind is W:
        return [(stage, "I", micro)]
    return [(stage, "F", micro), *((stage + 1, k, micro) for k in "BI" if stage < last)]


def by_rules(schedule: Schedule) -> tuple[bool, int]:
    """Return whether the needs have no circle, and how many passes can be run."""
    last = schedule.stages - 1
    named = [[(a.stage, a.kind.value, a.micro_batch) for a in r] for r in schedule.actions]
    everything = {one for rank in named for one in rank}
    before: TopologicalSorter[tuple[int, str, int]] = TopologicalSorter()
    for rank, actions in zip(named, schedule.actions, strict=True):
        for i, action in enumerate(actions):
            before.add(rank[i], *rank[max(i - 1, 0) : i])
            before.add(rank[i], *(need for need in needs(action, last) if need in everything))
    try:
        before.prepare()
        ends = True
    except CycleError:
        ends = False
    over = 0
    while ready := before.get_ready():
        over += sum(1 + (kind == "B") for _, kind, _ in ready)
        before.done(*ready)
    return ends, over


class Counting(Module):
    """Passes arrays on, and counts the passes: a forward one, and the halves of a backward one."""

    def __init__(self, passes: list[str]) -> None:
        vars(self).update(passes=passes)

    def forward(self, x, mode):
        self.passes.append("F")
        return x, Context(None)

    def backward_input(self, ctx, dy):
        self.passes.append("I")
        return dy, None

    def backward_weight(self, wctx):
        self.passes.append("W")


def run(schedule: Schedule, timeout: float) -> tuple[BaseException | None, int]:
    """Run a schedule on simulated ranks; return what was raised, and how many passes were run."""
    passes: list[str] = []
    x = np.ones((schedule.micro_batches, 1))

    def body(group):
        model = Sequential(*(Counting(passes) for _ in range(schedule.stages)))
        options = {"schedule": schedule, "loss": mse_loss}
        with Pipeline(model, group, micro_batches=schedule.micro_batches, **options) as pipe:
            pipe.group.timeout = timeout
            pipe.step(x, x, Mode(training=True))

    try:
        run_ranks(schedule.ranks, body, mode=DeliveryMode.POLLED)
    except (CollectiveTimeoutError, PeerLostError, KeyError) as error:
        return error, len(passes)
    return None, len(passes)


def stops(schedule: Schedule) -> bool:
    """Whether ranks that run a schedule stop, where they have to, before its end.

    On a busy machine a run that ends in time says nothing else than one that does not; therefore
    they are given more time until all that can be run has been run.
    """
    _, most = by_rules(schedule)
    timeout = 0.15
    while True:
        error, over = run(schedule, timeout)
        if error is None:
            return False
        if isinstance(error, KeyError):  # a rank has nothing to go on with
            return True
        if over == most:
            return True
        timeout *= 2


def test_exactly_those_without_a_circle_are_accepted(full):
    verdicts = [0, 0]
    for schedule, accepted in permutations(2000 if full else 150):
        assert by_rules(schedule)[0] == accepted, schedule.text()
        verdicts[accepted] += 1
    assert min(verdicts) >= (200 if full else 20), verdicts


@pytest.mark.timeout(1800)  # a full run waits for a deadline more than a thousand times
def test_exactly_those_that_ranks_finish_are_accepted(full):
    """With all checks off: the loop runs what it is given."""
    verdicts = [0, 0]
    for schedule, accepted in permutations(2000 if full else 12):
        if accepted:
            error, over = run(schedule, 60.0)
            assert error is None, schedule.text()
            assert over == 3 * schedule.stages * schedule.micro_batches
        else:
            assert stops(schedule), schedule.text()
        verdicts[accepted] += 1
    assert min(verdicts) >= (200 if full else 2), verdicts


@on_schedules
def test_each_deletion_and_each_duplicate_is_refused(name):
    schedule = SCHEDULES[name](2, 4)
    for rank, actions in enumerate(schedule.actions):
        for i in range(len(actions)):
            for changed in (actions[:i] + actions[i + 1 :], (*actions[: i + 1], *actions[i:])):
                everyone = (*schedule.actions[:rank], changed, *schedule.actions[rank + 1 :])
                with pytest.raises(ScheduleError, match="has the passes"):
                    checked(schedule, everyone)


@on_schedules
def test_each_swap_on_a_rank_is_refused_where_it_is_bad(name):
    """Of a stage: those that descend by their own rule. Of others: those that have a circle."""
    schedule = SCHEDULES[name](2, 4)
    bad = 0
    for rank, actions in enumerate(schedule.actions):
        for j in range(len(actions)):
            for i in range(j):
                changed = list(actions)
                changed[i], changed[j] = changed[j], changed[i]
                everyone = (*schedule.actions[:rank], tuple(changed), *schedule.actions[rank + 1 :])
                if descends(changed):
                    words = r"rank \d runs \d[FBIW]\d after"
                elif not by_rules(unchecked(schedule, everyone))[0]:
                    words = "never ends"
                else:
                    checked(schedule, everyone)
                    continue
                with pytest.raises(ScheduleError, match=words):
                    checked(schedule, everyone)
                bad += 1
    assert bad >= 40


def descends(actions: list[Action]) -> bool:
    return any(
        ascend_together(a, b) and a.micro_batch > b.micro_batch
        for i, a in enumerate(actions)
        for b in actions[i + 1 :]
    )
