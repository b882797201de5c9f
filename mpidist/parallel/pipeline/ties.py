"""Tied parameters: one `Parameter` that layers of several stages hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import Array
from mpidist.backends.work import Work
from mpidist.errors import UnsupportedOperationError
from mpidist.group import ProcessGroup
from mpidist.nn.containers import Sequential
from mpidist.nn.parameter import Parameter
from mpidist.parallel.pipeline.edges import Edge, drop_done
from mpidist.parallel.pipeline.schedule import Action, Schedule

__all__ = ["Tie", "Ties", "check_replicated", "ties_of"]

_AHEAD = 2
"""Contributions after the next one whose receives are posted."""


class Tie(NamedTuple):
    """A parameter that several stages hold.

    Attributes
    ----------
    parameter : Parameter
        On each rank that has some of the stages an object of its own.
    stages : tuple of int
        Those that hold it, ascending.
    names : tuple of str
        Its name in each of them; the first one is that in the whole model.
    """

    parameter: Parameter
    stages: tuple[int, ...]
    names: tuple[str, ...]


def ties_of(parts: Sequence[Sequential]) -> tuple[Tie, ...]:
    """Return the parameters that several stages hold, in the order of the whole model.

    Raises
    ------
    UnsupportedOperationError
        If two stages hold the same buffer, or two parameters over the same memory.
    """
    holders: dict[Parameter, list[tuple[int, str]]] = {}
    memory: dict[int, tuple[int, str, object]] = {}
    for stage, part in enumerate(parts):
        arrays: list[tuple[str, Array, object]] = [
            (name, parameter.data, parameter) for name, parameter in part.named_parameters()
        ]
        arrays += [(name, array, part) for name, array in part.named_buffers()]
        for name, array, holder in arrays:
            if isinstance(holder, Parameter):
                holders.setdefault(holder, []).append((stage, name))
            if not array.size:
                continue
            first, other, owner = memory.setdefault(array.ctypes.data, (stage, name, holder))
            if first != stage and owner is not holder:
                cure = (
                    "hold one Parameter object in both layers"
                    if isinstance(holder, Parameter)
                    else "give each its own, or cut the model so that one stage has both layers"
                )
                raise UnsupportedOperationError(
                    f"Pipeline: '{name}' of stage {stage} is the same array as '{other}' of stage "
                    f"{first}, and on another rank it would not be; {cure}"
                )
    return tuple(
        Tie(parameter, *map(tuple, zip(*held, strict=True)))
        for parameter, held in holders.items()
        if len(held) > 1
    )


def check_replicated(ties: Sequence[Tie], schedule: Schedule) -> None:
    """Raise if stages of one rank, each of which is to have a DDP, hold the same parameter."""
    for tie in ties:
        ranks = [schedule.rank_of_stage[stage] for stage in tie.stages]
        for stage, rank in zip(tie.stages, ranks, strict=True):
            if ranks.count(rank) > 1:
                raise UnsupportedOperationError(
                    f"Pipeline: '{tie.names[0]}' is held by stage {stage} and another one of rank "
                    f"{rank}, and its gradient cannot be in the DDPs of both; take a schedule of "
                    "one stage per rank, such as '1f1b' or 'zb-h1', or none with data_parallel"
                )


class Ties:
    """The tied parameters of one rank, and the sums of their gradients.

    [Note: ties] Floats are not added in any order with the same result. One process adds the
    contributions to a tied gradient micro-batch by micro-batch, and in each those of the last layer
    first. So a stage's contributions are kept one by one, and sent to the rank of the first stage
    that holds the parameter, its root. That rank adds them in the order of one process, each as
    soon as those before it are in, and in the end sends the sum to the others.

    Parameters
    ----------
    ties : sequence of Tie
        Of all ranks.
    schedule : Schedule
        What a step runs.
    group : ProcessGroup
        The pipeline's own.
    line : int
        Messages have the tags from this number, times the number of micro-batches, on; as many
        lines as `lines` says.
    """

    def __init__(
        self, ties: Sequence[Tie], schedule: Schedule, group: ProcessGroup, line: int
    ) -> None:
        self._gradients: list[_TiedGradient] = []
        for tie in ties:
            if group.rank in {schedule.rank_of_stage[stage] for stage in tie.stages}:
                self._gradients.append(_TiedGradient(tie, schedule, group, line))
            line += len(tie.stages)

    @staticmethod
    def lines(ties: Sequence[Tie]) -> int:
        """Return how many tags are needed for each micro-batch."""
        return sum(len(tie.stages) for tie in ties)

    def holds(self, stage: int) -> bool:
        """Whether a stage of this rank has tied parameters."""
        return any(stage in gradient.stages for gradient in self._gradients)

    def is_root(self, parameter: Parameter) -> bool:
        """Whether this rank, of those that hold a parameter, counts it; so if no other does."""
        return all(g.is_root for g in self._gradients if g.parameter is parameter)

    @contextmanager
    def recording(self, action: Action) -> Iterator[None]:
        """Keep what a pass contributes to tied gradients, and send or add it."""
        with ExitStack() as stack:
            for gradient in self._gradients:
                if action.stage in gradient.stages:
                    stack.enter_context(gradient.recording(action))
            yield

    def add(self) -> None:
        """Wait for the contributions of all stages; then the gradients of roots are complete."""
        for gradient in self._gradients:
            gradient.add()

    def share_gradients(self) -> None:
        """Give all ranks that hold a parameter the gradient that its root has."""
        for gradient in self._gradients:
            gradient.share_gradient()

    def share_values(self) -> None:
        """Give all ranks that hold a parameter the values that its root has."""
        for gradient in self._gradients:
            gradient.share_values()


class _TiedGradient:
    """The gradient of one tied parameter on one of the ranks that hold it."""

    def __init__(self, tie: Tie, schedule: Schedule, group: ProcessGroup, line: int) -> None:
        micros, name = schedule.micro_batches, tie.names[0]
        ranks = {stage: schedule.rank_of_stage[stage] for stage in tie.stages}
        root = ranks[tie.stages[0]]
        self.parameter = tie.parameter
        self.stages = tie.stages
        self.is_root = group.rank == root
        # The order in which one process runs the passes.
        self._order = [(micro, s) for micro in range(micros) for s in reversed(tie.stages)]
        self._edges: dict[tuple[int, int], Edge] = {}
        for own, (stage, rank) in enumerate(ranks.items()):
            if rank == root or group.rank not in (rank, root):
                continue
            for micro in range(micros):
                what = f"pipeline {stage}W{micro} of '{name}'"
                what += f", waits for rank {rank}," if self.is_root else f", sends to rank {root},"
                peer, tag = (rank if self.is_root else root), (line + own) * micros + micro
                self._edges[micro, stage] = Edge(group, peer, tag, what)
        # The first stage sends no contributions, so its tags are free.
        peers = sorted({*ranks.values()} - {root}) if self.is_root else [root]
        what = f"pipeline gradient of '{name}', from rank {root},"
        self._sharing = [Edge(group, peer, line * micros, what) for peer in peers]
        self._taken: dict[tuple[int, int], list[Array]] = {}
        self._arriving: dict[tuple[int, int], Work[Array]] = {}
        self._leaving: deque[Work[Any]] = deque()
        self._added = self._posted = 0

    @contextmanager
    def recording(self, action: Action) -> Iterator[None]:
        """Keep the contributions of a pass; send them to the root, or add what can be added."""
        taken: list[Array] = []
        self.parameter.divert(lambda g: taken.append(g.copy()))
        try:
            yield
        finally:
            self.parameter.divert(None)
        key = action.micro_batch, action.stage
        if self.is_root and key not in self._edges:
            self._taken[key] = taken
            self._add_ready(wait=False)
        else:
            self._leaving.extend(self._edges[key].send(self._stacked(taken)))
            drop_done(self._leaving)  # else each would keep its array until the step ends

    def add(self) -> None:
        """Add the rest at the root, after the last pass of the step."""
        if self.is_root:
            self._add_ready(wait=True)
            assert self._added == len(self._order), "all passes have been run"
            self._added = self._posted = 0

    def share_gradient(self) -> None:
        """Send the sum to the other ranks, or take it."""
        grad = self.parameter.grad
        shared = self._share([] if grad is None else [grad])
        if not self.is_root:
            self.parameter.zero_grad()
            for array in shared:
                self.parameter.add_grad(array)

    def share_values(self) -> None:
        """Send the values to the other ranks, or take them."""
        (shared,) = self._share([self.parameter.data])
        if not self.is_root:
            self.parameter.data[...] = shared

    def _share(self, arrays: list[Array]) -> Sequence[Array]:
        """Return the root's arrays; waits for all that was sent."""
        if self.is_root:
            for edge in self._sharing:
                self._leaving.extend(edge.send(self._stacked(arrays)))
        else:
            (edge,) = self._sharing
            arrays = list(edge.receive(edge.post()))
        for work in self._leaving:
            work.wait()
        self._leaving.clear()
        return arrays

    def _add_ready(self, *, wait: bool) -> None:
        """Add contributions in their order, until one is not in."""
        while self._added < len(self._order):
            stop = self._added + 1 + _AHEAD
            for key in self._order[self._posted : stop]:
                if key in self._edges:
                    self._arriving[key] = self._edges[key].post()
            self._posted = max(self._posted, stop)
            key = self._order[self._added]
            if key in self._taken:
                contributions = self._taken.pop(key)
            elif key in self._arriving and (wait or self._arriving[key].done()):
                contributions = list(self._edges[key].receive(self._arriving.pop(key)))
            else:
                return
            for contribution in contributions:
                self.parameter.add_grad(contribution)
            self._added += 1

    def _stacked(self, arrays: Sequence[Array]) -> Array:
        """Return arrays of the parameter's shape as one, of which there may be none."""
        if len(arrays) == 1:
            return arrays[0][np.newaxis]
        if arrays:
            return np.stack(arrays)
        return np.empty((0, *self.parameter.shape), self.parameter.dtype)
