"""The network between the threads of a simulated job: it matches, copies, delays and loses."""

from __future__ import annotations

import heapq
import mmap
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from time import monotonic
from typing import Any

from mpidist.backends.simulated.faults import Faults, JobAborted, Mode, RankDied
from mpidist.backends.simulated.matching import Matcher, Parcel, Place, Slot
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import ANY_SOURCE, Message, Waiter, Work
from mpidist.errors import TransportError

__all__ = ["ExchangeWork", "Meeting", "Network"]

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
        """Take this rank's turns, and return whether all messages have been moved."""
        if self.pending:
            self._network.take_turns(self.world_rank)
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


class _Bell:
    """Wakes one rank; whoever waits here lets go of the interpreter's lock."""

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()
        self._nap = _FIRST_NAP

    def ring(self) -> None:
        """Wake the rank, or keep it from its next nap; only with the network's lock held."""
        if self._silent.locked():
            self._silent.release()

    def nap(self) -> None:
        """Return at the next ring, or after a while that grows as long as nobody rings."""
        if self._silent.acquire(timeout=self._nap):
            self._nap = _FIRST_NAP
        else:
            self._nap = min(2 * self._nap, _LONGEST_NAP)


class Meeting:
    """A place where the members of a group lay down a value each and read those of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[int, Any] = {}
        self.number = 0

    def full(self) -> bool:
        """Whether all have come."""
        return len(self.values) == self.size

    def missing(self, place: Place) -> list[int]:
        """Return the ranks of a group that have not come."""
        here = tuple(self.values)
        return [rank for rank, member in enumerate(place.members) if member not in here]


class Network:
    """What the ranks of a simulated job share.

    Parameters
    ----------
    size : int
        Number of ranks.
    mode : Mode, optional
        How messages move.
    faults : Faults, optional
        What goes wrong.
    seed : int, optional
        Of the delays.
    ranks_per_node : int, optional
        Pretend that so many consecutive ranks share a node; all when omitted.
    node_memory : bool, optional
        Whether collectives go by the memory of a node where they can, as between processes.
    """

    def __init__(
        self,
        size: int,
        *,
        mode: Mode = Mode.EAGER,
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
        self._bells = [_Bell() for _ in range(size)]
        self._busy = [0] * size
        self._turns: list[deque[Callable[[], None]]] = [deque() for _ in range(size)]
        self._matcher = Matcher()
        self._late: list[tuple[float, int, Callable[[], None]]] = []
        self._last_due: dict[tuple[int, int], float] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._calls = [0] * size
        self._died: set[int] = set()
        self._meetings: dict[Hashable, Meeting] = {}
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
            self._ring_all()

    def lose(self, rank: int, words: str) -> None:
        """Let `Backend.lost` report from now on that a rank of the world is gone."""
        with self._lock:
            self.lost[rank] = words
            self._ring_all()

    def _ring_all(self) -> None:
        for bell in self._bells:
            bell.ring()

    def _check(self, rank: int) -> None:
        if rank in self._died:
            raise RankDied(f"rank {rank} is dead")
        if self._aborted is not None:
            raise JobAborted(self._aborted.code)

    def _enter(self, rank: int) -> None:
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

    def take_turns(self, rank: int) -> None:
        """Do what is this rank's turn to do, and deliver what has been delayed long enough."""
        self._check(rank)
        if self._late:
            with self._lock:
                while self._late and self._late[0][0] <= monotonic():
                    heapq.heappop(self._late)[2]()
        turns = self._turns[rank]
        if turns:
            with self._lock:
                while turns:
                    turns.popleft()()

    def poll(self, rank: int) -> None:
        """Take turns, and let other threads run where nothing is left to do but wait."""
        self.take_turns(rank)
        # Whoever waits for a counter in node memory is not busy with messages, but must let go of
        # the interpreter's lock as well.
        if self._busy[rank] or self.node_memory:
            self._bells[rank].nap()
            self.take_turns(rank)

    def meet(
        self, key: Hashable, place: Place, value: Any, *, names: Sequence[int], waiter: Waiter
    ) -> Meeting:
        """Wait until all members of a place have laid down their values under one key.

        `names` are the numbers by which the waiter knows the members.
        """
        rank = place.members[place.rank]
        meeting = self.offer(key, place, value)

        def missing() -> list[int]:
            return [names[member] for member in meeting.missing(place)]

        try:
            waiter.wait_for(meeting.full, missing=missing)
        finally:
            self.leave(rank)
        return meeting

    def offer(self, key: Hashable, place: Place, value: Any) -> Meeting:
        """Lay down a value under a key, and return at once; `leave` when all have been read."""
        rank = place.members[place.rank]
        with self._lock:
            self._enter(rank)
            meeting = self._meetings.setdefault(key, Meeting(len(place.members)))
            meeting.values[rank] = value
            self._busy[rank] += 1
            if meeting.full():
                del self._meetings[key]
                meeting.number = next(self._numbers)
                for member in place.members:
                    self._bells[member].ring()
        return meeting

    def leave(self, rank: int) -> None:
        """Wait for a meeting no more."""
        with self._lock:
            self._busy[rank] -= 1

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
        self, place: Place, sends: Sequence[Message], receives: Sequence[Message]
    ) -> ExchangeWork:
        """Post receives and send messages for one rank of a group."""
        rank = place.members[place.rank]
        work = ExchangeWork(self, rank, len(sends), len(receives))
        parcels = [Parcel(place, message, work) for message in sends]
        if self._mode is Mode.EAGER:
            for parcel in parcels:
                parcel.data = parcel.data.copy()
        with self._lock:
            self._enter(rank)
            self._busy[rank] += bool(work.pending)
            for index, message in enumerate(receives):
                slot = Slot(place, message, work, index)
                waiting = self._matcher.post(slot)
                if waiting is not None:
                    self._match(waiting, slot)
            for parcel in parcels:
                if self._mode is Mode.EAGER:
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
            if self._mode is Mode.POLLED:
                self._hand_turn(dest, lambda: self._arrive(parcel))
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
        slot = self._matcher.arrive(parcel)
        if slot is not None:
            self._match(parcel, slot)

    def _match(self, parcel: Parcel, slot: Slot) -> None:
        """Move a message that has met its receive."""
        if self._mode is not Mode.POLLED:
            slot.take(parcel)
            self._sent_off(parcel)
            self._finish(slot.work)
            return
        dest = slot.work.world_rank

        def take() -> None:
            slot.take(parcel)
            self._finish(slot.work)

        def send() -> None:
            parcel.data = parcel.data.copy()
            self._sent_off(parcel)
            self._hand_turn(dest, take)

        self._hand_turn(parcel.members[parcel.source], send)

    def _hand_turn(self, rank: int, action: Callable[[], None]) -> None:
        self._turns[rank].append(action)
        self._bells[rank].ring()

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
            self._bells[work.world_rank].ring()
