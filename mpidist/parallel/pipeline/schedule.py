"""`Schedule`: which rank runs which pass of which micro-batch, in which order, as data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from mpidist.errors import ScheduleError

__all__ = ["Action", "Pass", "Schedule"]


class Pass(str, Enum):
    """What an action does: a pass of a stage on one micro-batch.

    Notes
    -----
    `FORWARD` and `BACKWARD` are the passes of a `Module`; `BACKWARD_INPUT` and `BACKWARD_WEIGHT`
    are the halves of the second one. Only the first half gives what the stage before waits for.
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Action(NamedTuple):
    """One pass of one stage on one micro-batch; as text ``"2F0"``.

    Attributes
    ----------
    stage : int
        Counted from 0.
    kind : Pass
        Which pass.
    micro_batch : int
        Counted from 0.
    """

    stage: int
    kind: Pass
    micro_batch: int

    def __str__(self) -> str:
        """Return stage, letter of the pass, micro-batch."""
        return f"{self.stage}{self.kind.value}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action of a text such as ``"2F0"``.

        Raises
        ------
        ScheduleError
            If it is none.
        """
        parts = re.fullmatch(r"(\d+)([FBIW])(\d+)", text)
        if parts is None:
            raise ScheduleError(
                f"schedule: {text!r} is no action; expected a stage, one of F, B, I, W, and a "
                "micro-batch, such as 2F0"
            )
        return cls(int(parts[1]), Pass(parts[2]), int(parts[3]))


GRADIENT_PASSES = (Pass.BACKWARD, Pass.BACKWARD_INPUT)
"""The passes that give the gradient by the stage's input."""

_WEIGHT_PASSES = (Pass.BACKWARD, Pass.BACKWARD_WEIGHT)
"""The passes that add to the parameters' gradients, and end the life of a context."""

ASCENDING = ((Pass.FORWARD,), GRADIENT_PASSES, _WEIGHT_PASSES)
"""The passes of a stage that come in ascending micro-batches, each group by itself."""


