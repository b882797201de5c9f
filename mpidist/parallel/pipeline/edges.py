"""What travels between stages: activations forward, gradients backward, a message for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import as_bytes, as_native
from mpidist.backends.base import Traffic
from mpidist.backends.work import Message, Work
from mpidist.group import ProcessGroup
from mpidist.parallel.pipeline.schedule import GRADIENT_PASSES, Action, Pass, Schedule
from mpidist.parallel.pipeline.stages import StageLink
from mpidist.point_to_point._messages import Receive, Send, prepare_receive, prepare_send

__all__ = ["Edge", "Edges", "drop_done"]

_AHEAD = 2
"""Actions before the one that needs it at which a receive is posted."""

_LONGEST = (1 << 30) - 1
"""Bytes of a message whose receive may have more room than it needs."""


def drop_done(works: deque[Work[Any]]) -> None:
    """Forget the sends that are over; in their order, so that one poll is enough if none is."""
    while works and works[0].done():
        works.popleft()


class _BareWork(Work[Array]):
    """A message without envelope: of its group only when it is waited for, which is rare."""

    def __init__(
        self, group: ProcessGroup, inner: Work[Any], flat: Array, peer: int, name: str
    ) -> None:
        self._group = group
        self._inner = inner
        self._flat = flat
        self._peer = peer
        self._name = name
        group.transport.engine.held.add(self)

    def done(self) -> bool:
        """Poll it."""
        over = self._inner.done()
        if over:
            self._group.transport.engine.held.discard(self)
        return over

    def wait(self, timeout: float | None = None) -> Array:
        """Wait, and return the bytes."""
        if not self.done():
            operations = self._group.operations
            with operations.performing(self._name, [self._peer], timeout) as waiter:
                waiter.wait_for(self.done)
        return self._flat


class Edge:
    """The messages of one action, one in each step: from or to one rank, with one tag.

    [Note: repeated shapes] In most steps the message of an action has the shape and dtype that it
    had in the step before. It then travels *bare*, without an envelope, and its receive is posted
    with room for it. Both ranks know from the messages before whether the next one is expected to
    be bare: after two that differ, envelopes come until two are alike. An array that differs from
    what is expected follows in an envelope, behind a message that is one byte longer than expected.
    For that byte there is room, in which the receiver has written 0, and it is 1.

    Parameters
    ----------
    group : ProcessGroup
        The pipeline's own.
    peer, tag : int
        The other rank, and the tag of all messages.
    name : str
        What they are called in errors and records.
    """

    def __init__(self, group: ProcessGroup, peer: int, tag: int, name: str) -> None:
        self._group = group
        self._peer = peer
        self._tag = tag
        self._name = name
        self._lane = group.transport.lane(Traffic.ENVELOPE, tag)
        self._last: tuple[tuple[int, ...], DType] | None = None
        self._nbytes = 0
        self._bare = False

    def send(self, array: Array) -> list[Work[Any]]:
        """Begin to send this step's array."""
        x, expected = as_native(array), self._bare
        repeated = (x.shape, x.dtype) == self._last
        if expected and repeated:
            return [self._start(as_bytes(x), receives=False)]
        works: list[Work[Any]] = []
        if expected:
            works.append(self._start(np.ones(self._nbytes + 1, np.uint8), receives=False))
        message = Send(x, self._peer, self._tag)
        works.append(prepare_send(message, self._group, None, name=self._name)())
        self._remember(x)
        return works

    def post(self) -> Work[Array]:
        """Begin to receive what `receive` takes."""
        if not self._bare:
            message = Receive(self._peer, self._tag)
            return prepare_receive(message, self._group, None, name=self._name)()
        buffer = np.empty(self._nbytes + 1, np.uint8)
        buffer[-1] = 0
        return self._start(buffer, receives=True)

    def receive(self, work: Work[Array]) -> Array:
        """Return this step's array; waits for it."""
        array = work.wait()
        if self._bare and not array[-1]:
            assert self._last is not None, "messages are bare after others"
            shape, dtype = self._last
            return array[:-1].view(dtype).reshape(shape)
        if self._bare:
            message = Receive(self._peer, self._tag)
            array = prepare_receive(message, self._group, None, name=self._name)().wait()
        self._remember(array)
        return array

    def _start(self, flat: Array, *, receives: bool) -> _BareWork:
        """Begin to send or to receive bytes without an envelope, in the lane of the envelopes."""
        messages = [Message(flat, self._peer, self._lane)]
        sides = ([], messages) if receives else (messages, [])
        inner = self._group.transport.exchange(*sides)
        return _BareWork(self._group, inner, flat, self._peer, self._name)

    def _remember(self, array: Array) -> None:
        """Expect the next message to be bare if this one is as the last, or the first."""
        described = array.shape, array.dtype
        self._bare = self._last in (None, described) and array.nbytes <= _LONGEST
        self._last, self._nbytes = described, array.nbytes


