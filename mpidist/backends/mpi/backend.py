"""The MPI transport, on mpi4py's buffer calls.

Blocking collectives are arrival, with the group's deadline, and then the library's blocking call.
Immediate ones, and what the library does not do as promised (`mpidist.backends.mpi.calls` says
what), go by the algorithms, over the library's messages.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from mpidist import env
from mpidist._types import Array
from mpidist.arrays.namespaces import as_bytes
from mpidist.backends import algorithms
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.capabilities import Capabilities
from mpidist.backends.job import ExitNotices
from mpidist.backends.mpi import communicators
from mpidist.backends.mpi.calls import LibraryCall, LibraryCalls
from mpidist.backends.mpi.library import abort_job, load_mpi, world_ranks
from mpidist.backends.node.comparison import SumComparison
from mpidist.backends.node.memory import NodeMemory
from mpidist.backends.node.shared_memory import share
from mpidist.backends.node.signatures import Route
from mpidist.backends.node.topology import NodeTopology
from mpidist.backends.verbs import Barrier, Collective
from mpidist.backends.work import (
    Engine,
    Message,
    PersistentExchange,
    Steps,
    Waiter,
    Work,
    then,
    wait_until,
)
from mpidist.errors import TransportError

__all__ = ["MpiBackend"]

_CHUNK = 2**30
"""Bytes of the longest single message; longer ones travel in several."""

_MOST_LENGTHS = 256
"""Lengths of the messages of a `PersistentExchange` for which requests are kept."""


class _Requests(Work[tuple[int, ...]]):
    """Requests of the library, complete when all are.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    requests : list of mpi4py.MPI.Request
        Those of the receives first.
    keep : object
        What the library reads and writes. mpi4py's requests hold the arrays of some calls only:
        not those of Ireduce, Iallreduce, Ireduce_scatter and Iallgatherv (4.1.2), whose memory
        would be given away while the library still uses it.
    receives : int, optional
        Number of receives, whose sources are the result.
    """

    def __init__(self, mpi: Any, requests: list[Any], *, keep: Any, receives: int = 0) -> None:
        self._mpi = mpi
        self._requests = requests
        self._keep = keep
        self._receives = receives
        self._statuses = [mpi.Status() for _ in requests] if len(requests) > 1 or receives else None
        self._sources: tuple[int, ...] | None = None

    def done(self) -> bool:
        if self._sources is not None:
            return True
        try:
            if self._statuses is None:
                over = self._requests[0].Test() if self._requests else True
            else:
                over = self._mpi.Request.Testall(self._requests, self._statuses)
        except self._mpi.Exception as error:
            raise _translate(self._mpi, "under way", self._cause(error)) from error
        if over:
            statuses = (self._statuses or [])[: self._receives]
            self._sources = tuple(status.source for status in statuses)
            self._keep = None
        return bool(over)

    def _cause(self, error: Any) -> Any:
        """Return the error of the request that failed; Testall's says only that one did."""
        codes = [status.error for status in self._statuses or []]
        causes = [self._mpi.Exception(code) for code in codes if code != self._mpi.SUCCESS]
        several = error.Get_error_class() == self._mpi.ERR_IN_STATUS
        return causes[0] if several and causes else error

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)
        return self._sources or ()


