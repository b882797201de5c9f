"""The network between the threads of a simulated job: it matches, copies, delays and loses."""

from __future__ import annotations

import errno
import heapq
import mmap
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mpidist._types import Array
from mpidist.arrays.namespaces import as_bytes
from mpidist.backends.simulated.faults import DeliveryMode, Faults, JobAborted, RankDied
from mpidist.backends.work import ANY_SOURCE, Message, Waiter, Work, wait_until
from mpidist.errors import TransportError

T = TypeVar("T", "Parcel", "PostedReceive")

_FIRST_NAP, _LONGEST_NAP = 20e-6, 500e-6
"""Seconds that a poll which finds nothing waits for news; doubled from the first to the longest."""


class ExchangeWork(Work[tuple[int, ...]]):
    """Some messages under way; the result is the source of each receive."""

    def __init__(self, network: Network, rank: int, sends: int, receives: int) -> None:
        self._network = network
        self.world_rank = rank
        self.pending = sends + receives
        self.sources = [ANY_SOURCE] * receives
        self.error: TransportError | None = None

    def done(self) -> bool:
        """Do what is pending on this rank, and return whether all messages have been moved."""
        if self.pending:
            self._network.run_pending(self.world_rank)
        if self.error is not None:
            raise self.error
        return not self.pending

    def wait(self, timeout: float | None = None) -> tuple[int, ...]:
        """Wait without driving anything else."""
        wait_until(
            self.done,
            timeout=float("inf") if timeout is None else timeout,
            progress=lambda: self._network.poll(self.world_rank),
        )
        return tuple(self.sources)


class Member(NamedTuple):
    """Rank `rank` of the group `context`, whose members have these ranks of the world."""

    context: Hashable
    rank: int
    members: tuple[int, ...]

    @property
    def world_rank(self) -> int:
        """The rank in the world."""
        return self.members[self.rank]


class _Address(NamedTuple):
    """What a message and its receive have in common: the receiver in its group, and the lane."""

    context: Hashable
    rank: int
    lane: int


@dataclass(slots=True, eq=False)
class Parcel:
    """One message on its way; `work` is the sender's until its array is no longer needed."""

    address: _Address
    source: int
    data: Array
    members: tuple[int, ...]
    work: ExchangeWork | None


@dataclass(slots=True, eq=False)
class PostedReceive:
    """One posted receive; its source is the `index`-th of its work's."""

    address: _Address
    source: int
    buffer: Array
    work: ExchangeWork
    index: int

    def fits(self, parcel: Parcel) -> bool:
        """Whether it takes messages of this one's source."""
        return self.source in (ANY_SOURCE, parcel.source)

    def take(self, parcel: Parcel) -> None:
        """Copy the bytes of a message, or note that it is too long."""
        self.work.sources[self.index] = parcel.source
        if parcel.data.size > self.buffer.size:
            # Too late for an error of arguments: the other rank has sent it and goes on.
            self.work.error = TransportError(
                f"receive on rank {parcel.address.rank}: the message of rank {parcel.source} has "
                f"{parcel.data.size} bytes, the array that takes it {self.buffer.size}; "
                "the ranks' arguments must fit together",
                code=errno.EMSGSIZE,
            )
            return
        np.copyto(self.buffer[: parcel.data.size], parcel.data)


def _take(table: dict[_Address, list[T]], address: _Address, fits: Callable[[T], bool]) -> T | None:
    """Remove and return the first entry that fits."""
    entries = table.get(address, [])
    for index, entry in enumerate(entries):
        if fits(entry):
            del entries[index]
            if not entries:
                del table[address]
            return entry
    return None


class _Wakeup:
    """Wakes one rank; waiting here releases the interpreter's lock."""

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()
        self._nap = _FIRST_NAP

    def wake(self) -> None:
        """Wake the rank, or keep it from its next nap; only with the network's lock held."""
        if self._silent.locked():
            self._silent.release()

    def nap(self) -> None:
        """Return at the next `wake`, or after a time that grows as long as there is none."""
        if self._silent.acquire(timeout=self._nap):
            self._nap = _FIRST_NAP
        else:
            self._nap = min(2 * self._nap, _LONGEST_NAP)


