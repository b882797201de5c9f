"""`fitted`: a schedule made for measured costs and a limit of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpidist.errors import ScheduleError
from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule
from mpidist.parallel.pipeline.timeline import Costs

__all__ = ["fitted"]

_PRIORITY = (Pass.BACKWARD_INPUT, Pass.FORWARD, Pass.BACKWARD_WEIGHT)
"""What others wait for longest comes first; for second halves of backward nobody waits."""


def fitted(
    rank_of_stage: Sequence[int],
    micro_batches: int,
    costs: Costs,
    *,
    limit: int,
    name: str = "fitted",
) -> Schedule:
    """Return a schedule for given costs, of which no rank keeps more than `limit` contexts.

    Parameters
    ----------
    rank_of_stage : sequence of int
        The rank on which each stage is.
    micro_batches : int
        How many parts a batch is cut into.
    costs : Costs
        Of the stages, such as measured ones.
    limit : int
        The most contexts, of micro-batches and stages, that a rank may keep at once.
    name : str, optional
        Of the schedule.

    Returns
    -------
    Schedule
        With halves of backward passes.

    Raises
    ------
    ScheduleError
        If a number is below 1, or `limit` below the number of stages of a rank.
    ValueError
        If there are not as many costs as stages.

    Notes
    -----
    Greedy: of all actions that could come next on some rank, the one that can begin first is
    taken; of several, halves of backward that other stages wait for, then forward passes, of later
    stages first. A rank begins a micro-batch only if the contexts of all its stages fit. The work
    grows with the number of actions times that of stages.

    References
    ----------
    Graham (1966), Bounds for Certain Multiprocessing Anomalies: list scheduling.
    """
    ranks = max(rank_of_stage, default=-1) + 1
    most = max((list(rank_of_stage).count(rank) for rank in range(ranks)), default=0)
    for what, number, least in (
        ("stages", len(rank_of_stage), 1),
        ("micro_batches", micro_batches, 1),
        ("limit", limit, most),
    ):
        if number < least:
            raise ScheduleError(
                f"schedule '{name}': expected {what} of at least {least}, got {number}"
            )
    costs.check(len(rank_of_stage), f"schedule '{name}'")
    plan = _Plan(tuple(rank_of_stage), micro_batches, costs, limit)
    actions: list[list[Action]] = [[] for _ in range(ranks)]
    while candidates := list(plan.candidates()):
        began, _, action = min(candidates)
        plan.add(action, began)
        actions[rank_of_stage[action.stage]].append(action)
    return Schedule(name, tuple(rank_of_stage), micro_batches, tuple(map(tuple, actions)))


class _Plan:
    """What has been planned so far, and what could come next."""

    def __init__(
        self, rank_of_stage: tuple[int, ...], micro_batches: int, costs: Costs, limit: int
    ) -> None:
        self._rank_of_stage = rank_of_stage
        self._micro_batches = micro_batches
        self._costs = costs
        self._limit = limit
        stages, ranks = len(rank_of_stage), max(rank_of_stage) + 1
        self._own = [[s for s in range(stages) if rank_of_stage[s] == r] for r in range(ranks)]
        self._next = {(stage, kind): 0 for stage in range(stages) for kind in _PRIORITY}
        self._ended: dict[Action, float] = {}
        self._free = [0.0] * ranks

    def candidates(self) -> Iterator[tuple[float, tuple[int, int], Action]]:
        """Yield when each action that may be next could begin, its priority, and the action."""
        for (stage, kind), micro in self._next.items():
            action = Action(stage, kind, micro)
            needs = list(self._needs(action))
            if micro == self._micro_batches or any(need not in self._ended for need in needs):
                continue
            if kind is Pass.FORWARD and not self._fits(stage):
                continue
            free = self._free[self._rank_of_stage[stage]]
            began = max([free, *(self._ended[need] for need in needs)])
            yield began, (_PRIORITY.index(kind), -stage), action

    def add(self, action: Action, began: float) -> None:
        """Let an action be the next of its rank."""
        rank = self._rank_of_stage[action.stage]
        self._ended[action] = began + self._costs.of(action)
        self._free[rank] = self._ended[action]
        self._next[action.stage, action.kind] += 1

    def _needs(self, action: Action) -> Iterator[Action]:
        stage, kind, micro = action
        if kind is Pass.FORWARD:
            if stage > 0:
                yield Action(stage - 1, kind, micro)
        elif kind is Pass.BACKWARD_WEIGHT:
            yield Action(stage, Pass.BACKWARD_INPUT, micro)
        else:
            yield Action(stage, Pass.FORWARD, micro)
            if stage + 1 < len(self._rank_of_stage):
                yield Action(stage + 1, kind, micro)

    def _fits(self, stage: int) -> bool:
        """Whether a rank may run the next forward pass of a stage.

        Room is kept for the later stages of all micro-batches that its first stage has begun.
        """
        own = self._own[self._rank_of_stage[stage]]
        if stage != own[0]:
            return True
        begun = self._next[stage, Pass.FORWARD] + 1
        kept = sum(begun - self._next[s, Pass.BACKWARD_WEIGHT] for s in own)
        return kept <= self._limit