class _PersistentRequests:
    """A `PersistentExchange` by persistent requests: one of each receive, one of each length sent.

    Starting and testing them takes half the time of making new ones.
    """

    def __init__(
        self,
        mpi: Any,
        comm: Any,
        sent: Array,
        received: Sequence[Array],
        peers: list[int],
        lane: int,
    ) -> None:
        self._mpi = mpi
        self._start: Callable[[list[Any]], None] = mpi.Prequest.Startall
        self._testall: Callable[[list[Any]], bool] = mpi.Prequest.Testall
        self._send: Callable[[int], list[Any]] = lambda nbytes: [
            comm.Send_init(sent[:nbytes], peer, lane) for peer in peers
        ]
        self._receives = [
            comm.Recv_init(x, peer, lane) for x, peer in zip(received, peers, strict=True)
        ]
        self._prepared: dict[int, list[Any]] = {}
        self._requests: list[Any] = self._receives
        self._keep = sent, received
        self._error: TransportError | None = None

    def start(self, nbytes: int) -> None:
        requests = self._prepared.get(nbytes)
        try:
            if requests is None:
                requests = self._prepare(nbytes)
            self._requests = requests
            self._start(requests)
        except self._mpi.Exception as error:
            raise self._failed(error) from error

    def done(self) -> bool:
        if self._error is not None:
            raise self._error
        try:
            return self._testall(self._requests)
        except self._mpi.Exception as error:
            raise self._failed(error) from error

    def Free(self) -> None:  # noqa: N802  # as a communicator, beside which it is released
        """Free the requests, unless a failure has left some active: the library still has them."""
        try:
            over = self.done()
        except TransportError:
            over = False
        if not over:
            _LEFT.append(self)
            return
        self._free_sends()
        for request in self._receives:
            request.Free()

    def _prepare(self, nbytes: int) -> list[Any]:
        if len(self._prepared) >= _MOST_LENGTHS:
            self._free_sends()
        requests = self._prepared[nbytes] = [*self._receives, *self._send(nbytes)]
        return requests

    def _free_sends(self) -> None:
        for requests in self._prepared.values():
            for request in requests[len(self._receives) :]:
                request.Free()
        self._prepared.clear()
        self._requests = self._receives

    def _failed(self, error: Any) -> TransportError:
        # Kept: a request that has failed is inactive, and looks as if it were complete.
        self._error = _translate(self._mpi, "arrival", error)
        return self._error


@contextlib.contextmanager
def _translated(mpi: Any, operation: str) -> Iterator[None]:
    """Turn the library's exceptions into the package's."""
    try:
        yield
    except mpi.Exception as error:
        raise _translate(mpi, operation, error) from error


def _translate(mpi: Any, operation: str, error: Any) -> TransportError:
    if error.Get_error_class() == mpi.ERR_IN_STATUS:
        # A blocking call waits for messages of its own, and keeps their statuses to itself.
        return TransportError(
            f"{operation}: a message that is part of the call failed, and the MPI library does not "
            "say why (MPI_ERR_IN_STATUS): most often a rank has died, or calls of mpi4py on the "
            "same communicator got in between",
            code=error.Get_error_code(),
        )
    return TransportError(
        f"{operation}: the MPI library reports: {error.Get_error_string()} "
        f"({mpi.Get_error_string(error.Get_error_class())})",
        code=error.Get_error_code(),
    )


_ENGINE = Engine()
"""What this process has under way: MPI is one for all its groups, and so is progress."""

_ALIVE_LOCK = threading.Lock()

_LEFT: list[_PersistentRequests] = []
"""What failures have left active, with its arrays."""


