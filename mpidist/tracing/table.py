"""The summary of a trace as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from mpidist._formatting import columns
from mpidist.tracing.summary import Summary

__all__ = ["render_summary"]


def render_summary(summary: Summary, command: str, *, top: int = 10) -> str:
    """Lay a summary out as text.

    Parameters
    ----------
    summary : Summary
        The figures.
    command : str
        The command line, for the head.
    top : int, optional
        Rows of the tables of calls and of steps.

    Returns
    -------
    str
        Lines; times in milliseconds.
    """
    hosts = len({rank.host for rank in summary.ranks})
    places = "1 host" if hosts == 1 else f"{hosts} hosts"
    blocks = [
        [f"$ {command}", f"{len(summary.ranks)} ranks on {places}; times in ms"],
        [*_ranks(summary)],
        [*_calls(summary, top)],
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
                str(each.rank),
                *map(_ms, (each.wall, each.compute, each.communication, each.waiting)),
                _ms(each.in_flight),
                "" if each.hidden is None else f"{each.hidden:.0%}",
                each.host,
            )
            for each in summary.ranks
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
    shown = [each for each in summary.calls if each.seconds][:top]
    yield from columns(
        ("time", "waiting", "calls", "per call", "MiB", "operation", "called at"),
        [
            (
                _ms(each.seconds),
                _ms(each.waiting),
                str(each.calls),
                _ms(each.seconds / each.calls) if each.calls else "",
                "" if each.nbytes is None else f"{each.nbytes / 2**20:.2f}",
                each.operation,
                _short(each.site),
            )
            for each in shown
        ],
        left=2,
    )
    others = summary.calls[len(shown) :]
    if others:
        yield f"and {len(others)} more, {_ms(sum(each.seconds for each in others))} in all"


def _steps(summary: Summary, top: int) -> Iterator[str]:
    steps = summary.steps
    if not steps:
        return
    times = [step.seconds for step in steps]
    yield f"{len(steps)} steps, median {_ms(median(times))}, longest {_ms(max(times))}"
    yield from columns(
        ("rank", "last in", "behind by, mean", "worst"),
        [
            (str(each.rank), f"{each.steps} of {len(steps)}", _ms(each.mean), _ms(each.worst))
            for each in summary.lateness
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
    """Return a place as one would name it from here."""
    return site.removeprefix(str(Path.cwd()) + "/")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
