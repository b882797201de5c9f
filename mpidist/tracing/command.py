"""``python -m mpidist trace``: add up a trace, or make one of the parts of a job that broke."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

from mpidist._formatting import columns
from mpidist.tracing.chrome import write_trace
from mpidist.tracing.parts import TracePart
from mpidist.tracing.summary import Summary, load, summarise
from mpidist.usage import write_once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands for traces."""
    choices = parser.add_subparsers(title="what to do", dest="action", required=True)
    text = "where each rank's time went, and for whom the others waited"
    summary = choices.add_parser("summary", help=text, description=text)
    summary.add_argument("file", type=Path, metavar="FILE", help="a trace, .json or .json.gz")
    summary.add_argument("--json", action="store_true", help="print everything as JSON, in seconds")
    summary.add_argument(
        "--top", type=int, default=10, metavar="N", help="rows of the longer tables (default: 10)"
    )
    text = "make one trace of the parts that a broken job has left"
    merge = choices.add_parser("merge", help=text, description=text)
    merge.add_argument("parts", type=Path, metavar="DIRECTORY", help="whose name ends with .parts")
    merge.add_argument(
        "--out", type=Path, metavar="FILE", help="the trace (default: the name without .parts)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the summary, or write the trace; return the exit code, 2 if a file cannot be used."""
    try:
        text = _summary(options) if options.action == "summary" else _merge(options)
    except (OSError, ValueError) as error:
        write_once(f"trace {options.action}: {error}\n")
        return 2
    sys.stdout.write(text)
    return 0


def _summary(options: argparse.Namespace) -> str:
    summary = summarise(load(options.file))
    if options.json:
        return json.dumps(asdict(summary), indent=1) + "\n"
    return render_summary(
        summary, " ".join(["python", "-m", "mpidist", *options.argv]), top=options.top
    )


def _merge(options: argparse.Namespace) -> str:
    directory: Path = options.parts
    out = options.out
    if out is None:
        if directory.suffix != ".parts":
            raise ValueError(f"{directory} does not end with .parts; say with --out where to write")
        out = directory.with_suffix("")
    parts = [TracePart.of(path.read_bytes()) for path in sorted(directory.glob("rank-*.jsonl.gz"))]
    usable = [part for part in parts if "began" in part.facts]
    if not usable:
        raise ValueError(f"{directory} holds no rank's part of a trace")
    if len({part.facts["run"] for part in usable}) > 1:
        raise ValueError(f"{directory} holds parts of several traces; keep those of one")
    write_trace(usable, out)
    return f"{out}: {len(usable)} of {usable[0].facts['size']} ranks\n"


def render_summary(summary: Summary, command: str, *, top: int = 10) -> str:
    """Return a summary as text, times in milliseconds; `top` rows of calls and of steps.

    The command line is for the head.
    """
    hosts = len({rank.host for rank in summary.ranks})
    count = "1 host" if hosts == 1 else f"{hosts} hosts"
    blocks = [
        [f"$ {command}", f"{len(summary.ranks)} ranks on {count}; times in ms"],
        [*_ranks(summary)],
        [*_calls(summary, top)],
        [*_transfers(summary)],
        [*_steps(summary, top)],
        [f"note: {note}" for note in summary.notes],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _ranks(summary: Summary) -> Iterator[str]:
    heads = ("rank", "wall", "compute", "communication", "waiting", "in flight", "hidden", "host")
    yield from columns(
        heads,
        [
            (
                str(rank.rank),
                *map(_ms, (rank.wall, rank.compute, rank.communication, rank.waiting)),
                _ms(rank.in_flight),
                "" if rank.hidden is None else f"{rank.hidden:.0%}",
                rank.host,
            )
            for rank in summary.ranks
        ],
        left=1,
    )
    yield "wall = compute + communication, on the main thread. waiting: the part of communication"
    yield "in which another rank had not come. in flight: while an immediate operation was under"
    yield "way. hidden: the share of it in which the rank computed."


def _calls(summary: Summary, top: int) -> Iterator[str]:
    if not summary.calls:
        return
    yield "Operations, sum over the ranks"
    shown = [call for call in summary.calls if call.seconds][:top]
    yield from columns(
        ("time", "waiting", "calls", "per call", "MiB", "operation", "called at"),
        [
            (
                _ms(call.seconds),
                _ms(call.waiting),
                str(call.calls),
                _ms(call.seconds / call.calls) if call.calls else "",
                "" if call.nbytes is None else f"{call.nbytes / 2**20:.2f}",
                call.operation,
                _short(call.site),
            )
            for call in shown
        ],
        left=2,
    )
    others = summary.calls[len(shown) :]
    if others:
        yield f"and {len(others)} more, {_ms(sum(call.seconds for call in others))} in all"


def _transfers(summary: Summary) -> Iterator[str]:
    if not summary.transfers:
        return
    yield "Transfers of units, sum over the ranks"
    yield from columns(
        ("in flight", "hidden", "exposed", "transfers", "exposed per transfer", "transfer"),
        [
            (
                *map(_ms, (transfer.seconds, transfer.hidden, transfer.exposed)),
                str(transfer.count),
                _ms(transfer.exposed / transfer.count),
                transfer.name,
            )
            for transfer in summary.transfers
        ],
        left=1,
    )
    yield "exposed: the part of in flight in which the rank waited for it. hidden: the rest."


def _steps(summary: Summary, top: int) -> Iterator[str]:
    steps = summary.steps
    if not steps:
        return
    times = [step.seconds for step in steps]
    yield f"{len(steps)} steps, median {_ms(median(times))}, longest {_ms(max(times))}"
    yield from columns(
        ("rank", "last in", "behind by, mean", "worst"),
        [
            (str(late.rank), f"{late.steps} of {len(steps)}", _ms(late.mean), _ms(late.worst))
            for late in summary.lateness
        ],
    )
    yield "last: the rank for which another one waited longest in the step, and how long."
    worst = sorted(steps, key=lambda step: -step.behind)[:top]
    yield ""
    yield "Steps with the longest waiting"
    yield from columns(
        ("step", "time", "last", "behind by"),
        [
            (
                str(step.step),
                _ms(step.seconds),
                "" if step.last is None else str(step.last),
                _ms(step.behind),
            )
            for step in worst
        ],
    )


def _short(site: str) -> str:
    """Return a call site without this directory."""
    return site.removeprefix(str(Path.cwd()) + "/")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