class MpiBackend(Backend):
    """The ranks of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Used by this object alone, which frees it; collective over it.
    notices : ExitNotices, optional
        The exit notices of the ranks of the world.

    Attributes
    ----------
    inside : (Waiter, float) or None
        The library's blocking call under way, and when it began by `time.monotonic`; a watchdog
        reads it.
    """

    name = "mpi"
    compares_calls = True
    _alive: ClassVar[weakref.WeakSet[MpiBackend]] = weakref.WeakSet()

    def __init__(self, comm: Any, *, notices: ExitNotices | None = None) -> None:
        self._mpi = mpi = load_mpi()
        # The first share of the tags is left to users of the communicator.
        span = (mpi.COMM_WORLD.Get_attr(mpi.TAG_UB) + 1) // (len(Traffic) + 1)
        super().__init__(comm.rank, comm.size, Capabilities(max_tag=span - 1))
        self.engine = _ENGINE
        self._comm = comm
        self._notices = notices
        self._calls = LibraryCalls(mpi, comm.rank, comm.size)
        self._world_ranks = world_ranks(mpi, comm)
        nodes = _nodes(mpi, comm)
        self._node = nodes[self.rank]
        self._topology = NodeTopology.of(nodes, self.rank)
        # The ranks of this node, which share memory.
        self._local = comm if len(set(nodes)) == 1 else comm.Split(self._node, self.rank)
        self.inside: tuple[Waiter, float] | None = None
        self._persistent: list[_PersistentRequests] = []
        self.node_memory: NodeMemory = NodeMemory(
            self,
            self._topology,
            _CommExchange(self, self._local),
            lane_of=partial(self.lane, Traffic.SEQUENCED),
            arrival_lane=self.lane(Traffic.ARRIVAL, 0),
            compare=lambda: SumComparison(self._add, self.size),
        )
        self.sums = self.node_memory.sums
        self._sequencer = self.node_memory.sequencer
        comms = (comm,) if self._local is comm else (comm, self._local)
        self._dropping = weakref.finalize(self, communicators.drop, *self._persistent, *comms)
        self._dropping.atexit = False
        with _ALIVE_LOCK:
            self._alive.add(self)

    @classmethod
    def alive(cls) -> list[MpiBackend]:
        """Return the open transports of this process, for the watchdog."""
        with _ALIVE_LOCK:
            return list(cls._alive)

    @staticmethod
    def held() -> set[object]:
        """Return the operations that are outstanding on all groups of this process."""
        return _ENGINE.held

    # -- the transport -------------------------------------------------------------------------

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work[Any]:
        """Start sending and receiving; long messages travel in several."""
        comm = self._comm
        with _translated(self._mpi, "exchange"):
            # The first request of each receive has its source, so these are the first ones.
            started = [
                [comm.Irecv(chunk, _peer(self._mpi, m.peer), m.lane) for chunk in _chunks(m.array)]
                for m in receives
            ]
            requests = [chunks[0] for chunks in started]
            requests += [request for chunks in started for request in chunks[1:]]
            requests += [
                comm.Isend(chunk, m.peer, m.lane) for m in sends for chunk in _chunks(m.array)
            ]
        return _Requests(self._mpi, requests, keep=(sends, receives), receives=len(receives))

    def persistent_exchange(
        self, sent: Array, received: Sequence[Array], peers: Sequence[int], lane: int
    ) -> PersistentExchange:
        """Prepare to send and to receive by persistent requests, until `close`."""
        with _translated(self._mpi, "exchange"):
            made = _PersistentRequests(self._mpi, self._comm, sent, received, list(peers), lane)
        self._persistent.append(made)
        return made

    def split(self, color: int | None, key: int, *, waiter: Waiter) -> MpiBackend | None:
        """Make one transport per color; collective over all ranks, blocks."""
        self._arrive(waiter)
        color = self._mpi.UNDEFINED if color is None else color

        def undo(made: MpiBackend | None) -> None:
            if made is not None:
                made.close()

        with self._within(waiter):
            return communicators.make(
                self._mpi,
                lambda: self._child(self._comm.Split(color, key)),
                agree=self._agree,
                undo=undo,
                operation=waiter.operation,
            )

    def _agree(self, yes: bool) -> bool:  # noqa: FBT001  # a value, not a switch
        """Whether it is so on all ranks; collective."""
        every = np.array(yes)
        self._comm.Allreduce(self._mpi.IN_PLACE, every, self._mpi.LAND)
        return bool(every)

    def _child(self, comm: Any) -> MpiBackend | None:
        """Return the transport of a new communicator, which is released if there can be none."""
        if comm == self._mpi.COMM_NULL:
            return None
        try:
            return MpiBackend(comm, notices=self._notices)
        except self._mpi.Exception:
            comm.Free()
            raise

    def create(self, ranks: Sequence[int], *, waiter: Waiter) -> MpiBackend:
        """Make the transport of these ranks; collective over them only, blocks."""
        # The library's call would wait for ever for a member that does not call. So the members
        # pass a barrier with the deadline first; all who make the same group use the same lane.
        lane = algorithms.Lane(self, self.lane(Traffic.CREATE, hash(tuple(ranks))), ranks)
        waiter.wait_for(self.start(algorithms.dissemination_barrier(lane)).done)
        members = self._comm.Get_group().Incl(list(ranks))
        with self._within(waiter):
            # The members agree on a communicator in the library: all get it, or none.
            try:
                made = communicators.make(
                    self._mpi,
                    lambda: self._child(self._comm.Create_group(members)),
                    agree=bool,
                    undo=lambda _: None,
                    operation=waiter.operation,
                )
            finally:
                members.Free()
        assert made is not None, "this rank is a member"
        return made

    def poll(self) -> None:
        """Let the library make progress on all communicators: any call into it does."""
        self._comm.Iprobe()

    def close(self) -> None:
        """Free the communicator, and the memory by way of which arrays are summed."""
        with _ALIVE_LOCK:
            self._alive.discard(self)
        self._dropping.detach()
        for requests in self._persistent:
            requests.Free()
        if self._local != self._comm:
            self._local.Free()
        self._comm.Free()
        self.sums = None
        self.node_memory.close()

    def abort(self, code: int) -> None:
        """End the whole job now."""
        sys.stdout.flush()
        sys.stderr.flush()
        abort_job(self._mpi, code)

    def node(self) -> int:
        """Return the world rank of the first rank that shares this one's memory."""
        return self._node

    @property
    def local_size(self) -> int:
        """The largest number of ranks on any node."""
        return max(map(len, self._topology.nodes))

    def mpi_comm(self) -> Any:
        """Return the communicator, which stays valid if only this group is dropped."""
        self._dropping.detach()
        return self._comm

    def follow(self, group: int, begun: list[int]) -> None:
        """Count the collectives of a group in this rank's exit notice."""
        if self._notices is not None and group:
            self._notices.begun[group] = begun

    def lost(self, collective: tuple[int, int] | None = None) -> Mapping[int, str]:
        """Return the ranks that have left, but for those that had begun the collective."""
        return {} if self._notices is None else self._notices.lost(self._world_ranks, collective)

    # -- collectives ---------------------------------------------------------------------------

    def run(self, collective: Collective, *, waiter: Waiter) -> None:
        """Perform a collective: by shared memory, or by the library's blocking call."""
        if self.node_memory.run(collective, waiter):
            return
        if isinstance(collective, Barrier):
            self._arrive(waiter)  # returns when all ranks have called it: there is no more to do
            return
        call = collective.by(self._calls)
        steps = self._by_messages(collective) if call is None else None
        self._arrive(waiter, Route.LIBRARY if steps is None else Route.MESSAGES)
        if call is not None:
            self._call(call, waiter)
        elif steps is not None:
            waiter.wait_for(self.start(steps).done)

    def begin(self, collective: Collective, waiter: Waiter) -> Work[Any]:
        """Start a collective in shared memory or by messages, which begins when all ranks have."""
        steps = self.node_memory.steps(collective, waiter)
        if steps is not None:
            return self.start(steps)
        return self.transfer(collective, waiter)

    def transfer(self, collective: Collective, waiter: Waiter) -> Work[Any]:
        """Start a collective by messages, which begins when all ranks have made the same call.

        Notes
        -----
        Not by the library's nonblocking calls. Begun before the ranks have compared their calls,
        calls that differ wrote past arrays or ended the process inside the library (seen with
        MPICH 5.0 and Open MPI 5.0); begun after it, they would start at another moment on each
        rank, and the library wants them in one order. See [Note: phases].
        """
        steps = self._by_messages(collective)
        comparison = self._sequencer.compare(waiter, Route.MESSAGES)
        return self.start(then(comparison, steps))

    def _by_messages(self, collective: Collective) -> Steps:
        """Return the steps by messages of the collective that begins next."""
        return collective.steps(self._lane_of(self._sequencer.begun + 1))

    def _lane_of(self, number: int) -> algorithms.Lane:
        """Return the lane of the operation with a number: in step also after a difference."""
        return algorithms.Lane(self, self.lane(Traffic.SEQUENCED, number))

    def _call(self, call: LibraryCall, waiter: Waiter) -> None:
        """Make a blocking call of the library, which all ranks have called for."""
        # As `_within`, without the microseconds that two context managers cost.
        self.inside = (waiter, time.monotonic())
        try:
            getattr(self._comm, call.name)(*call.args)
        except self._mpi.Exception as error:
            raise _translate(self._mpi, waiter.operation, error) from error
        finally:
            self.inside = None
        if call.after is not None:
            call.after()

    def _add(self, addends: Array) -> Work[Any]:
        """Start adding up the numbers of all ranks in place."""
        with _translated(self._mpi, "arrival"):
            request = self._comm.Iallreduce(self._mpi.IN_PLACE, addends, self._mpi.SUM)
        return _Requests(self._mpi, [request], keep=addends)

    def _arrive(self, waiter: Waiter, route: Route = Route.LIBRARY) -> None:
        """Wait, with the deadline, until all ranks have called this operation, and compare it."""
        self._sequencer.arrive(waiter, route)

    @contextlib.contextmanager
    def _within(self, waiter: Waiter) -> Iterator[None]:
        """Mark that a blocking call of the library is under way, and translate its errors."""
        self.inside = (waiter, time.monotonic())
        try:
            with _translated(self._mpi, waiter.operation):
                yield
        finally:
            self.inside = None


