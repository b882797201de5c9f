"""Who waited for whom in a step, and which other cut would make it shorter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mpidist.parallel.pipeline.schedule import Schedule
from mpidist.parallel.pipeline.timeline import Costs, Timeline, simulate

__all__ = ["describe_waits"]

_WORTHWHILE = 0.98
"""Another cut is told of if it makes the step shorter than this part of what it is."""


def describe_waits(schedule: Schedule, timeline: Timeline, starts: Sequence[int]) -> str:
    """Say what `Pipeline.describe` returns.

    Parameters
    ----------
    schedule : Schedule
        What was run.
    timeline : Timeline
        What it has cost, in seconds.
    starts : sequence of int
        The first layer of each stage, and the number of all layers.
    """
    costs = timeline.costs()
    least = simulate(schedule, costs)
    lines = [
        f"{schedule.name}: {timeline.span * 1e3:.1f} ms, without messages {least.span * 1e3:.1f} ms"
    ]
    for rank, waited in enumerate(_waits(schedule, timeline)):
        stages = [
            f"{waited[stage] / timeline.span:.0%} for stage {stage}"
            for stage in sorted(waited, key=lambda stage: -waited[stage])
        ]
        idle = f"rank {rank} waited {timeline.idle[rank] / timeline.span:.0%} of the step"
        lines.append(", ".join([idle, *stages]))
    cuts = {move: simulate(schedule, moved).span for move, moved in _moves(costs, starts)}
    best = min(cuts, key=lambda move: cuts[move], default=None)
    if best is not None and cuts[best] < _WORTHWHILE * least.span:
        lines.append(
            f"move one layer from stage {best[0]} to stage {best[1]}: about "
            f"{cuts[best] * 1e3:.1f} ms without messages, if its layers take equally long"
        )
    return "\n".join(lines)


def _waits(schedule: Schedule, timeline: Timeline) -> list[dict[int, float]]:
    """Return how long each rank waited for each stage of other ranks, in the timeline's unit.

    Whoever waits takes the stage's result next; what a rank waits at the end of the step is not
    counted.
    """
    waited: list[dict[int, float]] = []
    for rank, spans in enumerate(timeline.spans):
        end = 0.0
        waited.append(defaultdict(float))
        for action, began, ended in spans:
            source = schedule.source(action)
            if source is not None and schedule.rank_of_stage[source.stage] != rank:
                waited[rank][source.stage] += max(began - end, 0.0)
            end = ended
    return waited


def _moves(costs: Costs, starts: Sequence[int]) -> Iterator[tuple[tuple[int, int], Costs]]:
    """Yield every move of a layer to a neighbouring stage, and the costs after it."""
    layers = [stop - start for start, stop in pairwise(starts)]
    for one, other in pairwise(range(len(layers))):
        for move in ((one, other), (other, one)):
            if layers[move[0]] > 1:
                part = 1 / layers[move[0]]
                yield move, Costs(*(_moved(half, move, part) for half in costs.passes))


def _moved(costs: tuple[float, ...], move: tuple[int, int], part: float) -> tuple[float, ...]:
    after = list(costs)
    after[move[0]] -= part * costs[move[0]]
    after[move[1]] += part * costs[move[0]]
    return tuple(after)
