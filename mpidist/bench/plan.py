"""Predict all_reduce and training steps on other numbers of ranks and nodes.

A model of latencies and bandwidths is fitted to the reports of ``bench all_reduce``, ``bench ddp``,
``bench p2p`` and ``bench fsdp``, written with ``--json``. Every table says what was measured, what
is extrapolated, and how far the model is off where the two can be compared. A report of
``bench fsdp`` alone gives steps and memory of every strategy.

With ``--pipeline`` the file has what the layers of a model take, as `LayerCosts.measure` and
``save`` write it; the schedule, the number of micro-batches and the cut are chosen for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mpidist._formatting import columns, format_bytes, format_number
from mpidist.bench.harness import BenchmarkError, add_files, check_files, read_size
from mpidist.bench.model import BACKWARD, Errors, JobLayout, NetworkModel
from mpidist.bench.pipeline_plan import PipelineJob, PipelinePlan, plan_pipelines, render_pipelines
from mpidist.bench.predictions import Fitted, JobPlan, make_plan
from mpidist.bench.rendering import plot_plan
from mpidist.bench.report import LIBRARY, ORDINARY, REGISTERED, Report
from mpidist.bench.strategies import strategies_table
from mpidist.parallel import LayerCosts
from mpidist.usage import positive, write_once

_FORMAT = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT", help="JSON files of bench"
    )
    count = positive(int)
    parser.add_argument(
        "--ranks", type=count, nargs="+", metavar="N", help="on each node (default: as measured)"
    )
    parser.add_argument(
        "--nodes", type=count, nargs="+", metavar="N", default=[1], help="how many (default: 1)"
    )
    parser.add_argument(
        "--latency", type=positive(float), help="of a message between nodes, in seconds"
    )
    parser.add_argument(
        "--bandwidth", type=positive(float), help="of a node's network, in bytes per second"
    )
    parser.add_argument(
        "--sizes", type=read_size, nargs="+", default=[], help="bytes (default: as measured)"
    )
    parser.add_argument(
        "--series",
        choices=(REGISTERED, ORDINARY, LIBRARY),
        default=REGISTERED,
        help="whose all_reduce (default: %(default)s)",
    )
    pipeline = parser.add_argument_group("pipelines")
    pipeline.add_argument(
        "--pipeline", action="store_true", help="choose a schedule for the layers in REPORT"
    )
    pipeline.add_argument(
        "--micro-batches", type=count, nargs="+", metavar="N", help="(default: 1 to 8 per rank)"
    )
    pipeline.add_argument(
        "--batch", type=count, metavar="N", help="samples (default: 8 per rank times the measured)"
    )
    pipeline.add_argument("--memory", type=read_size, metavar="SIZE", help="that a rank has")
    pipeline.add_argument(
        "--copies",
        type=count,
        default=4,
        metavar="N",
        help="arrays of each parameter: itself, gradient, optimizer state (default: %(default)s)",
    )
    pipeline.add_argument(
        "--schedule", type=Path, metavar="FILE", help="write the chosen one, for Schedule.parse"
    )
    add_files(parser)


def run(options: argparse.Namespace) -> int:
    """Predict, and print, write and draw it; the exit code is 2 if it cannot be done as asked."""
    command = " ".join(["python", "-m", "mpidist", *options.argv])
    if options.pipeline:
        return _run_pipeline(options, command)
    try:
        reports = {path.name: _load(path) for path in options.reports}
        _check(options, reports.values())
        measured = {
            r.machine.ranks // (r.machine.nodes if r.benchmark == "fsdp" else 1)
            for r in reports.values()
            if r.benchmark in ("all_reduce", "fsdp")
        }
        layouts = product(options.nodes, options.ranks or sorted(measured))
        network = options.latency and NetworkModel(options.latency, options.bandwidth)
        plan = make_plan(
            reports,
            [JobLayout(nodes, ranks) for nodes, ranks in layouts],
            series=options.series,
            sizes=options.sizes,
            network=network,
        )
        text = render_plan(plan, reports, command)
        if options.plot is not None:
            plot_plan(plan, reports, options.plot)
    except BenchmarkError as error:
        write_once(f"{error}\n")
        return 2
    sys.stdout.write(text)
    if options.json is not None:
        options.json.write_text(_to_json(plan, command), encoding="utf-8")
    return 0


def _run_pipeline(options: argparse.Namespace, command: str) -> int:
    """Choose a pipeline, and print and write it; the exit code is 1 if none fits."""
    try:
        check_files(options, "plan")
        job, plans, notes = _choose(options)
        if options.schedule is not None:
            options.schedule.write_text(f"{plans[0].schedule}\n", encoding="utf-8")
    except (BenchmarkError, OSError) as error:
        write_once(f"{error}\n")
        return 2
    blocks = [f"mpidist plan\n$ {command}", render_pipelines(plans, job), "\n".join(notes)]
    sys.stdout.write("\n\n".join(filter(None, blocks)) + "\n")
    if options.json is not None:
        rows = [{**dataclasses.asdict(plan), "schedule": str(plan.schedule)} for plan in plans]
        document = {"format": _FORMAT, "command": command, "pipelines": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if plans[0].fits else 1


def _choose(options: argparse.Namespace) -> tuple[PipelineJob, list[PipelinePlan], list[str]]:
    if len(options.ranks or ()) != 1 or len(options.nodes) != 1 or options.plot is not None:
        raise BenchmarkError("plan: --pipeline takes one number of --ranks, and draws no picture")
    if len(options.reports) != 1:
        raise BenchmarkError(f"plan: --pipeline takes one file, got {len(options.reports)}")
    path = options.reports[0]
    try:
        layers = LayerCosts.load(path)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"plan: {path}: {error}") from error
    ranks = options.ranks[0] * options.nodes[0]
    job = PipelineJob(
        ranks=ranks,
        batch=options.batch or 8 * ranks * layers.samples,
        memory=options.memory or float("inf"),
        copies=options.copies,
        latency=options.latency or 0.0,
        bandwidth=options.bandwidth or float("inf"),
    )
    micro_batches = options.micro_batches or [ranks << step for step in range(4)]
    plans, notes = plan_pipelines(layers, job, micro_batches)
    if not plans:
        raise BenchmarkError("\n".join(["plan: there is no pipeline to choose", *notes]))
    return job, plans, notes


def _check(options: argparse.Namespace, reports: Collection[Report]) -> None:
    """Raise what would otherwise be found out after the work."""
    if (options.latency is None) != (options.bandwidth is None):
        raise BenchmarkError("plan: --latency and --bandwidth make a network only together")
    if options.plot is not None and not any(r.benchmark == "all_reduce" for r in reports):
        raise BenchmarkError("plan: --plot draws all_reduce, and needs a report of it")
    check_files(options, "plan")


def _load(path: Path) -> Report:
    try:
        return Report.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"plan: {path}: {error}") from error


def render_plan(plan: JobPlan, reports: dict[str, Report], command: str) -> str:
    """Return a plan as text: the numbers, the model beside the measurements, the predictions."""
    sources = [f"{name}: {_source(report)}" for name, report in reports.items()]
    blocks = [["mpidist plan", f"$ {command}", *sources]]
    if plan.fitted:
        head = "Fitted: time = meetings + bytes / bandwidth"
        blocks.append([head, _fits(plan.fitted), _FITS, *_across(plan)])
        blocks.append(["Measured, all_reduce: the model beside the medians", _compared(plan)])
    if any(prediction.measured is None for prediction in plan.predictions):
        blocks.append(["Extrapolated, all_reduce: nobody has measured these", _predicted(plan)])
    if plan.steps:
        blocks.append(["DDP step, ms", _stepped(plan), _STEPS])
    if plan.strategies:
        blocks.append(
            [
                "A step and the memory of a rank, by strategy",
                strategies_table(plan.strategies),
                _STRATEGIES,
            ]
        )
    blocks.append(list(plan.notes))
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


_FITS = (
    "off by: median and worst of |model / measured - 1|, of the fit to all sizes, and of each size "
    "but the first and the last by a fit without it"
)

_STEPS = (
    "alone: without communication, measured. model: all communication after the computation. "
    f"hidden: the network works during the whole backward pass, {BACKWARD:.2f} of the computation"
)


_STRATEGIES = (
    "model: all communication after the computation. hidden: the network works during the passes. "
    "rank 0 holds parameters, gradients, optimizer state and buffers; where nothing is measured, "
    "the row is extrapolated"
)


def _source(report: Report) -> str:
    machine = report.machine
    parts = (f"bench {report.benchmark}", f"{machine.ranks} ranks", f"{machine.nodes} node(s)")
    return ", ".join([*parts, machine.processor, machine.mpi, machine.date])


def _fits(fitted: Sequence[Fitted]) -> str:
    heads = (
        "ranks",
        "meetings us",
        "GB/s",
        "up to",
        "GB/s beyond",
        "fit off by",
        "left-out off by",
    )
    lines = []
    for node in fitted:
        fit = node.fit
        up_to, beyond = "any size", ""
        if fit.knee < float("inf"):
            up_to, beyond = format_bytes(int(fit.knee)), format_number(_rate(fit.far))
        lines.append(
            [
                str(fit.ranks),
                format_number(fit.meetings * 1e6),
                format_number(_rate(fit.near)),
                up_to,
                beyond,
                _off(node.errors),
                _off(node.left_out),
            ]
        )
    return _table(lines, heads)


def _rate(per_byte: float) -> float:
    """Return 10**9 bytes of the array per second."""
    return 1e-9 / per_byte if per_byte else float("inf")


def _off(errors: Errors) -> str:
    if not errors.count:
        return "too few sizes"
    return f"{errors.median:.0%}, at worst {errors.worst:.0%}"


def _across(plan: JobPlan) -> list[str]:
    network = plan.model.network
    if network is None:
        return []
    figures = f"{network.latency * 1e6:.2f} us, {network.bandwidth / 1e9:.2f} GB/s for each node"
    return [f"network, {plan.network_source}: {figures}"]


def _compared(plan: JobPlan) -> str:
    lines = []
    for prediction in plan.predictions:
        if prediction.measured is None:
            continue
        times = [format_number(1e6 * t) for t in (prediction.measured, prediction.seconds)]
        off = f"{prediction.seconds / prediction.measured - 1:+.0%}"
        lines.append([str(prediction.layout), format_bytes(prediction.nbytes), *times, off])
    return _table(lines, ["nodes x ranks", "size", "measured us", "model us", "off"])


def _predicted(plan: JobPlan) -> str:
    times = {
        (prediction.layout, prediction.nbytes): format_number(prediction.seconds * 1e6)
        for prediction in plan.predictions
        if prediction.measured is None
    }
    layouts = list(dict.fromkeys(layout for layout, _ in times))
    lines = [
        [format_bytes(nbytes), *(times.get((layout, nbytes), "") for layout in layouts)]
        for nbytes in dict.fromkeys(nbytes for _, nbytes in times)
    ]
    return _table(lines, ["time in us, nodes x ranks", *map(str, layouts)])


def _stepped(plan: JobPlan) -> str:
    lines = []
    for step in plan.steps:
        measured = "extrapolated" if step.measured is None else format_number(step.measured * 1e3)
        times = [format_number(t * 1e3) for t in (step.alone, step.seconds, step.hidden)]
        lines.append([f"{step.parameters / 1e6:.2f}", str(step.layout), *times, measured])
    heads = ("million parameters", "nodes x ranks", "alone", "model", "hidden", "measured")
    return _table(lines, heads)


def _table(lines: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    return "\n".join(columns(heads, lines, ruled=True))


def _to_json(plan: JobPlan, command: str) -> str:
    """Return everything as JSON: seconds, bytes, and what was measured."""
    document: dict[str, Any] = {"format": _FORMAT, "command": command}
    document |= dataclasses.asdict(plan)
    for written in (*document["predictions"], *document["steps"], *document["strategies"]):
        written["extrapolated"] = written["measured"] is None
    return json.dumps(_finite(document), indent=1) + "\n"


def _finite(value: Any) -> Any:
    """Return a document in which infinity and NaN, which JSON does not know, are null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):  # noqa: PLR0124
        return None
    return value