class _CommExchange:
    """How the ranks of a node exchange a few bytes; see `NodeExchange`.

    Only buffer calls: the first pickled collective of a communicator duplicates it with Python's
    lock held, and can deadlock a program of several threads.

    Parameters
    ----------
    backend : MpiBackend
        The group.
    comm : mpi4py.MPI.Intracomm
        The ranks of this node.
    """

    def __init__(self, backend: MpiBackend, comm: Any) -> None:
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.blocking = backend._within
        self.agree = backend._agree
        self._mpi = backend._mpi
        self._comm = comm

    def share(self, nbytes: int) -> memoryview | None:
        return share(self, nbytes)

    def broadcast(self, message: Array, root: int) -> None:
        self._comm.Bcast(message, root=root)

    def highest(self, value: int) -> int:
        largest = np.array(value)
        self._comm.Allreduce(self._mpi.IN_PLACE, largest, self._mpi.MAX)
        return int(largest)


def _peer(mpi: Any, peer: int) -> int:
    return int(mpi.ANY_SOURCE) if peer < 0 else peer


def _chunks(x: Array) -> list[Array]:
    """Cut an array into messages that every library can count."""
    data = as_bytes(x)
    if data.size <= _CHUNK:
        return [data]
    return [data[start : start + _CHUNK] for start in range(0, data.size, _CHUNK)]


def _nodes(mpi: Any, comm: Any) -> list[int]:
    """Return for each rank the world rank of the first that shares its memory; collective."""
    shared = comm.Split_type(mpi.COMM_TYPE_SHARED, key=comm.rank)
    first = np.array(mpi.COMM_WORLD.rank)
    shared.Bcast(first, root=0)
    local = shared.rank
    shared.Free()
    pretended = env.ranks_per_node()
    if pretended is not None:
        first += local // pretended * pretended
    nodes = np.empty(comm.size, first.dtype)
    comm.Allgather(first, nodes)
    return [int(node) for node in nodes]
