"""N ranks as N threads of one process.

Bytes are always copied, so nothing works here that would not work between processes.
`mpidist.testing.run_ranks` starts the threads, over a network that can be slow, lossy and deadly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from mpidist._types import Array
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.capabilities import Capabilities
from mpidist.backends.node.memory import NodeMemory
from mpidist.backends.node.sequencer import Payload
from mpidist.backends.node.signatures import CallSignature, Route
from mpidist.backends.node.topology import NodeTopology
from mpidist.backends.simulated.faults import JobAborted
from mpidist.backends.simulated.network import ExchangeWork, Member, Network, Rendezvous
from mpidist.backends.verbs import Collective
from mpidist.backends.work import Message, PolledWork, Waiter, Work


class _ThreadComparison:
    """Compares the call signatures of ranks that are threads; see `SignatureComparison`."""

    def __init__(self, network: Network, member: Member) -> None:
        self._network = network
        self._member = member
        self._rendezvous: dict[int, Rendezvous] = {}

    in_slots = False

    def arrive_and_compare(
        self, number: int, signature: CallSignature, payload: Payload | None = None
    ) -> bool:
        """Return False: threads compare when they wait."""
        return False

    def arrive(self, number: int, signature: CallSignature, payload: Payload | None = None) -> None:
        key = (self._member.context, self._member.members, "call", number)
        self._rendezvous[number] = self._network.offer(key, self._member, signature)

    def all_arrived(self, number: int) -> bool:
        return self._rendezvous[number].full()

    def missing(self, number: int) -> list[int]:
        return self._rendezvous[number].missing(self._member)

    def equal(self, number: int, signature: CallSignature) -> bool:
        signatures = self._rendezvous[number].values.values()
        same = all(other.digest == signature.digest for other in signatures)
        balanced = sum(other.balance or 0 for other in signatures) % 2**64 == 0
        if same and balanced:
            self._close(number)
        return same and balanced

    def breaks(self, number: int) -> bool:
        return any(signature.breaks for signature in self._close(number).values.values())

    def _close(self, number: int) -> Rendezvous:
        self._network.leave(self._member)
        return self._rendezvous.pop(number)


class _ThreadExchange:
    """How the ranks of a simulated node exchange a few bytes; see `NodeExchange`."""

    def __init__(self, network: Network, member: Member, topology: NodeTopology) -> None:
        self.rank = topology.rank
        self.size = len(topology.local)
        members = tuple(member.members[rank] for rank in topology.local)
        self._network = network
        self._group = member
        self._node = Member(member.context, topology.rank, members)
        self._exchanges: Counter[Member] = Counter()
        self._waiter: Waiter | None = None

    @contextmanager
    def blocking(self, waiter: Waiter) -> Iterator[None]:
        self._waiter = waiter
        try:
            yield
        finally:
            self._waiter = None

    def _gather(self, member: Member, value: Any) -> list[Any]:
        """Return the values of all members, in order of their ranks."""
        self._exchanges[member] += 1
        assert self._waiter is not None, "only in `blocking`"
        key = (member.context, member.members, "exchange", self._exchanges[member])
        rendezvous = self._network.gather(key, member, value, self._waiter)
        return [rendezvous.values[other] for other in member.members]

    def share(self, nbytes: int) -> memoryview:
        self._exchanges[self._node] += 1
        key = (self._node.context, self._node.members, "memory", self._exchanges[self._node])
        return self._network.memory(key, self.size * nbytes, readers=self.size)

    def broadcast(self, message: Array, root: int) -> None:
        message[...] = self._gather(self._node, message.copy())[root]

    def highest(self, value: int) -> int:
        values: list[int] = self._gather(self._node, value)
        return max(values)

    def agree(self, yes: bool) -> bool:  # noqa: FBT001  # a value, not a switch
        # As a group is made nothing waits, and threads always have memory in common.
        return yes if self._waiter is None else all(self._gather(self._group, yes))


class _ComparedWork(PolledWork):
    """An immediate call that is under way, complete when all ranks have made the same, too.

    Errors of `work`, the call, are raised only after `comparison`, whose error says why.
    """

    def __init__(self, comparison: Work[None], work: Work[Any]) -> None:
        self._comparison = comparison
        self._work = work

    def done(self) -> bool:
        alike = self._comparison.done()
        try:
            over = self._work.done()
        except Exception:
            if alike:
                raise
            return False
        return alike and over

    def missing(self) -> Sequence[int]:
        return self._comparison.missing()


class SimulatedBackend(Backend):
    """One rank of a simulated job.

    Parameters
    ----------
    network : Network
        Shared by all ranks.
    rank : int
        This rank.
    context : hashable, optional
        Identifies the group among those of the network.
    members : sequence of int, optional
        The ranks of the world in this group; all when omitted.
    """

    name = "simulated"
    compares_calls = True

    def __init__(
        self,
        network: Network,
        rank: int,
        *,
        context: Hashable = (),
        members: Sequence[int] | None = None,
    ) -> None:
        everybody = tuple(range(network.size) if members is None else members)
        self._member = Member(context, rank, everybody)
        super().__init__(rank, len(everybody), Capabilities())
        self._network = network
        self._world_rank = everybody[rank]
        self._splits = 0
        topology = NodeTopology.of([who // network.ranks_per_node for who in everybody], rank)
        self._local_size = max(map(len, topology.nodes))
        self.node_memory: NodeMemory = NodeMemory(
            self,
            topology,
            _ThreadExchange(network, self._member, topology),
            lane_of=partial(self.lane, Traffic.SEQUENCED),
            arrival_lane=self.lane(Traffic.ARRIVAL, 0),
            compare=lambda: _ThreadComparison(network, self._member),
            direct=network.node_memory,
        )
        self.sums = self.node_memory.sums
        self._sequencer = self.node_memory.sequencer
        self._created: Counter[tuple[int, ...]] = Counter()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> ExchangeWork:
        """Start moving messages; see `Backend.exchange`."""
        return self._network.exchange(self._member, sends, receives)

    def run(self, collective: Collective, *, waiter: Waiter) -> None:
        """Perform a collective when all ranks have made the same call."""
        if self.node_memory.run(collective, waiter):
            return
        self._sequencer.arrive(waiter, Route.MESSAGES)
        waiter.wait_for(self.transfer(collective, waiter).done)

    def begin(self, collective: Collective, waiter: Waiter) -> Work[Any]:
        """Start a collective; complete when all ranks have made the same call."""
        steps = self.node_memory.steps(collective, waiter)
        if steps is not None:
            return self.start(steps)
        begun = self.size > 1
        comparison = self._sequencer.compare(waiter, Route.MESSAGES, begun=begun)
        under_way = self.transfer(collective, waiter)
        # `progress` drives both together, so that both are released when one ends.
        self.engine.running.pop(under_way, None)
        compared = _ComparedWork(comparison, under_way)
        self.engine.running[compared] = None
        return compared

    def split(self, color: int | None, key: int, *, waiter: Waiter) -> SimulatedBackend | None:
        """Make one transport per color; collective over all ranks, blocks."""
        self._sequencer.arrive(waiter, Route.ARRIVAL)
        self._splits += 1
        split, value = (self._member.context, "split", self._splits), (color, key, self.rank)
        rendezvous = self._network.gather(split, self._member, value, waiter)
        if color is None:
            return None
        same = sorted(
            (key, rank) for other, key, rank in rendezvous.values.values() if other == color
        )
        return self._child([rank for _, rank in same], (rendezvous.number, color))

    def create(self, ranks: Sequence[int], *, waiter: Waiter) -> SimulatedBackend:
        """Make the transport of these ranks; collective over them only, blocks."""
        # The same ranks may make several groups; their calls match in order.
        key = tuple(ranks)
        self._created[key] += 1
        members = tuple(self._member.members[rank] for rank in ranks)
        rendezvous = self._network.gather(
            (self._member.context, key, self._created[key]),
            Member((), key.index(self.rank), members),
            None,
            waiter,
            ranks=ranks,
        )
        return self._child(ranks, rendezvous.number)

    def _child(self, ranks: Sequence[int], context: Hashable) -> SimulatedBackend:
        members = [self._member.members[rank] for rank in ranks]
        rank = members.index(self._world_rank)
        return SimulatedBackend(self._network, rank, context=context, members=members)

    def node(self) -> int:
        """Return the number of the pretended node."""
        return self._world_rank // self._network.ranks_per_node

    @property
    def local_size(self) -> int:
        """The largest number of ranks on any node."""
        return self._local_size

    def poll(self) -> None:
        """Do what is pending on this rank; a short wait where nothing has happened."""
        self._network.poll(self._world_rank)

    def lost(self, collective: tuple[int, int] | None = None) -> Mapping[int, str]:
        """Return the members whose death was announced."""
        lost = dict(self._network.lost)
        return {rank: lost[who] for rank, who in enumerate(self._member.members) if who in lost}

    def close(self) -> None:
        """Release the memory that the ranks share."""
        self.sums = None
        self.node_memory.close()

    def abort(self, code: int) -> None:
        """End the whole job: every rank raises `JobAborted`, this one now."""
        self._network.abort(code)
        raise JobAborted(code)
