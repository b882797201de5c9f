"""What a training step of each strategy holds and how long it takes, as formulae.

P bytes of parameters are trained on M nodes of N ranks. Inside a node gradients are all-reduced or
reduce-scattered. Between nodes a *pass* is (M - 1) / M P bytes that each node sends and receives: a
reduce-scatter or an all-gather is one, an all-reduce two. What is sent in forward or backward can
be hidden behind the computation as far as there are several messages, since the last one of
backward starts, and the first one of forward arrives, when nothing else is left to compute.

References
----------
Rajbhandari, Rasley, Ruwase, He (2020), ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models, sections 5 (memory) and 7 (communication).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from mpidist._formatting import columns, format_bytes, format_number
from mpidist.bench.model import BACKWARD, JobLayout, NetworkModel, NodeFit, NodeModel, Point
from mpidist.bench.report import Report

ALL_REDUCE, REDUCE_SCATTER = "all_reduce in a node", "reduce_scatter in a node"
SUM, GATHER = "all_reduce between nodes", "all_gather between nodes"
SCATTER = "reduce_scatter over all ranks"
_PASSES = {SUM: 2, GATHER: 1, SCATTER: 1}
STEP, ALONE, UPDATE = "FSDP step", "alone", "AdamW alone"


class SplitOver(Enum):
    """Over which ranks something is split."""

    RANK = "rank"
    NODE = "node"
    JOB = "job"

    def parts(self, layout: JobLayout) -> int:
        """Return into how many parts."""
        if self is SplitOver.RANK:
            return 1
        return layout.ranks * (layout.nodes if self is SplitOver.JOB else 1)


@dataclass(frozen=True, slots=True)
class StrategyCost:
    """What a strategy costs.

    `parameters`, `gradients` and `state` are what each rank has of these. `inside` is what is done
    with gradients in a node, `forward`, `backward` and `step` what is done between nodes with all
    parameters or gradients in each part of a step. With `buffers` gradients are in two message
    buffers on their way.
    """

    name: str
    parameters: SplitOver
    gradients: SplitOver
    state: SplitOver
    inside: str
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = (SUM,)
    step: tuple[str, ...] = ()
    buffers: bool = True

    def held(self, model: TrainedModel, layout: JobLayout) -> float:
        """Return the bytes that each rank holds, without activations."""
        gradients = model.nbytes / self.gradients.parts(layout)
        state = model.state * model.nbytes / self.state.parts(layout)
        buffers = float(min(model.messages, 2) * model.largest) if self.buffers else 0.0
        if self.forward and layout.nodes > 1:  # units are gathered once per node
            buffers += min(model.messages, 2) * model.largest / layout.ranks
        return model.nbytes / self.parameters.parts(layout) + gradients + state + buffers

    def seconds(
        self, model: TrainedModel, layout: JobLayout, cluster: ClusterModel
    ) -> tuple[float, float]:
        """Return how long a step takes: if nothing is hidden, and if as much as possible is."""
        update = model.update * model.nbytes / self.state.parts(layout)
        time = model.passes + update + cluster.inside(self.inside, model, layout)
        if layout.nodes == 1:
            return time, time
        forward, backward, step = (
            sum(cluster.between(operation, model, layout) for operation in operations)
            for operations in (self.forward, self.backward, self.step)
        )
        time += forward + backward + step
        hidden = min(forward, (1 - BACKWARD) * model.passes)
        hidden += min(backward, BACKWARD * model.passes)
        return time, time - (1 - 1 / model.messages) * hidden


_RANK, _NODE, _JOB = SplitOver.RANK, SplitOver.NODE, SplitOver.JOB

_COSTS = (
    StrategyCost(
        "FULL_SHARD", _JOB, _JOB, _JOB, REDUCE_SCATTER, (GATHER,), backward=(GATHER, SCATTER)
    ),
    StrategyCost("HYBRID_SHARD", _NODE, _NODE, _NODE, REDUCE_SCATTER),
    StrategyCost("DDP+sharded", _NODE, _RANK, _JOB, ALL_REDUCE, step=(GATHER,), buffers=False),
    StrategyCost("sharded", _NODE, _JOB, _JOB, REDUCE_SCATTER, backward=(SCATTER,), step=(GATHER,)),
    StrategyCost("DDP", _RANK, _RANK, _RANK, ALL_REDUCE, buffers=False),
)

STRATEGIES = {cost.name: cost for cost in _COSTS}
"""By the names that ``bench fsdp`` gives them."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A model, and what a rank computes.

    `nbytes` of parameters, whose gradients travel in so many `messages`, of which the `largest` has
    so many bytes. Forward and backward take `passes` seconds, the optimizer `update` seconds per
    byte of parameters. Its state has `state` bytes per byte of parameters.
    """

    nbytes: int
    messages: int
    largest: int
    passes: float = 0.0
    update: float = 0.0
    state: float = 2.0

    @classmethod
    def measured(
        cls, nbytes: int, messages: int, largest: int, *, alone: float, update: float, ranks: int
    ) -> TrainedModel:
        """Describe a model by the seconds of a step alone, and of the update of a rank's share."""
        return cls(nbytes, messages, largest, alone - update, update * ranks / nbytes)


