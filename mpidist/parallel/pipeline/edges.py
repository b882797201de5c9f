"""What travels between stages: activations forward, gradients backward, a message for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpidist._types import Array
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule
from mpidist.point_to_point._messages import Receive, Send, prepare_receive, prepare_send

__all__ = ["Edges", "largest_tag"]

_AHEAD = 2
"""Actions before the one that needs it at which a receive is posted."""


def largest_tag(schedule: Schedule) -> int:
    """Return the largest tag that the messages of a schedule have."""
    return 2 * schedule.stages * schedule.micro_batches - 1


class Edges:
    """The messages of one rank in one step.

    [Note: pipeline messages] Sends are immediate, and every message of a step has a tag of its own,
    by the action that receives it. So no order in which ranks send and receive can block, and two
    messages with one tag, of two steps, come in the order of the steps. Receives are posted a few
    actions ahead: their messages arrive while this rank computes, and not more of them need memory.

    Parameters
    ----------
    schedule : Schedule
        What is run.
    actions : sequence of Action
        Those of this rank in this step.
    group : ProcessGroup
        The pipeline's own.
    """

    def __init__(self, schedule: Schedule, actions: Sequence[Action], group: ProcessGroup) -> None:
        self._schedule = schedule
        self._group = group
        self._actions = actions
        self._posted = 0
        self._arriving: dict[Action, Work[Array]] = {}
        self._local: dict[Action, Array] = {}
        self._leaving: list[Work[None]] = []

    def describe(self, action: Action) -> str:
        """Name an action of this rank, and the one whose result it takes."""
        source = self._schedule.source(action)
        if source is None:
            return f"pipeline {action}"
        rank = self._schedule.rank_of_stage[source.stage]
        return f"pipeline {action}, after {source} of rank {rank}"

    def post(self, index: int) -> None:
        """Post the receives of the action of this number, and of those that follow closely."""
        stop = min(index + 1 + _AHEAD, len(self._actions))
        for action in self._actions[self._posted : stop]:
            source = self._schedule.source(action)
            rank = None if source is None else self._schedule.rank_of_stage[source.stage]
            if rank is not None and rank != self._group.rank:
                name = f"pipeline {action}, waits for {source} of rank {rank},"
                receive = Receive(rank, self._tag(action))
                self._arriving[action] = prepare_receive(receive, self._group, None, name=name)()
        self._posted = stop

    def receive(self, action: Action) -> Array | None:
        """Return what an action of this rank takes from another stage, if any; waits for it."""
        if self._schedule.source(action) is None:
            return None
        if action in self._local:
            return self._local.pop(action)
        return self._arriving.pop(action).wait()

    def send(self, action: Action, array: Array | None) -> None:
        """Pass the result of an action on to the stage that takes it, if there is one."""
        target = self._schedule.target(action)
        if target is None or array is None:
            return
        rank = self._schedule.rank_of_stage[target.stage]
        if rank == self._group.rank:
            self._local[target] = array
            return
        message = Send(np.ascontiguousarray(array), rank, self._tag(target))
        name = f"pipeline {action}, sends to {target} of rank {rank},"
        self._leaving.append(prepare_send(message, self._group, None, name=name)())
        self._leaving = [work for work in self._leaving if not work.done()]

    def finish(self) -> None:
        """Wait until all that was sent may be changed."""
        for work in self._leaving:
            work.wait()
        self._leaving.clear()

    def _tag(self, receiver: Action) -> int:
        line = 2 * receiver.stage + (receiver.kind is not Pass.FORWARD)
        return line * self._schedule.micro_batches + receiver.micro_batch