@dataclass(frozen=True)
class Schedule:
    """The actions of all ranks, each rank's in order: what a `Pipeline` runs.

    Nothing else knows an algorithm: a schedule may be printed, edited as text, simulated and run,
    whoever made it.

    Parameters
    ----------
    name : str
        For messages, one word.
    rank_of_stage : tuple of int
        The rank on which each stage is.
    micro_batches : int
        How many parts a batch is cut into.
    actions : tuple of tuple of Action
        Of each rank, in the order in which it runs them.

    Raises
    ------
    ScheduleError
        If some pass is missing, there twice, or on another rank than its stage; if passes of a
        stage do not come in ascending micro-batches; if ranks would wait for each other for ever,
        naming both ends of the wait.

    Notes
    -----
    Each stage runs, for each micro-batch, one forward pass and either one whole backward pass or
    its two halves. Forward passes, passes that give gradients by inputs, and passes that add to
    parameters' gradients, each come in ascending micro-batches: the sums of the gradients then
    have the same bits under every schedule.
    """

    name: str
    rank_of_stage: tuple[int, ...]
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_complete()
        self._check_ascending()
        self.order  # noqa: B018  # raises if it does not end

    def __str__(self) -> str:
        """Return what `text` does."""
        return self.text()

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.rank_of_stage)

    # -- what depends on what --------------------------------------------------------------------

    def source(self, action: Action) -> Action | None:
        """Return the action of a neighbouring stage whose result this one takes, if any."""
        stage, kind, micro = action
        if kind is Pass.FORWARD:
            return Action(stage - 1, kind, micro) if stage > 0 else None
        if kind in GRADIENT_PASSES and stage + 1 < self.stages:
            return self.counterpart(action, stage + 1)
        return None

    def counterpart(self, action: Action, stage: int) -> Action:
        """Return another stage's pass in the same direction, forward or backward, as this one."""
        _, kind, micro = action
        forward = kind is Pass.FORWARD
        return Action(stage, kind if forward else self._gradient_pass[stage, micro], micro)

    def needs(self, action: Action) -> Iterator[Action]:
        """Yield the actions that have to be over before this one begins."""
        source = self.source(action)
        if source is not None:
            yield source
        if action.kind is Pass.BACKWARD_WEIGHT:
            yield action._replace(kind=Pass.BACKWARD_INPUT)
        elif action.kind is not Pass.FORWARD:
            yield action._replace(kind=Pass.FORWARD)

    @cached_property
    def _gradient_pass(self) -> dict[tuple[int, int], Pass]:
        """The pass that gives the gradient by the input, of each stage and micro-batch."""
        return {
            (action.stage, action.micro_batch): action.kind
            for actions in self.actions
            for action in actions
            if action.kind in GRADIENT_PASSES
        }

    @cached_property
    def order(self) -> tuple[Action, ...]:
        """All actions in one order in which they could run one after the other."""
        over: dict[Action, None] = {}
        at = [0] * self.ranks
        while len(over) < sum(map(len, self.actions)):
            before = len(over)
            for rank, actions in enumerate(self.actions):
                while at[rank] < len(actions) and all(
                    n in over for n in self.needs(actions[at[rank]])
                ):
                    over[actions[at[rank]]] = None
                    at[rank] += 1
            if len(over) == before:
                raise ScheduleError(f"schedule '{self.name}' never ends: {self._waits(at, over)}")
        return tuple(over)

    @cached_property
    def peaks(self) -> tuple[int, ...]:
        """The most micro-batches of whose forward passes each rank keeps the context at once.

        From a forward pass to the whole backward pass, or its second half; of every stage.
        """
        return tuple(map(_peak, self.actions))

    def check(self, *, limit: int) -> None:
        """Raise unless no rank keeps more than so many contexts at once.

        Everything else has been checked when the schedule was made.

        Parameters
        ----------
        limit : int
            Contexts, each of one micro-batch and stage, for which a rank has memory.

        Raises
        ------
        ScheduleError
            Naming the first rank that needs more.
        """
        for rank, peak in enumerate(self.peaks):
            if peak > limit:
                raise self._fail(
                    f"rank {rank} keeps the contexts of up to {peak} forward passes at once, and "
                    f"the limit is {limit}; take one that keeps fewer, or make one with fitted()"
                )

    def messages(self) -> dict[tuple[int, int], tuple[Action, ...]]:
        """Return what travels between neighbouring stages on different ranks.

        Returns
        -------
        dict of (int, int) to tuple of Action
            For each sender and receiver the actions of the sender whose results travel, in the
            order in which it runs them: one order for both.
        """
        takers = {self.source(action): action for action in self.order}
        sent: dict[tuple[int, int], list[Action]] = {}
        for action in self.order:
            if action in takers:
                sender, receiver = (self.rank_of_stage[a.stage] for a in (action, takers[action]))
                if sender != receiver:
                    sent.setdefault((sender, receiver), []).append(action)
        return {pair: tuple(actions) for pair, actions in sent.items()}

    # -- text --------------------------------------------------------------------------------------

    def text(self) -> str:
        """Return the schedule as text that `parse` reads: two lines, and one per rank."""
        head = (
            f"{self.name}: {self.micro_batches} micro-batches",
            f"ranks of the stages: {' '.join(map(str, self.rank_of_stage))}",
        )
        return "\n".join([*head, *(" ".join(map(str, actions)) for actions in self.actions)])

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule of a text as `text` writes it, perhaps edited.

        Parameters
        ----------
        text : str
            Empty lines, and what stands behind ``#``, do not count.

        Raises
        ------
        ScheduleError
            If it cannot be read, or the schedule is not valid.
        """
        lines = [
            line for line in (raw.partition("#")[0].strip() for raw in text.splitlines()) if line
        ]
        first = re.fullmatch(r"(\S+): (\d+) micro-batches", lines[0] if lines else "")
        second = re.fullmatch(r"ranks of the stages:((?: \d+)+)", lines[1] if lines[1:] else "")
        if first is None or second is None:
            raise ScheduleError(
                "schedule: expected the lines 'NAME: 8 micro-batches' and 'ranks of the stages: "
                f"0 1 2 3', then one line per rank; got {lines[:2]}"
            )
        actions = tuple(tuple(map(Action.parse, line.split())) for line in lines[2:])
        return cls(first[1], tuple(map(int, second[1].split())), int(first[2]), actions)

    # -- the checks --------------------------------------------------------------------------------

    def _fail(self, problem: str) -> ScheduleError:
        return ScheduleError(f"schedule '{self.name}': {problem}")

    def _check_sizes(self) -> None:
        for what, number in (("micro-batch", self.micro_batches), ("rank", self.ranks)):
            if number < 1:
                raise self._fail(f"expected at least 1 {what}, got {number}")
        if set(self.rank_of_stage) != set(range(self.ranks)):
            raise self._fail(
                f"expected stages on each of the ranks 0 to {self.ranks - 1}, for which there are "
                f"actions; got stages on the ranks {self.rank_of_stage}"
            )

    def _check_complete(self) -> None:
        counts: Counter[Action] = Counter()
        for rank, actions in enumerate(self.actions):
            for i, action in enumerate(actions):
                if not (action.stage < self.stages and action.micro_batch < self.micro_batches):
                    raise self._fail(
                        f"rank {rank} has {action} as its action {i}, but there are "
                        f"{self.stages} stages and {self.micro_batches} micro-batches, from 0 on"
                    )
                if self.rank_of_stage[action.stage] != rank:
                    raise self._fail(
                        f"rank {rank} has {action} as its action {i}, but stage {action.stage} is "
                        f"on rank {self.rank_of_stage[action.stage]}"
                    )
            counts.update(actions)
        for stage in range(self.stages):
            for micro in range(self.micro_batches):
                made = "".join(k.value * counts[Action(stage, k, micro)] for k in Pass)
                if made not in ("FB", "FIW"):
                    raise self._fail(
                        f"stage {stage} has the passes {made or 'none'!r} of micro-batch "
                        f"{micro} on rank {self.rank_of_stage[stage]}; expected one F, and one B "
                        "or one I and one W"
                    )

    def _check_ascending(self) -> None:
        for kinds in ASCENDING:
            for rank, actions in enumerate(self.actions):
                last: dict[int, Action] = {}
                for action in actions:
                    if action.kind not in kinds:
                        continue
                    before = last.setdefault(action.stage, action)
                    if before.micro_batch > action.micro_batch:
                        raise self._fail(
                            f"rank {rank} runs {action} after {before}; the micro-batches of a "
                            "stage come in ascending order, so that gradients are summed in it"
                        )
                    last[action.stage] = action

    def _waits(self, at: list[int], over: Iterable[Action]) -> str:
        """Describe ranks that wait for each other, beginning anywhere before the circle."""
        positions = {
            a: (r, i) for r, actions in enumerate(self.actions) for i, a in enumerate(actions)
        }
        rank = next(r for r, actions in enumerate(self.actions) if at[r] < len(actions))
        waits: dict[int, str] = {}
        while rank not in waits:
            action = self.actions[rank][at[rank]]
            need = next(n for n in self.needs(action) if n not in over)
            other, index = positions[need]
            waits[rank] = (
                f"rank {rank} at its action {at[rank]}, {action}, needs {need}, action {index} of "
                f"rank {other}"
            )
            rank = other
        return "; ".join(list(waits.values())[list(waits).index(rank) :])


def _peak(actions: Iterable[Action]) -> int:
    live = peak = 0
    for action in actions:
        live += (action.kind is Pass.FORWARD) - (action.kind in _WEIGHT_PASSES)
        peak = max(peak, live)
    return peak