class Rendezvous:
    """An all-gather under way: each member of a group gives a value, and reads those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[int, Any] = {}
        self.number = 0

    def full(self) -> bool:
        """Whether all values are there."""
        return len(self.values) == self.size

    def missing(self, member: Member) -> list[int]:
        """Return the ranks of a group that have given no value."""
        given = tuple(self.values)
        return [rank for rank, other in enumerate(member.members) if other not in given]


class Network:
    """What the ranks of a simulated job share; see `mpidist.testing.run_ranks` for the options."""

    def __init__(
        self,
        size: int,
        *,
        mode: DeliveryMode = DeliveryMode.EAGER,
        faults: Faults | None = None,
        seed: int = 0,
        ranks_per_node: int | None = None,
        node_memory: bool = False,
    ) -> None:
        self.size = size
        self._mode = mode
        self._faults = faults or Faults()
        self.ranks_per_node = ranks_per_node or size
        self.node_memory = node_memory
        self.lost: dict[int, str] = {}
        """Ranks of the world whose end was announced, and how they ended."""
        self._seed = seed
        self._lock = threading.RLock()
        self._wakeups = [_Wakeup() for _ in range(size)]
        self._busy = [0] * size
        self._pending: list[deque[Callable[[], None]]] = [deque() for _ in range(size)]
        self._arrived: dict[_Address, list[Parcel]] = {}
        self._posted: dict[_Address, list[PostedReceive]] = {}
        self._late: list[tuple[float, int, Callable[[], None]]] = []
        self._last_due: dict[tuple[int, int], float] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._calls = [0] * size
        self._died: set[int] = set()
        self._rendezvous: dict[Hashable, Rendezvous] = {}
        self._memories: dict[Hashable, tuple[memoryview, list[int]]] = {}
        self._numbers = count(1)
        self._aborted: JobAborted | None = None

    # -- the life of the ranks -----------------------------------------------------------------

    def inject(self, faults: Faults) -> None:
        """Let these faults happen; calls and messages are counted from now."""
        with self._lock:
            self._faults = faults
            self._sent.clear()
            self._calls = [0] * self.size

    def abort(self, code: int) -> None:
        """Make every call of every rank raise `JobAborted` from now on."""
        with self._lock:
            self._aborted = self._aborted or JobAborted(code)
            self._wake_all()

    def lose(self, rank: int, reason: str) -> None:
        """Let `Backend.lost` report from now on that a rank of the world is gone."""
        with self._lock:
            self.lost[rank] = reason
            self._wake_all()

    def _wake_all(self) -> None:
        for wakeup in self._wakeups:
            wakeup.wake()

    def _check(self, rank: int) -> None:
        if rank in self._died:
            raise RankDied(f"rank {rank} is dead")
        if self._aborted is not None:
            raise JobAborted(self._aborted.code)

    def _count_call(self, rank: int) -> None:
        """Count a call, and die if it is the one."""
        self._check(rank)
        self._calls[rank] += 1
        for death in self._faults.deaths:
            if death.rank == rank and death.call == self._calls[rank]:
                self._died.add(rank)
                if death.announce:
                    self.lose(rank, f"died at its call {death.call}")
                self._check(rank)

    # -- waiting -------------------------------------------------------------------------------

    def run_pending(self, rank: int) -> None:
        """Do what is pending on this rank, and deliver what has been delayed long enough."""
        self._check(rank)
        if self._late:
            with self._lock:
                while self._late and self._late[0][0] <= monotonic():
                    heapq.heappop(self._late)[2]()
        pending = self._pending[rank]
        if pending:
            with self._lock:
                while pending:
                    pending.popleft()()

    def poll(self, rank: int) -> None:
        """Do what is pending, and let other threads run where nothing is left to do but wait."""
        self.run_pending(rank)
        # A rank that waits for a counter in node memory is not busy with messages, but has to
        # release the interpreter's lock as well.
        if self._busy[rank] or self.node_memory:
            self._wakeups[rank].nap()
            self.run_pending(rank)

    def gather(
        self,
        key: Hashable,
        member: Member,
        value: Any,
        waiter: Waiter,
        *,
        ranks: Sequence[int] | None = None,
    ) -> Rendezvous:
        """Wait until all members of a group have given their values under one key.

        `ranks` are theirs in the group of the waiter, if that is another one.
        """
        rendezvous = self.offer(key, member, value)

        def missing() -> list[int]:
            return [ranks[i] if ranks else i for i in rendezvous.missing(member)]

        try:
            waiter.wait_for(rendezvous.full, missing=missing)
        finally:
            self.leave(member)
        return rendezvous

    def offer(self, key: Hashable, member: Member, value: Any) -> Rendezvous:
        """Give a value under a key, and return at once; `leave` when all have been read."""
        rank = member.world_rank
        with self._lock:
            self._count_call(rank)
            rendezvous = self._rendezvous.setdefault(key, Rendezvous(len(member.members)))
            rendezvous.values[rank] = value
            self._busy[rank] += 1
            if rendezvous.full():
                del self._rendezvous[key]
                rendezvous.number = next(self._numbers)
                for other in member.members:
                    self._wakeups[other].wake()
        return rendezvous

    def leave(self, member: Member) -> None:
        """Stop waiting for a rendezvous."""
        with self._lock:
            self._busy[member.world_rank] -= 1

    def memory(self, key: Hashable, nbytes: int, *, readers: int) -> memoryview:
        """Return the same memory, zero at first, for each of so many calls with one key."""
        with self._lock:
            memory, left = self._memories.get(key) or (memoryview(mmap.mmap(-1, nbytes)), [readers])
            left[0] -= 1
            self._memories[key] = memory, left
            if not left[0]:
                del self._memories[key]
            return memory

    # -- messages ------------------------------------------------------------------------------

    def exchange(
        self, member: Member, sends: Sequence[Message], receives: Sequence[Message]
    ) -> ExchangeWork:
        """Post receives and send messages for one rank of a group."""
        rank = member.world_rank
        work = ExchangeWork(self, rank, len(sends), len(receives))
        eager = self._mode is DeliveryMode.EAGER
        parcels = []
        for array, peer, lane in sends:
            data = as_bytes(array).copy() if eager else as_bytes(array)
            address = _Address(member.context, peer, lane)
            parcels.append(Parcel(address, member.rank, data, member.members, work))
        with self._lock:
            self._count_call(rank)
            self._busy[rank] += bool(work.pending)
            for index, (array, peer, lane) in enumerate(receives):
                address = _Address(member.context, member.rank, lane)
                receive = PostedReceive(address, peer, as_bytes(array), work, index)
                waiting = _take(self._arrived, address, receive.fits)
                if waiting is None:
                    self._posted.setdefault(address, []).append(receive)
                else:
                    self._match(waiting, receive)
            for parcel in parcels:
                if eager:
                    self._sent_off(parcel)
                self._dispatch(parcel)
        return work

    def _dispatch(self, parcel: Parcel) -> None:
        """Put a message on its way: at once, later, or never."""
        source, dest = pair = parcel.members[parcel.source], parcel.members[parcel.address.rank]
        self._sent[pair] += 1
        if (source, dest, self._sent[pair]) in self._faults.drops:
            return

        def arrive() -> None:
            if self._mode is DeliveryMode.POLLED:
                self._hand_over(dest, lambda: self._arrive(parcel))
            else:
                self._arrive(parcel)

        if not self._faults.delay:
            arrive()
            return
        draw = random.Random(f"{self._seed}/{source}/{dest}/{self._sent[pair]}")
        due = max(monotonic() + draw.uniform(0, self._faults.delay), self._last_due.get(pair, 0))
        self._last_due[pair] = due
        heapq.heappush(self._late, (due, next(self._numbers), arrive))

    def _arrive(self, parcel: Parcel) -> None:
        receive = _take(self._posted, parcel.address, lambda receive: receive.fits(parcel))
        if receive is None:
            self._arrived.setdefault(parcel.address, []).append(parcel)
        else:
            self._match(parcel, receive)

    def _match(self, parcel: Parcel, receive: PostedReceive) -> None:
        """Move a message to its receive."""
        if self._mode is not DeliveryMode.POLLED:
            receive.take(parcel)
            self._sent_off(parcel)
            self._finish(receive.work)
            return
        dest = receive.work.world_rank

        def take() -> None:
            receive.take(parcel)
            self._finish(receive.work)

        def send() -> None:
            parcel.data = parcel.data.copy()
            self._sent_off(parcel)
            self._hand_over(dest, take)

        self._hand_over(parcel.members[parcel.source], send)

    def _hand_over(self, rank: int, action: Callable[[], None]) -> None:
        self._pending[rank].append(action)
        self._wakeups[rank].wake()

    def _sent_off(self, parcel: Parcel) -> None:
        """Release the sender's array."""
        if parcel.work is not None:
            self._finish(parcel.work)
            parcel.work = None

    def _finish(self, work: ExchangeWork) -> None:
        """Count one message of an exchange as moved."""
        work.pending -= 1
        if not work.pending:
            self._busy[work.world_rank] -= 1
            self._wakeups[work.world_rank].wake()
