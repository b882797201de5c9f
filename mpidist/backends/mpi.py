"""The MPI transport, on mpi4py's buffer calls. The only module that imports mpi4py.

Blocking collectives are arrival, with the group's deadline, and then the library's blocking call.
Immediate ones are the library's nonblocking calls. What the library does not do as promised goes
by the algorithms (`mpidist.backends.mpi_calls` says what).
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
from mpidist.arrays import as_bytes
from mpidist.backends import algorithms
from mpidist.backends.agreement import Call
from mpidist.backends.base import Backend, Capabilities, Traffic
from mpidist.backends.board import ArrivalBoard
from mpidist.backends.compared import DIFFERENT
from mpidist.backends.departures import Departures
from mpidist.backends.direct import Direct
from mpidist.backends.meetings import DirectBoard, supported
from mpidist.backends.mpi_calls import LibraryCall, LibraryCalls
from mpidist.backends.mpi_memory import share
from mpidist.backends.neighbours import Neighbours
from mpidist.backends.node_sums import NodeSums
from mpidist.backends.registered import Block
from mpidist.backends.turns import Turns
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Engine, Message, Steps, Waiter, Work
from mpidist.errors import BackendUnavailableError, CollectiveMismatchError, TransportError
from mpidist.recorder import Recorder

__all__ = ["MpiBackend", "load_mpi", "world_ranks"]

_CHUNK = 2**30
"""Bytes of the longest single message; longer ones travel in several."""

_CURE = (
    "install an MPI library and mpi4py (pip install 'mpidist[mpich]'), or use the site's MPI: load "
    "its module, so that libmpi.so can be found, or set MPI4PY_LIBMPI to its path"
)


def library_name(mpi: Any) -> str:
    """Return name and version of the MPI library, the first words of what it says of itself."""
    text: str = mpi.Get_library_version()
    name = text.splitlines()[0].partition(",")[0]
    return " ".join(name.replace("Version:", " ").replace("\0", "").split())


def load_mpi() -> Any:
    """Import and return ``mpi4py.MPI``, which initialises MPI.

    Raises
    ------
    BackendUnavailableError
        If mpi4py or an MPI library is missing.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailableError(f"mpi: {error}; {_CURE}") from error
    return MPI


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


@contextlib.contextmanager
def _translated(mpi: Any, operation: str) -> Iterator[None]:
    """Turn the library's exceptions into the package's."""
    try:
        yield
    except mpi.Exception as error:
        raise _translate(mpi, operation, error) from error


def _translate(mpi: Any, operation: str, error: Any) -> TransportError:
    return TransportError(
        f"{operation}: the MPI library reports: {error.Get_error_string()} "
        f"({mpi.Get_error_string(error.Get_error_class())})",
        code=error.Get_error_code(),
    )


_ENGINE = Engine()
"""What this process has under way: MPI is one for all its groups, and so is progress."""

_ALIVE_LOCK = threading.Lock()


