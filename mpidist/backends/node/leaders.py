"""The arrival of ranks of several nodes: counters on each node, one message between two nodes.

The first rank of each node is its leader. When all ranks of the node have arrived at an operation,
the leader sends what they have called to the leaders of the other nodes; when it has heard from all
of these it publishes, in the memory of its node, whether the calls are the same. A short array
travels in the same message: see `mpidist.backends.node.sequencer.Payload`.
"""

from __future__ import annotations

from collections.abc import Callable
from os import sched_yield
from struct import Struct
from typing import Any

import numpy as np

from mpidist._types import Array
from mpidist.backends.algorithms import Exchanger
from mpidist.backends.node.sequencer import RING, ArrivalCounters, Payload, fence
from mpidist.backends.node.signatures import CallSignature
from mpidist.backends.node.topology import NodeTopology
from mpidist.backends.work import Work

__all__ = ["HEADER_NBYTES", "MOST_NODES", "PAYLOAD_NBYTES", "LeaderComparison"]

MOST_NODES = 8
"""Nodes between which each leader sends a message to each other; with more, a sum has fewer."""

PAYLOAD_NBYTES = 64 << 10
"""Bytes of the longest array that travels with an arrival."""

HEADER_NBYTES = 32
"""Bytes before it: digest, whether the node agrees and whether a difference breaks, balance."""

_HEADER = Struct("=4Q")

_EQUAL, _DIFFERENT, _BREAKING = 1, 2, 3
"""What is published: the calls are the same, differ, or differ where a part is under way."""

_SPINS, _POLLS = 30, 200
"""How often arrivals are polled before the core is yielded in between, and before all is driven."""


class _Exchange:
    """The messages of one operation between the leaders."""

    __slots__ = ("header", "nodes", "payload", "work")

    def __init__(
        self,
        header: tuple[int, ...],
        nodes: list[Array],
        payload: Payload | None,
        work: Work[Any],
    ) -> None:
        self.header = header
        self.nodes = nodes
        self.payload = payload
        self.work = work


class LeaderComparison:
    """Compares the calls of ranks on several nodes; see `SignatureComparison`.

    Parameters
    ----------
    counters : ArrivalCounters
        Of the ranks of this node.
    topology : NodeTopology
        The nodes, at most `MOST_NODES`.
    transport : Exchanger
        Carries the messages of the leaders.
    lane_of : callable
        Returns the lane of the operation with a number. Its first message between two leaders is
        that of the arrival.
    published : buffer
        `published_nbytes` bytes, zero at first, shared by the ranks of this node.
    """

    in_slots = True
    published_nbytes = 2 * RING * 8

    def __init__(
        self,
        counters: ArrivalCounters,
        topology: NodeTopology,
        transport: Exchanger,
        lane_of: Callable[[int], int],
        published: Any,
    ) -> None:
        self._counters = counters
        self._transport = transport
        self._lane_of = lane_of
        self._published = memoryview(published).cast("B").cast("Q")
        self._local = topology.local
        self._alone = len(topology.local) == 1
        self._leads = topology.rank == 0
        leaders = [node[0] for node in topology.nodes]
        self._node = topology.node_of(transport.rank)
        self._peers = [leader for leader in leaders if leader != leaders[self._node]]
        self._calls: dict[int, tuple[CallSignature, Payload | None]] = {}
        self._exchanges: dict[int, _Exchange] = {}
        self._spare: list[Array] = []
        self._arrived = 0

    # -- as the sequencer asks -------------------------------------------------------------------

    def arrive(self, number: int, signature: CallSignature, payload: Payload | None = None) -> None:
        """Publish that this rank has called an operation with this signature."""
        if number <= self._arrived:
            return
        self._arrived = number
        self._counters.arrive(number, signature)
        if self._leads:
            self._calls[number] = signature, payload
            self._send(number)

    def arrive_and_compare(
        self, number: int, signature: CallSignature, payload: Payload | None = None
    ) -> bool:
        """Arrive, poll for some microseconds, and return whether all have with the same call."""
        self.arrive(number, signature, payload)
        published, index = self._published, 2 * (number % RING)
        spins = _SPINS if self._leads else 4
        for polls in range(_POLLS):
            if published[index + 1] == number or (self._leads and self.all_arrived(number)):
                return published[index] == _EQUAL
            if polls >= spins:
                sched_yield()
        return False

    def all_arrived(self, number: int) -> bool:
        """Whether all ranks have called it; polled."""
        if self._published[2 * (number % RING) + 1] == number:
            return True
        if not self._leads:
            return False
        exchange = self._exchanges.get(number) or self._send(number)
        if exchange is None or not exchange.work.done():
            return False
        self._decide(number, exchange)
        return True

    def missing(self, number: int) -> list[int]:
        """Return the ranks of this node that have not called it."""
        return [self._local[index] for index in self._counters.missing(number)]

    def equal(self, number: int, signature: CallSignature) -> bool:
        """Whether the signatures are equal."""
        return self._published[2 * (number % RING)] == _EQUAL

    def breaks(self, number: int) -> bool:
        """Whether a part of the call is under way on any rank."""
        return self._published[2 * (number % RING)] == _BREAKING

    # -- between the leaders ---------------------------------------------------------------------

    def _send(self, number: int) -> _Exchange | None:
        """Send what this node has called to the other leaders, if all of its ranks have."""
        counters = self._counters
        if not self._alone and not counters.all_arrived(number):
            return None
        signature, payload = self._calls.pop(number)
        agree, balance, breaks = True, signature.balance or 0, signature.breaks
        if not self._alone:
            agree = counters.same_call(number, signature)
            if signature.balance is not None or not agree:
                balance, breaks = counters.balance(number), counters.breaks(number)
        message = self._buffer()
        header = (signature.digest, agree, breaks, balance)
        _HEADER.pack_into(message.data, 0, *header)
        length = HEADER_NBYTES
        if payload is not None and agree:
            length += payload.pack(message)
        received = [self._buffer() for _ in self._peers]
        lane = self._lane_of(number)
        work = self._transport.swap(message[:length], received, self._peers, lane)
        nodes = [*received[: self._node], message, *received[self._node :]]
        self._exchanges[number] = exchange = _Exchange(header, nodes, payload, work)
        return exchange

    def _decide(self, number: int, exchange: _Exchange) -> None:
        """Publish whether all nodes have called the same."""
        nodes, payload = exchange.nodes, exchange.payload
        headers = [_HEADER.unpack_from(buffer.data) for buffer in nodes]
        verdict, own = _EQUAL, exchange.header
        if own[3] or not own[1] or headers.count(own) < len(headers):
            same = all(agree and digest == own[0] for digest, agree, _, _ in headers)
            if not same or sum(balance for *_, balance in headers) % 2**64:
                verdict = _BREAKING if any(breaks for _, _, breaks, _ in headers) else _DIFFERENT
        if verdict == _EQUAL and payload is not None:
            payload.unpack(nodes)
        del self._exchanges[number]
        self._spare += nodes
        index = 2 * (number % RING)
        self._published[index] = verdict
        fence()
        self._published[index + 1] = number

    def _buffer(self) -> Array:
        return (
            self._spare.pop() if self._spare else np.empty(HEADER_NBYTES + PAYLOAD_NBYTES, np.uint8)
        )