@dataclass(frozen=True, slots=True)
class ClusterModel:
    """What gradients and parameters cost inside a node and between nodes, by operation."""

    node: Mapping[str, NodeModel]
    network: Mapping[str, NetworkModel]

    @classmethod
    def of(cls, report: Report, network: NetworkModel | None = None) -> ClusterModel:
        """Fit to what ``bench fsdp`` has measured beside the steps; `network` overrides."""
        ranks, nodes = report.machine.ranks // report.machine.nodes, report.machine.nodes
        node = {name: _fit(report, name, ranks) for name in (ALL_REDUCE, REDUCE_SCATTER)}
        if network is not None:
            return cls(node, dict.fromkeys(_PASSES, network))
        if nodes == 1:
            return cls(node, {})
        between = {}
        for operation, passes in _PASSES.items():
            # In a pass each node sends M - 1 messages of a part in M of the array.
            messages = passes * (nodes - 1)
            points = _points(report, operation)
            if operation == SCATTER:
                inside = node[REDUCE_SCATTER]
                points = [Point(p.nbytes, p.seconds - inside.time(p.nbytes, ranks)) for p in points]
            between[operation] = NetworkModel.fit(
                [Point(p.nbytes // nodes, max(p.seconds, 1e-9) / messages) for p in points]
            )
        return cls(node, between)

    def inside(self, operation: str, model: TrainedModel, layout: JobLayout) -> float:
        """Return the seconds that a node spends on all gradients."""
        message = model.nbytes / model.messages
        return model.messages * self.node[operation].time(message, layout.ranks)

    def between(self, operation: str, model: TrainedModel, layout: JobLayout) -> float:
        """Return the seconds that an operation takes between nodes."""
        if operation not in self.network:
            raise ValueError(f"{layout.nodes} nodes need a network; there is none")
        message = model.nbytes / model.messages / layout.nodes
        messages = _PASSES[operation] * (layout.nodes - 1) * model.messages
        return messages * self.network[operation].time(message)


def _fit(report: Report, operation: str, ranks: int) -> NodeModel:
    if ranks == 1:
        return NodeModel((NodeFit(1, 0.0, 0.0, 0.0, float("inf")),))
    return NodeModel((NodeFit.fit(ranks, _points(report, operation)),))


def _points(report: Report, operation: str) -> list[Point]:
    rows = [row for row in report.rows if row.operation == operation]
    return [Point(row.nbytes, row.times.median) for row in rows]


@dataclass(frozen=True, slots=True)
class StrategyStep:
    """A training step of one strategy: seconds, and bytes that a rank holds, as the formulae say.

    `seconds` if nothing goes on at the same time, `hidden` if the network works during the passes.
    `measured` and `counted` are the median, and what rank 0 held, in this layout; None where
    nothing was measured.
    """

    strategy: str
    layout: JobLayout
    parameters: int
    seconds: float
    hidden: float
    held: float
    measured: float | None = None
    counted: float | None = None


def plan_strategies(
    report: Report, layouts: Sequence[JobLayout], network: NetworkModel | None = None
) -> list[StrategyStep]:
    """Predict the steps of a report of ``bench fsdp`` in its own layout and in others.

    `network` overrides what was measured between nodes, but for the report's own layout.
    """
    machine = report.machine
    measured_on = JobLayout(machine.nodes, machine.ranks // machine.nodes)
    measured, given = ClusterModel.of(report), ClusterModel.of(report, network)
    steps = []
    for nbytes in dict.fromkeys(row.nbytes for row in report.rows if row.operation == STEP):
        rows = {
            row.series: row for row in report.rows if (row.operation, row.nbytes) == (STEP, nbytes)
        }
        for layout in sorted({*layouts, measured_on}):
            cluster = measured if layout == measured_on else given
            for name in _strategies(layout):
                row = rows.get(name) or rows[_LIKE[name]]
                model = TrainedModel.measured(
                    nbytes,
                    int(row.values["messages"]),
                    int(row.values["largest"]),
                    alone=rows[ALONE].times.median,
                    update=rows[UPDATE].times.median,
                    ranks=machine.ranks,
                )
                known = layout == measured_on and name in rows
                steps.append(
                    StrategyStep(
                        name,
                        layout,
                        int(row.values["parameters"]),
                        *STRATEGIES[name].seconds(model, layout, cluster),
                        STRATEGIES[name].held(model, layout),
                        row.times.median if known else None,
                        row.values["held"] if known else None,
                    )
                )
    return steps


_LIKE = {"FULL_SHARD": "HYBRID_SHARD", "HYBRID_SHARD": "FULL_SHARD"}
"""Of which strategy a report has the units, where it has not measured one."""


def _strategies(layout: JobLayout) -> list[str]:
    """Return the strategies of a layout: on one node HYBRID_SHARD is FULL_SHARD."""
    return [name for name in STRATEGIES if layout.nodes > 1 or name != "HYBRID_SHARD"]


def strategies_table(steps: Sequence[StrategyStep]) -> str:
    """Lay out what was predicted, and what was measured where it was."""
    lines = []
    for step in steps:
        times = [*(format_number(1e3 * t) for t in (step.hidden, step.seconds)), "", ""]
        if step.measured is not None:
            off = f"{step.seconds / step.measured - 1:+.0%}"
            times[2:] = format_number(1e3 * step.measured), off
        counted = "" if step.counted is None else format_bytes(int(step.counted))
        where = f"{step.parameters / 1e6:.2f}", str(step.layout), step.strategy
        lines.append([*where, *times, format_bytes(int(step.held)), counted])
    heads = ("million", "nodes x ranks", "strategy", "hidden ms", "model ms", "measured ms", "off")
    return "\n".join(columns((*heads, "model", "held by rank 0"), lines, ruled=True))
