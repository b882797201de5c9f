"""What travels between stages: activations forward, gradients backward, a message for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.namespaces import as_bytes, as_native
from mpidist.backends.base import Traffic
from mpidist.backends.work import Message, Work
from mpidist.group import ProcessGroup
from mpidist.group.pending import Peers
from mpidist.parallel.pipeline.schedule import Action, Pass, Schedule
from mpidist.point_to_point._messages import Receive, Send, prepare_receive, prepare_send

__all__ = ["Edges", "largest_tag"]

_AHEAD = 2
"""Actions before the one that needs it at which a receive is posted."""

_LONGEST = (1 << 30) - 1
"""Bytes of a message whose receive may have more room than it needs."""


def largest_tag(schedule: Schedule) -> int:
    """Return the largest tag that the messages of a schedule have."""
    return 2 * schedule.stages * schedule.micro_batches - 1


class _Edge:
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
        self._peers = Peers(frozenset({peer}))
        self._lane = group.transport.lane(Traffic.ENVELOPE, tag)
        self._last: tuple[tuple[int, ...], DType] | None = None
        self._nbytes = 0
        self._bare = False

    def send(self, array: Array) -> list[Work[None]]:
        """Begin to send this step's array."""
        x, expected = as_native(array), self._bare
        repeated = (x.shape, x.dtype) == self._last
        if expected and repeated:
            return [self._start(as_bytes(x), receives=False)]
        works = []
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
        return self._start(buffer, receives=True).then(lambda _: buffer)

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

    def _start(self, flat: Array, *, receives: bool) -> Work[None]:
        """Begin to send or to receive bytes without an envelope, in the lane of the envelopes."""
        messages = [Message(flat, self._peer, self._lane)]
        sides = ([], messages) if receives else (messages, [])
        return self._group.operations.start_messages(
            self._name,
            lambda backend, _: backend.exchange(*sides),
            lambda: None,
            peers=self._peers,
        )

    def _remember(self, array: Array) -> None:
        """Expect the next message to be bare if this one is as the last, or the first."""
        described = array.shape, array.dtype
        self._bare = self._last in (None, described) and array.nbytes <= _LONGEST
        self._last, self._nbytes = described, array.nbytes


class Edges:
    """The messages of one rank in steps that all run the same actions.

    [Note: pipeline messages] Sends are immediate, and every message of a step has a tag of its own,
    by the action that receives it. So no order in which ranks send and receive can block, and two
    messages with one tag, of two steps, come in the order of the steps. Receives are posted a few
    actions ahead: their messages arrive while this rank computes, and not more of them need memory.

    Parameters
    ----------
    schedule : Schedule
        What is run.
    actions : sequence of Action
        Those of this rank in each step.
    group : ProcessGroup
        The pipeline's own.

    Attributes
    ----------
    actions : sequence of Action
        As given.
    """

    def __init__(self, schedule: Schedule, actions: Sequence[Action], group: ProcessGroup) -> None:
        self._schedule = schedule
        self.actions = actions
        self._posted = 0
        self._incoming: dict[Action, _Edge] = {}
        self._outgoing: dict[Action, _Edge] = {}
        for action in actions:
            source, target = schedule.source(action), schedule.target(action)
            if source is not None and (rank := schedule.rank_of_stage[source.stage]) != group.rank:
                name = f"pipeline {action}, waits for {source} of rank {rank},"
                self._incoming[action] = _Edge(group, rank, self._tag(action), name)
            if target is not None and (rank := schedule.rank_of_stage[target.stage]) != group.rank:
                name = f"pipeline {action}, sends to {target} of rank {rank},"
                self._outgoing[action] = _Edge(group, rank, self._tag(target), name)
        self._arriving: dict[Action, Work[Array]] = {}
        self._local: dict[Action, Array] = {}
        self._leaving: deque[Work[None]] = deque()

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
            if action in self._incoming:
                self._arriving[action] = self._incoming[action].post()
        self._posted = stop

    def receive(self, action: Action) -> Array | None:
        """Return what an action of this rank takes from another stage, if any; waits for it."""
        if action in self._incoming:
            return self._incoming[action].receive(self._arriving.pop(action))
        return self._local.pop(action, None)

    def send(self, action: Action, array: Array | None) -> None:
        """Pass the result of an action on to the stage that takes it, if there is one."""
        if action in self._outgoing:
            assert array is not None, "another stage takes it"
            self._leaving.extend(self._outgoing[action].send(array))
        elif array is not None and (target := self._schedule.target(action)) is not None:
            self._local[target] = array
        # In the order of sending, so that one poll is enough where none has arrived.
        while self._leaving and self._leaving[0].done():
            self._leaving.popleft()

    def finish(self) -> None:
        """Wait until all that was sent may be changed; the next step may begin then."""
        while self._leaving:
            self._leaving.popleft().wait()
        self._posted = 0

    def _tag(self, receiver: Action) -> int:
        line = 2 * receiver.stage + (receiver.kind is not Pass.FORWARD)
        return line * self._schedule.micro_batches + receiver.micro_batch
