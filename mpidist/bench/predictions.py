"""Predictions from reports of benchmarks, with what was measured beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil

from mpidist.bench.harness import BenchmarkError
from mpidist.bench.model import (
    BACKWARD,
    CostModel,
    Errors,
    JobLayout,
    NetworkModel,
    NodeFit,
    NodeModel,
    Point,
    leave_one_out,
)
from mpidist.bench.report import ORDINARY, Report
from mpidist.bench.strategies import StrategyStep, plan_strategies
from mpidist.parallel import BUCKET_BYTES


@dataclass(frozen=True, slots=True)
class Fitted:
    """The fit of one number of ranks to points, in the order of their sizes, and how far it is off.

    `errors` are those at the points, `left_out` those of each size by a fit without it.
    """

    fit: NodeFit
    points: tuple[Point, ...]
    errors: Errors
    left_out: Errors

    @classmethod
    def of(cls, ranks: int, points: Sequence[Point]) -> Fitted:
        """Fit times of at least two sizes."""
        in_order = tuple(sorted(points, key=lambda point: point.nbytes))
        fit = NodeFit.fit(ranks, in_order)
        left_out = leave_one_out(lambda others: NodeFit.fit(ranks, others), in_order)
        return cls(fit, in_order, Errors.of(fit, in_order), left_out)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The seconds of one all_reduce of so many bytes, as the model says.

    `measured` is the median in this layout at this size; None where nothing was measured.
    """

    layout: JobLayout
    nbytes: int
    seconds: float
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The seconds of one training step with DDP.

    `alone` is the step without communication, as measured. The model says `seconds` if nothing goes
    on at the same time, and `hidden` if the network works during all of the backward pass.
    `measured` is the median in this layout; None where nothing was measured.
    """

    layout: JobLayout
    parameters: int
    alone: float
    seconds: float
    hidden: float
    measured: float | None = None


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Everything that `make_plan` found.

    The model; one fit per measured number of ranks; where the network's numbers come from, empty
    without a network; predictions by layout, then size; steps by model, then layout; notes; and the
    steps of each strategy, by model, then layout.
    """

    model: CostModel
    fitted: tuple[Fitted, ...]
    network_source: str
    predictions: tuple[Prediction, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    strategies: tuple[StrategyStep, ...] = ()


def make_plan(
    reports: Mapping[str, Report],
    layouts: Sequence[JobLayout],
    *,
    series: str,
    sizes: Sequence[int] = (),
    network: NetworkModel | None = None,
) -> JobPlan:
    """Fit a model to reports, and predict.

    The reports go by name, for messages: at least one of ``bench all_reduce`` on one node, or of
    ``bench fsdp``; any of ``bench ddp`` on one node, and one of ``bench p2p`` between nodes, which
    `network` overrides. `layouts` are predicted beside what was measured, at `sizes`, or at those
    that were measured. Raises `BenchmarkError` if there is nothing to fit, or a network is missing.
    """
    of_strategies = [report for report in reports.values() if report.benchmark == "fsdp"]
    for report in of_strategies:
        alone = report.machine.ranks == report.machine.nodes
        if alone and any(layout.ranks > 1 for layout in layouts):
            raise BenchmarkError(
                "plan: a report of bench fsdp with one rank on each node says nothing about sums "
                "in a node; give one with several ranks on a node, or --ranks 1"
            )
    source = "given" if network is not None else ""
    for name, report in reports.items():
        if report.benchmark == "p2p" and network is None:
            network, source = _network(name, report), f"fitted to {name}"
    if of_strategies and {report.benchmark for report in reports.values()} <= {"fsdp", "p2p"}:
        _check_network(network or min(r.machine.nodes for r in of_strategies) > 1, layouts)
        strategies = [plan_strategies(report, layouts, network) for report in of_strategies]
        return JobPlan(CostModel(NodeModel(())), (), source, (), (), (), tuple(chain(*strategies)))
    reports = {name: report for name, report in reports.items() if report.benchmark != "fsdp"}
    notes: list[str] = []
    fitted = tuple(
        Fitted.of(ranks, points) for ranks, points in _inside(reports, series, notes).items()
    )
    _check_network(network, layouts)
    model = CostModel(NodeModel(tuple(node.fit for node in fitted)), network)
    measured = {
        (JobLayout(1, node.fit.ranks), point.nbytes): point.seconds
        for node in fitted
        for point in node.points
    }
    wanted = sorted({*layouts, *(layout for layout, _ in measured)})
    at = sorted({*sizes} or {nbytes for _, nbytes in measured})
    predictions = tuple(
        Prediction(
            layout,
            nbytes,
            model.all_reduce(nbytes, ranks=layout.ranks, nodes=layout.nodes),
            measured.get((layout, nbytes)),
        )
        for layout in wanted
        for nbytes in at
    )
    steps = tuple(
        step
        for name, report in reports.items()
        if report.benchmark == "ddp"
        for step in _steps(name, report, wanted, model, notes)
    )
    strategies = [plan_strategies(report, layouts, network) for report in of_strategies]
    return JobPlan(
        model, fitted, source, predictions, steps, tuple(notes), tuple(chain(*strategies))
    )


def _check_network(network: object, layouts: Sequence[JobLayout]) -> None:
    if not network and any(layout.nodes > 1 for layout in layouts):
        raise BenchmarkError(
            "plan: several nodes need a network; give --latency SECONDS and --bandwidth BYTES/S, "
            "or the report of bench p2p with one rank on each of two nodes"
        )


def _inside(reports: Mapping[str, Report], series: str, notes: list[str]) -> dict[int, list[Point]]:
    """Return the times of all_reduces on one node, by number of ranks."""
    alone: dict[int, list[Point]] = {}
    oversubscribed: dict[int, list[Point]] = {}
    for name, report in reports.items():
        machine = report.machine
        if report.benchmark != "all_reduce":
            continue
        if machine.nodes > 1:
            notes.append(f"{name}: left out, since it was measured on several nodes")
            continue
        by_ranks = alone
        if machine.ranks > machine.cores:
            by_ranks = oversubscribed
            notes.append(
                f"{name}: {machine.ranks} ranks took turns on {machine.cores} cores, which says "
                "nothing about a core for each; left out if there is another report"
            )
        by_ranks.setdefault(machine.ranks, []).extend(_points(report, "all_reduce", series))
    usable: dict[int, list[Point]] = {}
    for by_ranks in (alone, oversubscribed):
        usable = usable or {ranks: p for ranks, p in by_ranks.items() if len(p) > 1}
    if not usable:
        raise BenchmarkError(
            f"plan: there is nothing to fit: expected a report with two sizes or more of the "
            f"series {series!r}, from python -m mpidist bench all_reduce --json FILE on one node; "
            f"got {', '.join(reports) or 'none'}"
        )
    return dict(sorted(usable.items()))


def _network(name: str, report: Report) -> NetworkModel:
    """Fit a network to messages between two nodes."""
    if report.machine.nodes < 2:
        raise BenchmarkError(
            f"plan: {name} was measured inside one node and says nothing about a network; run "
            "bench p2p with one rank on each of two nodes, or give --latency and --bandwidth"
        )
    return NetworkModel.fit(_points(report, "ping-pong", ORDINARY))


def _points(report: Report, operation: str, series: str) -> list[Point]:
    return [
        Point(row.nbytes, row.times.median)
        for row in report.rows
        if (row.operation, row.series) == (operation, series)
    ]


def _steps(
    name: str, report: Report, layouts: Sequence[JobLayout], model: CostModel, notes: list[str]
) -> list[Step]:
    """Predict the steps of the models of one report."""
    measured_on = JobLayout(1, report.machine.ranks)
    if report.machine.nodes > 1:
        notes.append(f"{name}: left out, since it was measured on several nodes")
        return []
    steps = []
    for row in report.rows:
        if row.series != "DDP":
            continue
        alone, one_call = (
            report.find(row.operation, series, row.nbytes) for series in ("alone", "one all_reduce")
        )
        if alone is None or one_call is None:
            continue
        added = row.times.median - alone.times.median
        factor = max(added, 0.0) / one_call.times.median
        parameters = int(row.values["parameters"])
        notes.append(
            f"{parameters / 1e6:.2f} million parameters: DDP on {measured_on.ranks} ranks adds "
            f"{added * 1e3:.2f} ms, {factor:.2f} times one all_reduce of all gradients; on other "
            "layouts it is taken to be as many times the model's all_reduce"
        )
        for layout in sorted({*layouts, measured_on}):
            inside = factor * model.node.time(row.nbytes, layout.ranks)
            buckets = max(ceil(row.nbytes / BUCKET_BYTES), 1)
            across = buckets * model.across(
                row.nbytes / buckets, ranks=layout.ranks, nodes=layout.nodes
            )
            base = alone.times.median
            steps.append(
                Step(
                    layout=layout,
                    parameters=parameters,
                    alone=base,
                    seconds=base + inside + across,
                    hidden=base + inside + max(across - BACKWARD * base, 0.0),
                    measured=row.times.median if layout == measured_on else None,
                )
            )
    return steps
