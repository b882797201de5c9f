"""What the ranks of a node share, for one group: a layer that any transport can have.

It needs a transport that sends messages, and a `NodeExchange`, by which the ranks of a node
exchange a few bytes. From these come the comparison of calls at arrival, sums and other collectives
in shared memory, registered memory, memory that the ranks have in common, and records that the
other ranks of the node can read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mpidist._types import Array
from mpidist.backends.algorithms import Exchanger, Lane, ring_all_gather
from mpidist.backends.combine import silent_context
from mpidist.backends.crossovers import Crossovers
from mpidist.backends.node.comparison import refuse
from mpidist.backends.node.direct_path import DirectPath, NodeContext
from mpidist.backends.node.host_sums import HostSums
from mpidist.backends.node.leaders import MOST_NODES, PAYLOAD_NBYTES, LeaderComparison
from mpidist.backends.node.registered_memory import Block, Registry
from mpidist.backends.node.sequencer import (
    SMALL_NBYTES,
    ArrivalCounters,
    Sequencer,
    SignatureComparison,
    supported,
)
from mpidist.backends.node.shared_memory import NodeExchange, mappings_of, share_files
from mpidist.backends.node.signatures import Described, Route
from mpidist.backends.node.sums import NodeSums, Sums
from mpidist.backends.node.topology import NodeTopology
from mpidist.backends.verbs import AllReduce, Collective
from mpidist.backends.work import ConditionSteps, Steps, Waiter
from mpidist.errors import BackendUnavailableError

__all__ = ["NodeMemory"]


class NodeMemory:
    """The order of a group's collectives, and what its ranks do in shared memory.

    Collective over the group; blocks.

    Parameters
    ----------
    transport : Exchanger
        Carries messages between the ranks of the group.
    topology : NodeTopology
        The nodes of the group.
    exchange : NodeExchange
        Connects the ranks of this node.
    lane_of : callable
        Returns the lane of the operation with a number.
    arrival_lane : int
        The lane of the messages by which leaders compare calls.
    compare : callable
        Makes the comparison of calls by other means than shared memory, for a group whose ranks do
        not all share it.
    direct : bool, optional
        Whether collectives may go by shared memory; the same on all ranks.

    Attributes
    ----------
    sequencer : Sequencer
        The order of the group's collectives.
    registered : Registry
        The registered memory of the group.
    sums : Sums or None
        The sums in shared memory, and on few nodes those of short arrays; None where there are
        none.
    """

    def __init__(
        self,
        transport: Exchanger,
        topology: NodeTopology,
        exchange: NodeExchange,
        *,
        lane_of: Callable[[int], int],
        arrival_lane: int,
        compare: Callable[[], SignatureComparison],
        direct: bool = True,
    ) -> None:
        self.registered = Registry()
        self.sums: Sums | None = None
        self._transport = transport
        self._topology = topology
        self._exchange = exchange
        self._lane_of = lane_of
        self._crossovers = Crossovers()
        self._direct: DirectPath | None = None
        memory = None
        alone = max(map(len, topology.nodes)) == 1
        if direct and supported() and not alone:
            memory = self._share(ArrivalCounters.nbytes(1))
        leaders = direct and 1 < len(topology.nodes) <= MOST_NODES and (alone or memory is not None)
        if memory is None:
            # Counters of this rank alone, and no others to read them.
            counters = ArrivalCounters(bytearray(ArrivalCounters.nbytes(1)), 0, 1)
            topology = NodeTopology(
                (transport.rank,), 0, 1, topology.nodes if alone else ((transport.rank,),)
            )
        else:
            counters = ArrivalCounters(memory, topology.rank, len(topology.local))
        comparison: SignatureComparison | None = None
        parts: list[memoryview] | None = None
        messages: list[Array] = []
        if leaders:
            stride = Block.stride(2 * PAYLOAD_NBYTES + LeaderComparison.published_nbytes)
            shared = memoryview(bytearray(stride)) if alone else self._share(stride)
            if shared is not None:
                whole = _cut(shared, stride)
                parts = [part[: 2 * PAYLOAD_NBYTES] for part in whole]
                published = whole[0][2 * PAYLOAD_NBYTES :][: LeaderComparison.published_nbytes]
                comparison = LeaderComparison(
                    counters, topology, transport, arrival_lane, published
                )
                messages = comparison.messages
        if comparison is None and (
            len(self._topology.nodes) > 1 or (memory is None and transport.size > 1)
        ):
            comparison = compare()
        self.sequencer = Sequencer(counters, topology, comparison, self._refuse)
        if memory is not None:
            self._direct = DirectPath(self.sequencer, transport, lane_of)
        context = NodeContext(topology, transport, silent_context())
        if memory is not None and len(topology.nodes) == 1:
            self.sums = NodeSums(self.sequencer, context, self.registered, self._parts)
        elif parts is not None:
            self.sums = HostSums(
                self.sequencer, context, self.registered, parts, messages, self._parts, lane_of
            )

    def use(self, crossovers: Crossovers) -> None:
        """Choose the paths by these sizes from now on; the same on all ranks."""
        self._crossovers = crossovers
        if self.sums is not None:
            self.sums.take(crossovers)

    def close(self) -> None:
        """Release the scratch memory, which would otherwise wait for the garbage collector."""
        self._direct = self.sums = None

    # -- collectives -----------------------------------------------------------------------------

    def run(self, collective: Collective, waiter: Waiter) -> bool:
        """Perform a collective in shared memory; return False, at once, if it goes another way."""
        if self.sums is not None and isinstance(collective, AllReduce):
            summed = self.sums.prepare(collective, waiter)
            if summed is not None:
                summed.run(collective.x, collective.out, lambda: waiter)
                return True
        array = None if self._direct is None else collective.registrable
        steps = None if array is None else self._plan(collective, array, waiter)
        if steps is None:
            return False
        for step in steps:
            waiter.wait_for(step.condition, missing=step.missing)
        return True

    def steps(self, collective: Collective, waiter: Waiter) -> ConditionSteps[None] | None:
        """Return the steps of a collective in shared memory, or None if it goes another way."""
        if (
            isinstance(collective, AllReduce)
            and self.sums is not None
            and collective.x.nbytes <= min(self._crossovers.small, SMALL_NBYTES)
        ):
            return self.sums.steps(collective, waiter)
        x = None if self._direct is None else collective.registrable
        return None if x is None else self._plan(collective, x, waiter)

    def _plan(
        self, collective: Collective, x: Array, waiter: Waiter
    ) -> ConditionSteps[None] | None:
        """Return the steps of a collective on `x`, or None if it is not registered or short."""
        if self._direct is None or x.nbytes < self._crossovers.registered:
            return None
        array = self.registered.find(x)
        return None if array is None else self._direct.plan(collective, waiter, array)

    def _refuse(self, number: int, described: Described, usable: bool) -> Steps:  # noqa: FBT001
        """Return the steps that raise on all ranks that they have called different things."""
        lane = Lane(self._transport, self._lane_of(number))
        rank, size = self._transport.rank, self._transport.size
        return refuse(lane, described, rank=rank, size=size, usable=usable)

    # -- memory ----------------------------------------------------------------------------------

    def _share(self, nbytes: int) -> memoryview | None:
        """Return memory of the ranks of this node, or None on all ranks of the group."""
        memory = self._exchange.share(nbytes)
        return memory if self._exchange.agree(memory is not None) else None

    def _parts(self, nbytes: int, waiter: Waiter) -> list[memoryview] | None:
        """Return every rank's part of such memory, each at the beginning of a page."""
        stride = Block.stride(nbytes)
        with self._exchange.blocking(waiter):
            memory = self._share(stride)
        return None if memory is None else _cut(memory, stride)

    def allocate(self, nbytes: int, waiter: Waiter) -> Array | None:
        """Make registered memory; see `Backend.allocate`."""
        if self._direct is None:
            return None
        self.sequencer.arrive(waiter, Route.LIBRARY)
        parts = self._parts(nbytes, waiter)
        return None if parts is None else self.registered.add(parts, self._topology.rank, nbytes)

    def register(self, descriptor: int, nbytes: int, waiter: Waiter) -> Array:
        """Register shared memory that exists already; see `Backend.register`."""
        exchange = self._exchange
        self.sequencer.arrive(waiter, Route.LIBRARY)
        with exchange.blocking(waiter):
            parts, problem = share_files(exchange, descriptor, nbytes)
            if not exchange.agree(problem is None):
                reason = problem or "the ranks of another node could not map it"
                raise BackendUnavailableError(
                    f"register: the memory cannot be shared: {reason}. Nothing has been registered "
                    "on any rank, and the group can still be used"
                )
        if self._direct is not None:
            self.registered.adopt(parts, mappings_of(descriptor, nbytes))
        return np.frombuffer(parts[exchange.rank], np.uint8, nbytes)

    def unregister(self, x: Array, waiter: Waiter) -> None:
        """Forget what `register` has registered; see `Backend.unregister`."""
        # When all ranks have arrived, no operation on this memory is under way any more.
        self.sequencer.arrive(waiter, Route.LIBRARY)
        if self._direct is None:
            return
        transport, lane = self._transport, self._lane_of(self.sequencer.begun)
        numbers = np.zeros(transport.size, np.int64)
        numbers[transport.rank] = self.registered.block_of(x.reshape(-1)) or 0
        ones = (1,) * transport.size
        for step in ring_all_gather(Lane(transport, lane), None, numbers, ones):
            waiter.wait_for(step.done, missing=step.missing)
        if not numbers.all() or (numbers != numbers[0]).any():
            raise BackendUnavailableError(
                "unregister: the array of some rank is not in registered memory, or not in that "
                "of the others' arrays. Nothing has been changed on any rank, and the group can "
                "still be used"
            )
        self.registered.remove(int(numbers[0]))

    def share(self, nbytes: int, waiter: Waiter) -> Array | None:
        """Make one piece of memory for all ranks of the group; see `Backend.share`."""
        if self._transport.size == 1 or len(self._topology.nodes) > 1:
            return None
        self.sequencer.arrive(waiter, Route.LIBRARY)
        with self._exchange.blocking(waiter):
            memory = self._exchange.share(Block.stride(-(-nbytes // self._transport.size)))
        return None if memory is None else np.frombuffer(memory, np.uint8, nbytes)

    def records(self, nbytes: int) -> Mapping[int, memoryview]:
        """Return memory for the records of the ranks of this node; none where they cannot share it.

        Collective over the group; blocks.
        """
        local = self._topology.local
        memory = None if len(local) == 1 else self._exchange.share(nbytes)
        return {} if memory is None else dict(zip(local, _cut(memory, nbytes), strict=True))


def _cut(memory: memoryview, stride: int) -> list[memoryview]:
    """Return every rank's part of shared memory."""
    return [memory[start : start + stride] for start in range(0, len(memory), stride)]
