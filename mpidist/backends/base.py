"""The contract between the verbs and the transports.

A transport moves flat, contiguous host or device arrays of native byte order between ranks. It
must offer `Backend.exchange` and a few more methods; every collective then goes by messages, as
`mpidist.backends.verbs` says, and a transport overrides `Backend.transfer` for those that it does
better itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from mpidist._types import Array
from mpidist.backends import algorithms
from mpidist.backends.capabilities import Capabilities
from mpidist.backends.crossovers import Crossovers, choose
from mpidist.backends.node.comparison import compare
from mpidist.backends.verbs import Collective
from mpidist.backends.work import (
    Engine,
    Message,
    PersistentExchange,
    Steps,
    StepsWork,
    Waiter,
    Work,
)
from mpidist.errors import BackendUnavailableError
from mpidist.observe.recorder import Recorder

if TYPE_CHECKING:
    from mpidist.backends.device.base import DeviceBackend
    from mpidist.backends.node.memory import NodeMemory
    from mpidist.backends.node.signatures import Described
    from mpidist.backends.node.sums import Sums

__all__ = ["Backend", "Capabilities", "Traffic"]


class Traffic(IntEnum):
    """What a lane carries; each kind has lanes of its own."""

    COLLECTIVE = 0
    ENVELOPE = 1
    PAYLOAD = 2
    CREATE = 3
    SEQUENCED = 4
    ARRIVAL = 5


class Backend(ABC):
    """Moves arrays between the ranks of one group.

    Every collective is started by `begin`, or performed by `run`. Arrays are flat, contiguous and
    of native byte order; counts are elements. All ranks call the same collectives in the same
    order with fitting arguments, which the verbs have checked.

    Parameters
    ----------
    rank, size : int
        This rank, and the number of ranks.
    capabilities : Capabilities
        What this transport can do.
    """

    name: str
    """Name of the transport, as `init` takes it."""

    recorder: Recorder
    """Where this rank's operations are recorded, once `record` or `join` has been called."""

    compares_calls = False
    """Whether calls on host arrays are compared before a result is handed out."""

    node_memory: NodeMemory | None = None
    """What this rank shares with the others of its node, where the transport has such a layer."""

    device: DeviceBackend[Backend] | None = None
    """What carries device arrays between the same ranks; see `mpidist.backends.device.hybrid`."""

    no_device: str = "it was started for host arrays only; init() looks for GPUs"
    """Why nothing does, where nothing does; the same on all ranks."""

    def __init__(self, rank: int, size: int, capabilities: Capabilities) -> None:
        self.rank = rank
        self.size = size
        self.capabilities = capabilities
        self.crossovers = Crossovers()
        self._table: Mapping[int, Crossovers] = {}
        self.sums: Sums | None = None
        self.engine = Engine()
        self._collectives = 0

    # -- what a transport must offer -----------------------------------------------------------

    @abstractmethod
    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work[Any]:
        """Start sending and receiving several messages at once.

        Parameters
        ----------
        sends, receives : sequence of Message
            Any number of each, in any order, in lanes made by `lane`.

        Returns
        -------
        Work of tuple of int
            Complete when all are; its result is the source of each receive.
        """

    def persistent_exchange(
        self, sent: Array, received: Sequence[Array], peers: Sequence[int], lane: int
    ) -> PersistentExchange:
        """Prepare to send the same short array to some ranks, and to receive one of each.

        Parameters
        ----------
        sent : Array, uint8, 1-D
            Less than 1 GiB. A start sends the beginning of it.
        received : sequence of Array, uint8, 1-D
            Where to receive the array of each rank, which may be shorter.
        peers : sequence of int
            The ranks.
        lane : int
            As of a `Message`; for these messages alone.
        """
        return _RepeatedExchange(self, sent, received, peers, lane)

    @abstractmethod
    def split(self, color: int | None, key: int, *, waiter: Waiter) -> Backend | None:
        """Make one transport per color, ordered by key; collective over all ranks, blocks."""

    @abstractmethod
    def create(self, ranks: Sequence[int], *, waiter: Waiter) -> Backend:
        """Make the transport of these ranks, of which this is one; collective over them, blocks."""

    @abstractmethod
    def poll(self) -> None:
        """Let the transport itself make progress."""

    @abstractmethod
    def close(self) -> None:
        """Release what the transport holds; local, does not wait."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End the whole job now."""

    # -- what a transport may add --------------------------------------------------------------

    def node(self) -> int:
        """Return a number that is the same for exactly the ranks that share this one's memory."""
        return 0

    @property
    def local_size(self) -> int:
        """The largest number of ranks on any node."""
        return self.size

    def mpi_comm(self) -> Any:
        """Return the mpi4py communicator of these ranks."""
        raise BackendUnavailableError(
            f"mpi_comm: this group stands on the {self.name} backend, not on MPI; "
            "start it with mpidist.init('mpi')"
        )

    def follow(self, group: int, begun: list[int]) -> None:  # noqa: B027  # optional
        """Tell this rank's peers at its end how many collectives of a group it has begun.

        Parameters
        ----------
        group : int
            The group's identity, the same on all its ranks.
        begun : list of int
            One number, which the group counts up.
        """

    def record(self) -> Mapping[int, memoryview]:
        """Begin to record; called once for the world, collective, blocks.

        Returns
        -------
        mapping of int to memoryview
            The records of the ranks that can be read here, at least of this one.
        """
        nbytes = Recorder.nbytes()
        records = {} if self.node_memory is None else self.node_memory.records(nbytes)
        records = records or {self.rank: memoryview(bytearray(nbytes))}
        self.recorder = Recorder(records[self.rank])
        return records

    def lost(self, collective: tuple[int, int] | None = None) -> Mapping[int, str]:
        """Return the ranks of this group that are known to be gone, and what they said.

        Parameters
        ----------
        collective : (int, int), optional
            A group's identity and the number of one of its collectives: ranks that had begun it
            before they left are not lost to it.
        """
        return {}

    def allocate(self, nbytes: int, *, waiter: Waiter) -> Array | None:
        """Make memory that all ranks of the node share; collective, blocks.

        Parameters
        ----------
        nbytes : int
            Size of each rank's part, more than 0.
        waiter : Waiter
            How to wait.

        Returns
        -------
        Array, shape (nbytes,), uint8, or None
            This rank's part; None on all ranks where there is no such memory.
        """
        memory = self.node_memory
        return None if memory is None else memory.allocate(nbytes, waiter)

    def register(self, descriptor: int, nbytes: int, *, waiter: Waiter) -> Array:
        """Register shared memory that exists already; collective, blocks.

        Parameters
        ----------
        descriptor : int
            An open file of shared memory, each rank its own.
        nbytes : int
            Bytes at its beginning, the same on all ranks, more than 0.
        waiter : Waiter
            How to wait.

        Returns
        -------
        Array, shape (nbytes,), uint8
            This rank's memory. It is ordinary memory where ranks share none.

        Raises
        ------
        BackendUnavailableError
            If the memory of any rank cannot be shared; on all ranks.
        """
        if self.node_memory is None:
            raise BackendUnavailableError(f"register: the {self.name} backend shares no memory")
        return self.node_memory.register(descriptor, nbytes, waiter)

    def unregister(self, x: Array, *, waiter: Waiter) -> None:
        """Forget the registered memory in which an array lies; collective, blocks."""
        if self.node_memory is not None:
            self.node_memory.unregister(x, waiter)

    def share(self, nbytes: int, *, waiter: Waiter) -> Array | None:
        """Make one piece of memory that all ranks see; collective, blocks.

        Parameters
        ----------
        nbytes : int
            Its size, more than 0.
        waiter : Waiter
            How to wait.

        Returns
        -------
        Array, shape (nbytes,), uint8, or None
            The same memory on every rank; None on all where there is none.
        """
        memory = self.node_memory
        return None if memory is None else memory.share(nbytes, waiter)

    def begin(self, collective: Collective, waiter: Waiter) -> Work[Any]:
        """Start a collective, and return at once.

        Parameters
        ----------
        collective : Collective
            What is performed; all ranks have made the same.
        waiter : Waiter
            Knows the signature of the call. Nothing waits here.

        Returns
        -------
        Work
            Complete when this rank's result is there. A transport that compares calls raises
            `CollectiveMismatchError` from it if the ranks have called different things.
        """
        return self.transfer(collective, waiter)

    def transfer(self, collective: Collective, waiter: Waiter) -> Work[Any]:
        """Start a collective by moving bytes between the ranks; see `begin`.

        A transport overrides this for the collectives that it performs itself.
        """
        return self.start(collective.steps(self._next_lane()))

    def run(self, collective: Collective, *, waiter: Waiter) -> None:
        """Perform a collective, and return when this rank's result is there; see `begin`."""
        waiter.wait_for(self.begin(collective, waiter).done)

    def compare(self, described: Described) -> Work[None]:
        """Find out whether all ranks are about to call the same; see `comparison.compare`."""
        return self.start(self._comparing(described))

    def begin_compared(self, collective: Collective, described: Described) -> Work[None]:
        """Start a collective that begins when all ranks have arrived at it with the same call.

        Notes
        -----
        For debug mode: the words of all calls are exchanged. By messages, see [Note: phases].
        """
        return self.start(self._comparing(described, collective))

    def _comparing(self, described: Described, collective: Collective | None = None) -> Steps:
        # Two lanes in any case: also ranks that differ in this stay in step.
        first, second = self._next_lane(), self._next_lane()
        yield from compare(first, described, rank=self.rank, size=self.size)
        if collective is not None:
            yield from collective.steps(second)

    # -- operations of several phases ----------------------------------------------------------

    def start(self, steps: Steps) -> Work[None]:
        """Start an operation of several phases; `progress` drives it from now on."""
        work = StepsWork(steps)
        if not work.over:
            self.engine.running[work] = None
        return work

    def join(self, parent: Backend) -> None:
        """Drive from now on what `parent` has under way, too, and let it drive this one's.

        While this rank waits on one group, others may wait for its next phase on another. The
        crossovers and the recorder are the parent's, too.
        """
        self.engine = parent.engine
        self.recorder = parent.recorder
        self.no_device = parent.no_device
        self.take(parent._table)

    def take(self, table: Mapping[int, Crossovers]) -> None:
        """Take these crossovers from now on, those for the ranks of a node; the same on all ranks.

        Parameters
        ----------
        table : mapping of int to Crossovers
            By the number of ranks on a node.
        """
        self._table = table
        self.crossovers = choose(table, self.local_size)
        if self.node_memory is not None:
            self.node_memory.use(self.crossovers)

    def progress(self) -> None:
        """Drive every operation that has been started, and the transport itself."""
        self.poll()
        if self.engine.running:
            self.engine.drive()

    def lane(self, traffic: Traffic, number: int) -> int:
        """Return the lane with this number; numbers beyond the largest tag begin again at 0.

        The first `max_tag + 1` lanes are left to users of the transport's own interface.
        """
        span = self.capabilities.max_tag + 1
        return (traffic + 1) * span + number % span

    def _next_lane(self) -> algorithms.Lane:
        """Open the lane of the next collective; the same one on all ranks."""
        self._collectives += 1
        return algorithms.Lane(self, self.lane(Traffic.COLLECTIVE, self._collectives))


class _RepeatedExchange:
    """A `PersistentExchange` by an `exchange` for each start."""

    def __init__(
        self,
        transport: Backend,
        sent: Array,
        received: Sequence[Array],
        peers: Sequence[int],
        lane: int,
    ) -> None:
        self._transport = transport
        self._sent = sent
        self._receives = [Message(x, p, lane) for x, p in zip(received, peers, strict=True)]
        self._work: Work[Any] | None = None

    def start(self, nbytes: int) -> None:
        sent = self._sent[:nbytes]
        sends = [Message(sent, peer, lane) for _, peer, lane in self._receives]
        self._work = self._transport.exchange(sends, self._receives)

    def done(self) -> bool:
        return self._work is None or self._work.done()
