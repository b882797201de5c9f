"""`simulate`: when each action of a schedule would run, given what the passes cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule

__all__ = ["Costs", "Span", "Timeline", "best_of", "simulate", "sums_of_stages"]


@dataclass(frozen=True)
class Costs:
    """How long the passes of each stage take, in any one unit.

    Attributes
    ----------
    forward, backward_input, backward_weight : tuple of float
        By stage. A whole backward pass takes as long as its two halves. `Pipeline.costs` gives them
        by layer; see `joined`.
    """

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]

    @classmethod
    def unit(cls, stages: int) -> Costs:
        """Return the costs with which schedules are compared: 1 for each of the three passes."""
        return cls((1.0,) * stages, (1.0,) * stages, (1.0,) * stages)

    def joined(self, starts: Sequence[int]) -> Costs:
        """Return the costs of stages, where these are the costs of layers.

        Parameters
        ----------
        starts : sequence of int
            The first layer of each stage, as `Pipeline.starts`.
        """
        return Costs(*(sums_of_stages(of_pass, starts) for of_pass in self.passes))

    @property
    def passes(self) -> tuple[tuple[float, ...], ...]:
        """The costs of forward passes, and of the first and second halves of backward passes."""
        return self.forward, self.backward_input, self.backward_weight

    def check(self, stages: int, what: str) -> None:
        """Raise `ValueError` unless these are the costs of so many stages."""
        given = [*map(len, self.passes)]
        if set(given) != {stages}:
            raise ValueError(f"{what}: expected costs of its {stages} stages, got {given}")

    def of(self, action: Action) -> float:
        """Return how long an action takes."""
        halves = {
            Pass.FORWARD: (self.forward,),
            Pass.BACKWARD: (self.backward_input, self.backward_weight),
            Pass.BACKWARD_INPUT: (self.backward_input,),
            Pass.BACKWARD_WEIGHT: (self.backward_weight,),
        }
        return sum(half[action.stage] for half in halves[action.kind])


def sums_of_stages(values: Sequence[float], starts: Sequence[int]) -> tuple[float, ...]:
    """Return the sums, over the layers of each stage, of what each layer has."""
    return tuple(sum(values[a:b]) for a, b in pairwise((*starts, len(values))))


class Span(NamedTuple):
    """When an action began and ended."""

    action: Action
    began: float
    ended: float


@dataclass(frozen=True)
class Timeline:
    """When each action of each rank runs.

    Attributes
    ----------
    spans : tuple of tuple of Span
        Of each rank, in order; in the unit of the costs.
    """

    spans: tuple[tuple[Span, ...], ...]

    def __str__(self) -> str:
        """Return what `picture` does."""
        return self.picture()

    @property
    def span(self) -> float:
        """From the beginning of the first action to the end of the last."""
        return max(spans[-1].ended for spans in self.spans)

    @property
    def idle(self) -> tuple[float, ...]:
        """How long each rank waits, until the last rank ends."""
        return tuple(self.span - sum(s.ended - s.began for s in spans) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """Time that all ranks together wait, over the time that they work."""
        useful = self.span * len(self.spans) - sum(self.idle)
        return sum(self.idle) / useful if useful else 0.0

    def costs(self) -> Costs:
        """Return what the passes of each stage have cost here: medians over the micro-batches.

        Of a whole backward pass each half counts as one half.
        """
        taken: dict[tuple[int, Pass], list[float]] = {}
        for spans in self.spans:
            for (stage, kind, _), began, ended in spans:
                whole = kind is Pass.BACKWARD
                halves = (Pass.BACKWARD_INPUT, Pass.BACKWARD_WEIGHT) if whole else (kind,)
                for half in halves:
                    taken.setdefault((stage, half), []).append((ended - began) / len(halves))
        stages = 1 + max(stage for stage, _ in taken)
        kinds = (Pass.FORWARD, Pass.BACKWARD_INPUT, Pass.BACKWARD_WEIGHT)
        return Costs(*(tuple(median(taken[s, kind]) for s in range(stages)) for kind in kinds))

    def picture(self, *, width: int = 0) -> str:
        """Return a drawing: a line per rank, time from left to right.

        Parameters
        ----------
        width : int, optional
            Characters of a line; when omitted, so many that the shortest action can be read.

        Returns
        -------
        str
            An action is shown as its letter and micro-batch, with its stage first where a rank has
            several; dots are waiting.
        """
        several = any(len({s.action.stage for s in spans}) > 1 for spans in self.spans)
        labels = [
            [str(s.action) if several else str(s.action).lstrip("0123456789") for s in spans]
            for spans in self.spans
        ]
        longest = 1 + max(len(label) for row in labels for label in row)
        shortest = min(
            (s.ended - s.began for row in self.spans for s in row if s.ended > s.began), default=1.0
        )
        scale = (width or longest * self.span / shortest) / (self.span or 1.0)
        lines = []
        for spans, row in zip(self.spans, labels, strict=True):
            line = ["."] * round(self.span * scale)
            for (_, began, ended), label in zip(spans, row, strict=True):
                start, stop = round(began * scale), round(ended * scale)
                box = label.ljust(stop - start - 1, "-") + " "
                line[start:stop] = box[: stop - start]
            lines.append("".join(line).rstrip())
        digits = len(str(len(lines) - 1))
        return "\n".join(f"rank {rank:{digits}} {line}" for rank, line in enumerate(lines))

    def svg(self, *, width: int = 960) -> str:
        """Return a drawing as SVG: a row per rank, a box per action, micro-batches as numbers.

        Parameters
        ----------
        width : int, optional
            Pixels of the whole drawing.

        Returns
        -------
        str
            The text of the file. Each box has the action, and its duration, as a title. Of a rank
            with several stages, boxes of later ones are lighter.
        """
        scale = (width - _MARGIN) / (self.span or 1.0)
        height = _ROW * len(self.spans)
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#f4f4f4"/>',
        ]
        for rank, spans in enumerate(self.spans):
            y = _ROW * rank
            lines.append(f'<text x="4" y="{y + 16}" font-size="12">rank {rank}</text>')
            own = sorted({span.action.stage for span in spans})
            for action, began, ended in spans:
                x, extent = _MARGIN + began * scale, (ended - began) * scale
                opacity = 1.0 - 0.5 * own.index(action.stage) / len(own)
                lines.append(
                    f'<rect x="{x:.1f}" y="{y + 2}" width="{extent:.1f}" height="{_ROW - 4}" '
                    f'fill="{_COLORS[action.kind]}" fill-opacity="{opacity:.2f}" stroke="#fff">'
                    f"<title>{action}: {ended - began:.4g}</title></rect>"
                )
                lines.append(
                    f'<text x="{x + extent / 2:.1f}" y="{y + 16}" font-size="11" '
                    f'text-anchor="middle">{action.micro_batch}</text>'
                )
        return "\n".join([*lines, "</svg>", ""])


_MARGIN, _ROW = 48, 24
"""Pixels before the first action, and of a rank, in a drawing."""

_COLORS = {
    Pass.FORWARD: "#7fb2e5",
    Pass.BACKWARD: "#8fcf8f",
    Pass.BACKWARD_INPUT: "#63c5b5",
    Pass.BACKWARD_WEIGHT: "#e8c66a",
}
"""Of the boxes of a drawing."""


def simulate(schedule: Schedule, costs: Costs | None = None, *, message: float = 0.0) -> Timeline:
    """Return when each action would run if every rank began the next one as soon as it could.

    Parameters
    ----------
    schedule : Schedule
        What is run.
    costs : Costs, optional
        What it costs; `Costs.unit` when omitted.
    message : float, optional
        How long a result is on its way to another rank.

    Returns
    -------
    Timeline
        The first action begins at 0.

    Raises
    ------
    ValueError
        If there are not as many costs as stages.

    Examples
    --------
    >>> from mpidist.parallel import one_f_one_b, simulate
    >>> timeline = simulate(one_f_one_b(3, 4))
    >>> print(timeline)
    rank 0 F0 F1 F2 ............B0--- F3 B1--- ...B2--- ...B3---
    rank 1 ...F0 F1 ......B0--- F2 B1--- F3 B2--- ...B3--- ......
    rank 2 ......F0 B0--- F1 B1--- F2 B2--- F3 B3--- ............
    >>> timeline.bubble
    0.5
    """
    costs = Costs.unit(schedule.stages) if costs is None else costs
    costs.check(schedule.stages, f"schedule '{schedule.name}'")
    ended: dict[Action, float] = {}
    free = [0.0] * schedule.ranks
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    for action in schedule.order:
        rank = schedule.rank_of_stage[action.stage]
        arrivals = [
            ended[need] + message * (schedule.rank_of_stage[need.stage] != rank)
            for need in schedule.needs(action)
        ]
        began = max([free[rank], *arrivals])
        free[rank] = ended[action] = began + costs.of(action)
        spans[rank].append(Span(action, began, ended[action]))
    return Timeline(tuple(map(tuple, spans)))


def best_of(
    schedules: Iterable[Schedule], costs: Costs | None = None, *, message: float = 0.0
) -> Schedule:
    """Return the schedule that ends first in the simulation; of several the first.

    Parameters
    ----------
    schedules : iterable of Schedule
        At least one; of stages that cost the same.
    costs, message : Costs and float, optional
        As for `simulate`.
    """
    return min(schedules, key=lambda schedule: simulate(schedule, costs, message=message).span)