class Edges:
    """The messages of one rank in steps that all run the same actions.

    [Note: pipeline messages] Sends are immediate, and every message of a step has a tag of its own,
    by its link, its direction and its micro-batch. So no order in which ranks send and receive can
    block, and two messages with one tag, of two steps, come in the order of the steps. Receives are
    posted a few actions ahead: their messages arrive while this rank computes, and not more of them
    need memory.

    Parameters
    ----------
    schedule : Schedule
        What is run.
    actions : sequence of Action
        Those of this rank in each step.
    links : sequence of StageLink
        What goes from stage to stage. The result of a forward pass goes from the first
        stage to the second one, and the gradient by it goes back.
    group : ProcessGroup
        The pipeline's own.

    Attributes
    ----------
    actions : sequence of Action
        As given.
    """

    def __init__(
        self,
        schedule: Schedule,
        actions: Sequence[Action],
        links: Sequence[StageLink],
        group: ProcessGroup,
    ) -> None:
        self._schedule = schedule
        self.actions = actions
        self._posted = 0
        self._incoming: dict[Action, dict[str, Edge]] = {}
        self._outgoing: dict[Action, dict[str, Edge | Action]] = {}
        for action in actions:
            self._incoming[action], self._outgoing[action] = {}, {}
            forward = action.kind is Pass.FORWARD
            if not forward and action.kind not in GRADIENT_PASSES:
                continue
            for line, link in enumerate(links):
                if action.stage not in link.stages:
                    continue
                takes = action.stage == link.stages[forward]
                other = sum(link.stages) - action.stage
                counterpart = schedule.counterpart(action, other)
                rank = schedule.rank_of_stage[other]
                tag = (2 * line + (not forward)) * schedule.micro_batches + action.micro_batch
                if takes and rank != group.rank:
                    name = f"pipeline {action}, waits for {counterpart} of rank {rank},"
                    self._incoming[action][link.name] = Edge(group, rank, tag, name)
                elif not takes and rank != group.rank:
                    name = f"pipeline {action}, sends to {counterpart} of rank {rank},"
                    self._outgoing[action][link.name] = Edge(group, rank, tag, name)
                elif not takes:
                    self._outgoing[action][link.name] = counterpart
        self._arriving: dict[Action, dict[str, Work[Array]]] = {}
        self._local: dict[Action, dict[str, Array]] = {}
        self._leaving: deque[Work[Any]] = deque()

    def describe(self, action: Action) -> str:
        """Name an action of this rank, and the one whose result it takes."""
        source = self._schedule.source(action)
        if source is None:
            return f"pipeline {action}"
        rank = self._schedule.rank_of_stage[source.stage]
        return f"pipeline {action}, after {source} of rank {rank}"

    def post(self, index: int) -> None:
        """Post the receives of the action of this number, and of those that follow closely."""
        stop = min(index + 1 + _AHEAD, len(self.actions))
        for action in self.actions[self._posted : stop]:
            incoming = self._incoming[action]
            self._arriving[action] = {name: edge.post() for name, edge in incoming.items()}
        self._posted = stop

    def receive(self, action: Action) -> dict[str, Array]:
        """Return what an action of this rank takes from other stages, by name; waits for it."""
        arriving, incoming = self._arriving.pop(action), self._incoming[action]
        received = self._local.pop(action, {})
        received.update((name, incoming[name].receive(work)) for name, work in arriving.items())
        return received

    def send(self, action: Action, results: Mapping[str, Array]) -> None:
        """Pass the results of an action on to the stages that take them, if there are any."""
        for name, to in self._outgoing[action].items():
            if isinstance(to, Action):
                self._local.setdefault(to, {})[name] = results[name]
            else:
                self._leaving.extend(to.send(results[name]))
        drop_done(self._leaving)

    def finish(self) -> None:
        """Wait until all that was sent may be changed; the next step may begin then."""
        while self._leaving:
            self._leaving.popleft().wait()
        self._posted = 0
