"""Which schedule, number of micro-batches and cut a pipeline should have, from measured costs.

The costs of a micro-batch are taken to be proportional to its samples, and so is what its contexts
keep. Each schedule is simulated with the costs of its stages, which are cut so that the slowest one
is as fast as it can be. Beside those of the literature there is one `fitted` to the costs and the
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpidist._formatting import columns, format_bytes, format_number
from mpidist.errors import ScheduleError
from mpidist.parallel import Costs, LayerCosts, Pass, Schedule, fitted, simulate
from mpidist.parallel.pipeline.generators import SCHEDULES
from mpidist.parallel.pipeline.stages import balanced
from mpidist.parallel.pipeline.timeline import sums_of_stages


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """A pipeline that could be run, and what it would take.

    `starts` are the first layers of its stages, `seconds` those of a step, `bubble` what is idle
    over what is useful, `messages` those of a step, and `memory` the bytes of the rank that needs
    most, which `fits` or does not.
    """

    schedule: Schedule
    starts: tuple[int, ...]
    seconds: float
    bubble: float
    messages: int
    memory: int
    fits: bool


@dataclass(frozen=True, slots=True)
class PipelineJob:
    """What a pipeline has: ranks, samples of a batch, memory of a rank, and the network.

    `copies` is how many arrays there are of each parameter: with its gradient and two of AdamW's,
    4. `memory` is in bytes. A message takes ``latency`` seconds and its bytes over ``bandwidth``.
    """

    ranks: int
    batch: int
    memory: float = float("inf")
    copies: int = 4
    latency: float = 0.0
    bandwidth: float = float("inf")


def plan_pipelines(
    layers: LayerCosts, job: PipelineJob, micro_batches: Sequence[int]
) -> tuple[list[PipelinePlan], list[str]]:
    """Return what there could be, the shortest that fits first, and why others could not."""
    plans, notes = [], []
    for micro in micro_batches:
        for name in (*SCHEDULES, "fitted"):
            try:
                plans.append(_plan(name, micro, layers, job))
            except (ScheduleError, ValueError) as error:
                notes.append(f"{micro} micro-batches, left out: {error}")
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds)), notes


def _plan(name: str, micro: int, layers: LayerCosts, job: PipelineJob) -> PipelinePlan:
    scale = job.batch / micro / layers.samples
    passes = layers.costs.passes
    stages = job.ranks if name == "fitted" else SCHEDULES[name](job.ranks, micro).stages
    if stages > len(passes[0]):
        raise ValueError(f"{name} has {stages} stages, and the model {len(passes[0])} layers")
    starts = balanced([sum(of_layer) for of_layer in zip(*passes, strict=True)], stages)
    of_micro_batch = (tuple(scale * seconds for seconds in of_pass) for of_pass in passes)
    costs = Costs(*of_micro_batch).joined(starts)
    held = [job.copies * nbytes for nbytes in sums_of_stages(layers.parameters, starts)]
    kept = [scale * nbytes for nbytes in sums_of_stages(layers.contexts, starts)]
    schedule = (
        fitted(range(stages), micro, costs, limit=_limit(held, kept, micro, job.memory))
        if name == "fitted"
        else SCHEDULES[name](job.ranks, micro)
    )
    sent = max((layers.outputs[start - 1] * scale for start in starts[1:]), default=0.0)
    timeline = simulate(schedule, costs, message=job.latency + sent / job.bandwidth)
    memory = max(_peaks(schedule, held, kept))
    messages = sum(map(len, schedule.messages().values()))
    return PipelinePlan(
        schedule,
        starts,
        timeline.span,
        timeline.bubble,
        messages,
        round(memory),
        memory <= job.memory,
    )


def _limit(held: Sequence[float], kept: Sequence[float], micro: int, memory: float) -> int:
    """Return how many contexts every rank has memory for, each having one stage."""
    contexts = min((memory - h) / k if k else float(micro) for h, k in zip(held, kept, strict=True))
    return max(1, int(min(contexts, micro)))


def _peaks(schedule: Schedule, held: Sequence[float], kept: Sequence[float]) -> Iterator[float]:
    """Yield the most bytes that each rank holds at once."""
    for rank, actions in enumerate(schedule.actions):
        live = peak = sum(
            held[s] for s in range(schedule.stages) if schedule.rank_of_stage[s] == rank
        )
        for action in actions:
            if action.kind is Pass.FORWARD:
                live += kept[action.stage]
            elif action.kind is not Pass.BACKWARD_INPUT:
                live -= kept[action.stage]
            peak = max(peak, live)
        yield peak


def render_pipelines(plans: Sequence[PipelinePlan], job: PipelineJob, rows: int = 12) -> str:
    """Return the shortest ones as a table, and the call of the first that fits."""
    heads = ("step ms", "bubble", "memory", "fits", "messages", "micro-batches")
    cells = [
        [
            format_number(plan.seconds * 1e3),
            format_number(plan.bubble),
            format_bytes(plan.memory),
            "yes" if plan.fits else "no",
            str(plan.messages),
            str(plan.schedule.micro_batches),
            plan.schedule.name,
            " ".join(map(str, plan.starts)),
        ]
        for plan in plans[:rows]
    ]
    table = columns((*heads, "schedule", "first layers of the stages"), cells, left=2, ruled=True)
    more = [f"and {len(plans) - rows} that take longer or do not fit"] * (len(plans) > rows)
    head = f"Pipelines of {job.ranks} ranks, {job.batch} samples in a batch"
    return "\n".join([head, *table, *more, "", _choice(plans, job)])


def _choice(plans: Sequence[PipelinePlan], job: PipelineJob) -> str:
    best = plans[0]
    if not best.fits:
        least = format_bytes(min(plan.memory for plan in plans))
        return (
            f"None fits into {format_bytes(int(job.memory))}: the least needs {least}. Take more "
            "ranks, smaller micro-batches, or Recompute"
        )
    name = best.schedule.name
    schedule = f'"{name}"' if name in SCHEDULES else "Schedule.parse(text)"
    return (
        f"Pipeline(model, group, micro_batches={best.schedule.micro_batches}, "
        f"schedule={schedule}, cut={list(best.starts[1:])})"
    )
