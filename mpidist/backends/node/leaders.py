"""The arrival of ranks of several nodes: counters on each node, one message between two nodes.

The first rank of each node is its leader. When all ranks of the node have arrived at an operation,
the leader sends what they have called to the leaders of the other nodes; when it has heard from all
of these it publishes, in the memory of its node, whether the calls are the same. A short array
travels in the same message: see `mpidist.backends.node.sequencer.Payload`.
"""

from __future__ import annotations

import threading
from collections import deque
from os import sched_yield
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.backends.algorithms import Exchanger
from mpidist.backends.node.sequencer import RING, ArrivalCounters, Payload, fence
from mpidist.backends.node.signatures import CallSignature
from mpidist.backends.node.topology import NodeTopology

__all__ = ["HEADER_NBYTES", "MOST_NODES", "PAYLOAD_NBYTES", "LeaderComparison"]

MOST_NODES = 8
"""Nodes between which each leader sends a message to each other; with more, a sum has fewer."""

PAYLOAD_NBYTES = 64 << 10
"""Bytes that a leader sends, to all others together, with an arrival."""

HEADER_NBYTES = 32
"""Bytes before it, four words: digest, whether the node agrees, whether a difference breaks, and
the balance."""

_EQUAL, _DIFFERENT, _BREAKING = 1, 2, 3
"""What is published: the calls are the same, differ, or differ where a part is under way."""

_POLLS = 200
"""How often arrivals are polled before everything else is driven, too."""


class LeaderComparison:
    """Compares the calls of ranks on several nodes; see `SignatureComparison`.

    The leaders exchange what their nodes have called for one operation after the other, always in
    the same arrays: the messages of an operation are sent when those of the earlier one are over.

    Parameters
    ----------
    counters : ArrivalCounters
        Of the ranks of this node.
    topology : NodeTopology
        The nodes, at most `MOST_NODES`.
    transport : Exchanger
        Carries the messages of the leaders.
    lane : int
        Of these messages alone.
    published : buffer
        `published_nbytes` bytes, zero at first, shared by the ranks of this node.

    Attributes
    ----------
    messages : list of Array, uint8
        On a leader, the message of each node, in their order; see `Payload`.
    """

    in_slots = True
    published_nbytes = 2 * RING * 8

    def __init__(
        self,
        counters: ArrivalCounters,
        topology: NodeTopology,
        transport: Exchanger,
        lane: int,
        published: Any,
    ) -> None:
        self._counters = counters
        self._published = memoryview(published).cast("B").cast("Q")
        self._local = topology.local
        self._alone = len(topology.local) == 1
        self._leads = topology.rank == 0
        self._arrived = 0
        self.messages: list[Array] = []
        if not self._leads:
            return
        node = topology.node_of(transport.rank)
        length = HEADER_NBYTES + PAYLOAD_NBYTES
        self.messages = [np.empty(length, np.uint8) for _ in topology.nodes]
        headers = [memoryview(m.data)[:HEADER_NBYTES].cast("Q") for m in self.messages]
        self._header, self._headers = headers[node], [*headers[:node], *headers[node + 1 :]]
        received = [*self.messages[:node], *self.messages[node + 1 :]]
        peers = [ranks[0] for ranks in topology.nodes if ranks != topology.nodes[node]]
        self._exchange = transport.persistent_exchange(self.messages[node], received, peers, lane)
        self._calls: deque[tuple[int, CallSignature, Payload | None]] = deque()
        self._sent: tuple[int, Payload | None] | None = None
        self._driven = threading.Lock()

    # -- as the sequencer asks -------------------------------------------------------------------

    def arrive(self, number: int, signature: CallSignature, payload: Payload | None = None) -> None:
        """Publish that this rank has called an operation with this signature."""
        if number <= self._arrived:
            return
        self._arrived = number
        if not self._alone:
            self._counters.arrive(number, signature)
        if self._leads:
            self._calls.append((number, signature, payload))
            self._drive()

    def arrive_and_compare(
        self, number: int, signature: CallSignature, payload: Payload | None = None
    ) -> bool:
        """Arrive, poll for some microseconds, and return whether all have with the same call."""
        self.arrive(number, signature, payload)
        published, index = self._published, 2 * (number % RING)
        for _ in range(_POLLS):
            if published[index + 1] == number:
                return published[index] == _EQUAL
            sched_yield()  # at once: the rank that it waits for may need this core
            if self._leads:
                self._drive()
        return False

    def all_arrived(self, number: int) -> bool:
        """Whether all ranks have called it; polled."""
        if self._leads:
            self._drive()
        return self._published[2 * (number % RING) + 1] == number

    def missing(self, number: int) -> list[int]:
        """Return the ranks of this node that have not called it."""
        if self._alone:
            return []
        return [self._local[index] for index in self._counters.missing(number)]

    def equal(self, number: int, signature: CallSignature) -> bool:
        """Whether the signatures are equal."""
        return self._published[2 * (number % RING)] == _EQUAL

    def breaks(self, number: int) -> bool:
        """Whether a part of the call is under way on any rank."""
        return self._published[2 * (number % RING)] == _BREAKING

    # -- between the leaders ---------------------------------------------------------------------

    def _drive(self) -> None:
        """Send what this node has called, and decide, as far as that goes now."""
        # Another thread, which waits for another operation, may be driving it just now.
        if not self._driven.acquire(blocking=False):
            return
        try:
            while self._sent is not None or self._send():
                if not self._exchange.done():
                    return
                self._decide()
        finally:
            self._driven.release()

    def _send(self) -> bool:
        """Send the next call to the other leaders, if all ranks of the node have made it."""
        counters = self._counters
        if not self._calls or not (self._alone or counters.all_arrived(self._calls[0][0])):
            return False
        number, signature, payload = self._calls.popleft()
        agree, balance, breaks = True, signature.balance or 0, signature.breaks
        if not self._alone:
            agree = counters.same_call(number, signature)
            if signature.balance is not None or not agree:
                balance, breaks = counters.balance(number), counters.breaks(number)
        header = self._header
        header[0], header[1], header[2], header[3] = signature.digest, agree, breaks, balance
        length = HEADER_NBYTES
        if payload is not None:
            length += payload.pack() if agree else 0
        self._sent = number, payload
        self._exchange.start(length)
        return True

    def _decide(self) -> None:
        """Publish whether all nodes have called the same."""
        assert self._sent is not None, "asked before"
        (number, payload), self._sent = self._sent, None
        verdict = _EQUAL
        own, others = self._header, self._headers
        if own[3] or not own[1] or others.count(own) < len(others):
            nodes = [own, *others]
            same = all(node[1] and node[0] == own[0] for node in nodes)
            if not same or sum(node[3] for node in nodes) % 2**64:
                verdict = _BREAKING if any(node[2] for node in nodes) else _DIFFERENT
        if verdict == _EQUAL and payload is not None:
            payload.unpack()
        index = 2 * (number % RING)
        self._published[index] = verdict
        fence()
        self._published[index + 1] = number
