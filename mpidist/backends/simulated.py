"""N ranks as N threads of one process.

Bytes are always copied, so nothing works here that would not work between processes.
`mpidist.testing.run_ranks` starts the threads, over a network that can be slow, lossy and deadly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from mpidist.backends.base import Backend, Capabilities
from mpidist.backends.faults import JobAborted
from mpidist.backends.matching import Place
from mpidist.backends.network import ExchangeWork, Network
from mpidist.backends.work import Message, Waiter
from mpidist.recorder import Recorder

__all__ = ["SimulatedBackend"]


class SimulatedBackend(Backend):
    """One rank of a simulated job.

    Parameters
    ----------
    network : Network
        Shared by all ranks.
    rank : int
        This rank.
    context : hashable, optional
        Keeps the messages of different groups apart.
    members : sequence of int, optional
        The ranks of the world in this group; all when omitted.
    """

    name = "simulated"

    def __init__(
        self,
        network: Network,
        rank: int,
        *,
        context: Hashable = (),
        members: Sequence[int] | None = None,
    ) -> None:
        self._place = Place(
            context, rank, tuple(range(network.size) if members is None else members)
        )
        super().__init__(rank, len(self._place.members), Capabilities())
        self._network = network
        self._world_rank = self._place.members[rank]
        self._splits = 0
        self._created: Counter[tuple[int, ...]] = Counter()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> ExchangeWork:
        """Start moving messages; see `Backend.exchange`."""
        return self._network.exchange(self._place, sends, receives)

    def split(self, color: int | None, key: int, *, waiter: Waiter) -> SimulatedBackend | None:
        """Make one transport per color; collective over all ranks, blocks."""
        self._splits += 1
        meeting = self._network.meet(
            (self._place.context, "split", self._splits),
            self._place,
            (color, key, self.rank),
            names=range(self.size),
            waiter=waiter,
        )
        if color is None:
            return None
        same = sorted((key, rank) for other, key, rank in meeting.values.values() if other == color)
        return self._child([rank for _, rank in same], (meeting.number, color))

    def create(self, ranks: Sequence[int], *, waiter: Waiter) -> SimulatedBackend:
        """Make the transport of these ranks; collective over them only, blocks."""
        # The same ranks may make several groups; their calls match in order.
        key = tuple(ranks)
        self._created[key] += 1
        members = tuple(self._place.members[rank] for rank in ranks)
        meeting = self._network.meet(
            (self._place.context, key, self._created[key]),
            Place((), key.index(self.rank), members),
            None,
            names=ranks,
            waiter=waiter,
        )
        return self._child(ranks, meeting.number)

    def _child(self, ranks: Sequence[int], context: Hashable) -> SimulatedBackend:
        members = [self._place.members[rank] for rank in ranks]
        rank = members.index(self._world_rank)
        return SimulatedBackend(self._network, rank, context=context, members=members)

    def node(self) -> int:
        """Return the number of the pretended node."""
        return self._world_rank // self._network.ranks_per_node

    def record(self) -> Mapping[int, memoryview]:
        """Begin to record where the other threads of the node can read it."""
        records = self._network.records
        self.recorder = Recorder(records[self.rank])
        first = self.rank // self._network.ranks_per_node * self._network.ranks_per_node
        near = range(first, min(first + self._network.ranks_per_node, self.size))
        return {rank: records[rank] for rank in near}

    def poll(self) -> None:
        """Take this rank's turns; a short wait where nothing has happened."""
        self._network.poll(self._world_rank)

    def lost(self, collective: tuple[int, int] | None = None) -> Mapping[int, str]:
        """Return the members whose death was announced."""
        lost = dict(self._network.lost)
        return {rank: lost[who] for rank, who in enumerate(self._place.members) if who in lost}

    def close(self) -> None:
        """Do nothing: a simulated group holds no resources."""

    def abort(self, code: int) -> None:
        """End the whole job: every rank raises `JobAborted`, this one now."""
        self._network.abort(code)
        raise JobAborted(code)
