"""What the passes of each layer cost, measured on the ranks that have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from typing import Any

from mpidist.collectives import all_gather_object
from mpidist.group import ProcessGroup
from mpidist.nn.containers import Sequential
from mpidist.nn.module import Module
from mpidist.nn.surround import surround
from mpidist.parallel.pipeline.edges import Edges
from mpidist.parallel.pipeline.run import Contributions, Loss, MicroBatches, StageRun
from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule
from mpidist.parallel.pipeline.stages import StageLink
from mpidist.parallel.pipeline.ties import Ties
from mpidist.parallel.pipeline.timeline import Costs

__all__ = ["measure_costs"]

_PASSES = ("forward", "backward_input", "backward_weight")
_TIMES = 3
"""How often each pass is timed, after a first run that is not."""


def measure_costs(
    stages: Mapping[int, Sequential],
    starts: Sequence[int],
    rank_of_stage: Sequence[int],
    links: Sequence[StageLink],
    batch: MicroBatches,
    loss: Loss,
    group: ProcessGroup,
) -> Costs:
    """Return what `Pipeline.costs` does: run one micro-batch through all stages, several times."""
    schedule = _one_by_one(rank_of_stage)
    actions = schedule.actions[group.rank]
    edges = Edges(schedule, actions, links, group)
    contributions = Contributions({}, actions, Ties((), schedule, group, 0))
    taken: dict[tuple[int, str], list[float]] = {}
    for _ in range(1 + _TIMES):
        run = StageRun(stages, schedule.stages - 1, batch, loss, contributions)
        with _timed(stages, starts) as times:
            run.run(edges)
        for key, seconds in times.items():
            taken.setdefault(key, []).append(seconds)
    medians = {key: median(seconds[1:]) for key, seconds in taken.items()}
    everyone: dict[tuple[int, str], float] = {}
    for own in all_gather_object(medians, group):
        everyone |= own
    layers = 1 + max(layer for layer, _ in everyone)
    return Costs(*(tuple(everyone[i, name] for i in range(layers)) for name in _PASSES))


def _one_by_one(rank_of_stage: Sequence[int]) -> Schedule:
    """Return the schedule of one micro-batch, with halves of backward."""
    stages = range(len(rank_of_stage))
    order = [Action(stage, Pass.FORWARD, 0) for stage in stages]
    for stage in reversed(stages):
        order += [Action(stage, half, 0) for half in (Pass.BACKWARD_INPUT, Pass.BACKWARD_WEIGHT)]
    actions = (
        tuple(action for action in order if rank_of_stage[action.stage] == rank)
        for rank in range(1 + max(rank_of_stage))
    )
    return Schedule("costs", tuple(rank_of_stage), 1, tuple(actions))


@contextmanager
def _timed(
    stages: Mapping[int, Sequential], starts: Sequence[int]
) -> Iterator[dict[tuple[int, str], float]]:
    """Time the passes of each layer by number and name; gradients stay as they are."""
    times: dict[tuple[int, str], float] = {}
    numbers: dict[Module, list[int]] = {}
    with ExitStack() as stack:
        for stage, part in stages.items():
            for number, layer in enumerate(part.layers, starts[stage]):
                times.update(((number, name), 0.0) for name in _PASSES)
                numbers.setdefault(layer, []).append(number)
            for parameter in part.parameters():
                parameter.divert(lambda _: None)
                stack.callback(parameter.divert, None)
        for layer, own in numbers.items():
            stack.enter_context(surround(layer, _adding(times, own), _PASSES))
        yield times


def _adding(
    times: dict[tuple[int, str], float], numbers: Sequence[int]
) -> Callable[[str, Callable[[], Any]], Any]:
    def around(name: str, run: Callable[[], Any]) -> Any:
        began = perf_counter()
        result = run()
        share = (perf_counter() - began) / len(numbers)  # which of them has run is not known
        for number in numbers:
            times[number, name] += share
        return result

    return around