class MpiBackend(Backend):
    """The ranks of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Used by this object alone, which frees it; collective over it.
    departures : Departures, optional
        Where ranks announce that they leave.
    places : sequence of int, optional
        The rank in MPI's world of each rank of the departures' communicator.

    Attributes
    ----------
    inside : (Waiter, float) or None
        The library's blocking call under way, and when it began by `time.monotonic`; a watchdog
        reads it.
    """

    name = "mpi"
    _alive: ClassVar[weakref.WeakSet[MpiBackend]] = weakref.WeakSet()

    def __init__(
        self, comm: Any, *, departures: Departures | None = None, places: Sequence[int] = ()
    ) -> None:
        self._mpi = mpi = load_mpi()
        # The first share of the tags is left to users of the communicator.
        span = (mpi.COMM_WORLD.Get_attr(mpi.TAG_UB) + 1) // (len(Traffic) + 1)
        super().__init__(comm.rank, comm.size, Capabilities(max_tag=span - 1))
        self.engine = _ENGINE
        self._comm = comm
        self._departures = departures
        self._places = places
        self._calls = LibraryCalls(mpi, comm.rank, comm.size)
        self._world_ranks = world_ranks(mpi, comm)
        nodes = _nodes(mpi, comm)
        self._node = nodes[self.rank]
        self._near = Neighbours.of(nodes, self.rank)
        # The ranks of this node: who shares memory.
        self._local = comm if len(set(nodes)) == 1 else comm.Split(self._node, self.rank)
        self._board = self._make_board()
        self._direct = direct = self._make_direct()
        if direct is not None and direct.team.alone:
            self.sums = NodeSums(direct.turns, direct.team, self.registered, self._parts)
        self.inside: tuple[Waiter, float] | None = None
        with _ALIVE_LOCK:
            self._alive.add(self)

    @classmethod
    def alive(cls) -> list[MpiBackend]:
        """Return the open transports of this process, for the watchdog."""
        with _ALIVE_LOCK:
            return list(cls._alive)

    # -- the transport -------------------------------------------------------------------------

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Work[Any]:
        """Start sending and receiving; long messages travel in several."""
        comm = self._comm
        with _translated(self._mpi, "exchange"):
            # The first request of each receive tells its source, so that these come first.
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

    def split(self, color: int | None, key: int, *, waiter: Waiter) -> MpiBackend | None:
        """Make one transport per color; collective over all ranks, blocks."""
        self._arrive(waiter)
        with self._within(waiter):
            comm = self._comm.Split(self._mpi.UNDEFINED if color is None else color, key)
            if comm == self._mpi.COMM_NULL:
                return None
            return MpiBackend(comm, departures=self._departures, places=self._places)

    def create(self, ranks: Sequence[int], *, waiter: Waiter) -> MpiBackend:
        """Make the transport of these ranks; collective over them only, blocks."""
        # The library's call would wait for ever for a member that does not come. So the members
        # meet with the deadline first; the lane is the same for all who mean the same group.
        meeting = algorithms.Lane(self, self.lane(Traffic.CREATE, hash(tuple(ranks))), ranks)
        waiter.wait_for(self.start(algorithms.dissemination_barrier(meeting)).done)
        members = self._comm.Get_group().Incl(list(ranks))
        with self._within(waiter):
            comm = self._comm.Create_group(members)
            members.Free()
            return MpiBackend(comm, departures=self._departures, places=self._places)

    def poll(self) -> None:
        """Let the library make progress on all communicators: any call into it does."""
        self._comm.Iprobe()

    def close(self) -> None:
        """Free the communicator, and the memory by way of which arrays are summed."""
        with _ALIVE_LOCK:
            self._alive.discard(self)
        if self._local != self._comm:
            self._local.Free()
        self._comm.Free()
        # Its memory, megabytes of it, would wait for the garbage collector: it refers to this.
        self._direct = self.sums = None

    def abort(self, code: int) -> None:
        """End the whole job now."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.COMM_WORLD.Abort(code)

    def node(self) -> int:
        """Return the world rank of the first rank that shares this one's memory."""
        return self._node

    @property
    def local_size(self) -> int:
        """The largest number of ranks on any node."""
        return max(map(len, self._near.nodes))

    def mpi_comm(self) -> Any:
        """Return the communicator."""
        return self._comm

    def follow(self, group: int, begun: list[int]) -> None:
        """Tell at this rank's end how many collectives of a group it has begun."""
        if self._departures is not None and group:
            self._departures.begun[group] = begun

    def lost(self, collective: tuple[int, int] | None = None) -> Mapping[int, str]:
        """Return the ranks that have left, but for those that had begun the collective."""
        if self._departures is None:
            return {}
        lost = {}
        for place, notice in self._departures.left().items():
            if collective is not None and notice.begun.get(collective[0], 0) >= collective[1]:
                continue
            world = self._places[place]
            if world in self._world_ranks:
                words = f"left after operation {notice.operations}"
                lost[self._world_ranks.index(world)] = words
        return lost

    # -- collectives ---------------------------------------------------------------------------

    def run(self, verb: str, args: tuple[Any, ...], *, waiter: Waiter) -> None:
        """Perform a collective: by shared memory, or by the library's blocking call."""
        direct = self._direct
        call: LibraryCall | None = None
        if verb == "all_reduce" and self.sums is not None:
            x, out, op = args
            summed = self.sums.prepare(x, out, op, lambda: waiter)
            if summed is not None:
                summed.run(x, out, lambda: waiter)
                return
        if direct is not None:
            whole = Call.of(verb, args, self.registered, self.crossovers.registered)
            if whole is not None:
                if whole.place is None:
                    call = getattr(self._calls, verb)(*args)
                # A blocking call of the library starts in the same order on all ranks.
                meetings = direct.plan(whole, args) if call is None else direct.meet(whole)
                for meeting in meetings:
                    waiter.wait_for(meeting.condition, missing=meeting.missing)
                if call is not None:
                    self._call(call, waiter)
                return
        call = getattr(self._calls, verb)(*args)
        if call is not None or self._board is not None:
            self._arrive(waiter)
        if call is not None:
            self._call(call, waiter)
        else:
            super().run(verb, args, waiter=waiter)

    def _call(self, call: LibraryCall, waiter: Waiter) -> None:
        """Make a blocking call of the library, to which all have come."""
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

    def _make_board(self) -> ArrivalBoard | None:
        """Make the board of arrivals where all ranks share memory; collective."""
        if self.size == 1 or self._local != self._comm:
            return None
        memory = share(self._mpi, self._comm, ArrivalBoard.nbytes(1))
        return None if memory is None else ArrivalBoard(memory, self.rank, self.size)

    def _make_direct(self) -> Direct | None:
        """Make the direct path where the ranks of every node share memory; collective."""
        near = self._near
        if not supported() or self.local_size == 1:
            return None
        memory = self._share(DirectBoard.nbytes(1))
        if memory is None:
            return None
        board = DirectBoard(memory, near.rank, len(near.local))
        return Direct(Turns(board, near), self, partial(self.lane, Traffic.TURN))

    def _share(self, nbytes: int) -> memoryview | None:
        """Map memory of so many bytes of each rank of this node, or None on all; collective."""
        memory = share(self._mpi, self._local, nbytes)
        made = np.array(memory is not None)
        self._comm.Allreduce(self._mpi.IN_PLACE, made, self._mpi.LAND)
        return memory if made else None

    def _parts(self, nbytes: int, waiter: Waiter) -> list[memoryview] | None:
        """Return every rank's part of such memory, each beginning with a page."""
        stride = Block.stride(nbytes)
        with self._within(waiter):
            memory = self._share(stride)
        if memory is None:
            return None
        return _cut(memory, stride)

    def allocate(self, nbytes: int, *, waiter: Waiter) -> Array | None:
        """Make memory that the ranks of a node share; collective, blocks."""
        if self._direct is None:
            return None
        self._arrive(waiter)
        parts = self._parts(nbytes, waiter)
        return None if parts is None else self.registered.add(parts, self._near.rank, nbytes)

    def share(self, nbytes: int, *, waiter: Waiter) -> Array | None:
        """Make one piece of memory for all ranks, where they share memory; collective, blocks."""
        if self.size == 1 or self._local != self._comm:
            return None
        self._arrive(waiter)
        with self._within(waiter):
            memory = share(self._mpi, self._comm, Block.stride(-(-nbytes // self.size)))
        return None if memory is None else np.frombuffer(memory, np.uint8, nbytes)

    def record(self) -> Mapping[int, memoryview]:
        """Begin to record where the other ranks of the node can read it; collective, blocks."""
        near, nbytes = self._near, Recorder.nbytes()
        memory = None if len(near.local) == 1 else share(self._mpi, self._local, nbytes)
        if memory is None:
            return super().record()
        parts = _cut(memory, nbytes)
        self.recorder = Recorder(parts[near.rank])
        return dict(zip(near.local, parts, strict=True))

    def _arrive(self, waiter: Waiter) -> None:
        """Wait, with the deadline, until all ranks have come to this operation."""
        if self.size == 1:
            return
        if self._board is not None:
            self._board.arrive(waiter.digest)
            waiter.wait_for(self._board.all_here, missing=self._board.missing)
            if not self._board.alike():
                raise CollectiveMismatchError(DIFFERENT)
        else:
            waiter.wait_for(_Requests(self._mpi, [self._comm.Ibarrier()], keep=None).done)

    @contextlib.contextmanager
    def _within(self, waiter: Waiter) -> Iterator[None]:
        """Mark that a blocking call of the library is under way, and translate its errors."""
        self.inside = (waiter, time.monotonic())
        try:
            with _translated(self._mpi, waiter.operation):
                yield
        finally:
            self.inside = None

    def transfer(self, verb: str, args: tuple[Any, ...]) -> Work[Any]:
        """Start a collective by the library's nonblocking call, if it has one."""
        call: LibraryCall | None = getattr(self._calls, verb)(*args)
        nonblocking = None if call is None else call.nonblocking
        if call is None or nonblocking is None:
            return super().transfer(verb, args)
        with _translated(self._mpi, verb):
            request = getattr(self._comm, nonblocking)(*call.args)
        work = _Requests(self._mpi, [request], keep=call)
        return work if call.after is None else self.start(_then(work, call.after))


def _then(work: Work[Any], after: Callable[[], None]) -> Steps:
    yield work
    after()


def _cut(memory: memoryview, stride: int) -> list[memoryview]:
    """Return every rank's part of shared memory."""
    return [memory[start : start + stride] for start in range(0, len(memory), stride)]


def _peer(mpi: Any, peer: int) -> int:
    return int(mpi.ANY_SOURCE) if peer < 0 else peer


def _chunks(x: Array) -> list[Array]:
    """Cut an array into messages that every library can count."""
    data = as_bytes(x)
    if data.size <= _CHUNK:
        return [data]
    return [data[start : start + _CHUNK] for start in range(0, data.size, _CHUNK)]


def world_ranks(mpi: Any, comm: Any) -> tuple[int, ...]:
    """Return the rank in MPI's world of each rank."""
    here, world = comm.Get_group(), mpi.COMM_WORLD.Get_group()
    ranks = tuple(mpi.Group.Translate_ranks(here, None, world))
    here.Free()
    world.Free()
    return ranks


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
