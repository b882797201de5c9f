"""The collectives of one group in the order of the calls, compared before any hands out a result.

[Note: comparison] Every collective on host arrays, blocking or immediate, gets the next number here
in the order of the calls. Each rank publishes the signature of its call. When all ranks have
arrived at a number they compare the signatures, and only then is a result handed out: a collective
is complete on no rank before all have called it. Where all ranks of the group share memory they
compare signatures there; on a few nodes there, and by a message between each two nodes, see
`mpidist.backends.node.leaders`; else by an all-reduce of 32 bytes, see
`mpidist.backends.node.comparison`.

A collective on host arrays over MPI begins when the calls have been compared, so that a difference
leaves the group usable. If a part of the call was begun earlier (an immediate call of simulated
ranks, the collectives for the other dtypes of a list), a difference breaks the group. It does so on
all ranks, whatever the timing, since the signature says whether a part has begun.

[Note: memory order] Each rank has counters that it alone writes and that all others read. On x86-64
stores become visible in the order in which they were made and loads are not reordered with loads
(Intel SDM, volume 3, section 9.2.2), so that a rank that sees a counter sees everything that was
written before it; only non-temporal stores, which a large memcpy may use, need a fence, and taking
a lock is one (any locked instruction is). Other processors promise less, and have no direct path.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from os import sched_yield
from typing import Any, Protocol, TypeAlias

import numpy as np

from mpidist.backends.node.registered_memory import RegisteredArray
from mpidist.backends.node.signatures import (
    CallSignature,
    ComparedCall,
    Described,
    Route,
    describe_with_route,
    signature_of,
)
from mpidist.backends.node.topology import NodeTopology
from mpidist.backends.work import (
    Condition,
    ConditionSteps,
    PolledWork,
    Steps,
    StepsWork,
    Waiter,
    conditions,
)

__all__ = [
    "RING",
    "SMALL_NBYTES",
    "Arrival",
    "ArrivalCounters",
    "Sequencer",
    "SignatureComparison",
    "Waiters",
    "fence",
    "supported",
]

Waiters: TypeAlias = Callable[[], Waiter]
"""Makes the waiter of the operation that has begun: few operations wait long enough to need one."""

Refuse: TypeAlias = Callable[[int, Described, bool], Steps]
"""Returns the steps that raise `CollectiveMismatchError` on all ranks."""

RING = 64
"""Operations that may be under way at once; a further one is delayed."""

SMALL_NBYTES = 16 << 10
"""Bytes of the largest array that has a buffer beside the counters; each rank has two of them."""

_BREAKS, _BALANCE, _DIGEST, _NUMBER = 4, 5, 6, 7
"""Words of a slot: three of the call signature, and behind it the number of its operation."""

_FENCE = threading.Lock()

_SPINS, _POLLS = 20, 80
"""How often a counter is read before the core is yielded in between, and before the wait gives up
spinning and drives other operations, too."""


def supported() -> bool:
    """Whether this processor orders memory as the direct path needs; see [Note: memory order]."""
    import platform  # of the standard library, but not needed to import this package

    return platform.machine() in ("x86_64", "AMD64")


class Payload(Protocol):
    """An array that travels with the arrival of its operation, behind the header of a message."""

    def pack(self) -> int:
        """Write the node's array into the message of the node, and return its bytes."""

    def unpack(self) -> None:
        """Read the arrays of all nodes from their messages."""


class SignatureComparison(Protocol):
    """The arrivals of one group, by the number of the operation.

    Attributes
    ----------
    in_slots : bool
        Whether arrivals use the slots of `ArrivalCounters`, of which there are `RING`.
    """

    in_slots: bool

    def arrive_and_compare(
        self, number: int, signature: CallSignature, payload: Payload | None = None
    ) -> bool:
        """Arrive, if all may do so soon, and return whether all have with the same signature.

        Where they have not, `arrive` follows, which does nothing if this rank has arrived here.
        """

    def arrive(self, number: int, signature: CallSignature, payload: Payload | None = None) -> None:
        """Publish that this rank has called an operation with this signature."""

    def all_arrived(self, number: int) -> bool:
        """Whether all ranks have called it; polled."""

    def missing(self, number: int) -> list[int]:
        """Return the ranks that have not called it, as far as is known."""

    def equal(self, number: int, signature: CallSignature) -> bool:
        """Whether the signatures are equal; called once, when all have arrived."""

    def breaks(self, number: int) -> bool:
        """Whether a part of the call is under way on any rank; called where they are not equal."""


class ArrivalCounters:
    """What each rank of a node has begun and finished, and buffers for small arrays.

    They compare the calls of a group whose ranks all have them: see `SignatureComparison`.

    Parameters
    ----------
    memory : buffer
        `nbytes(size)` bytes, zero at first, shared by all ranks.
    rank, size : int
        This rank among those of the node, and their number.

    Attributes
    ----------
    finished : int
        Number of the last operation that this rank has finished.
    """

    # In words of 8 bytes. A slot holds a call signature and the number of its operation; the part
    # of a rank begins with a slot of its counters: last operation finished, last phase reached.
    in_slots = True

    _SLOT = 8
    _BUFFERS = _SLOT * (RING + 1) * 8
    _PART = -(-(_BUFFERS + 2 * SMALL_NBYTES) // mmap.PAGESIZE) * mmap.PAGESIZE

    def __init__(self, memory: Any, rank: int, size: int) -> None:
        self._bytes = memoryview(memory).cast("B")
        self._values = self._bytes.cast("Q")
        self._starts = tuple(other * self._PART // 8 for other in range(size))
        self._others = tuple(s for other, s in enumerate(self._starts) if other != rank)
        self._own = self._starts[rank]
        self._numbers = [self._own + self._SLOT * (2 + slot) - 1 for slot in range(RING)]
        slots = np.frombuffer(self._bytes, np.uint64, self._SLOT * (RING + 1), 8 * self._own)
        self._slots = [slot[:_NUMBER] for slot in slots.reshape(-1, self._SLOT)[1:]]
        self.finished = 0
        # What stands in each slot: a program repeats its calls, and need not write them again.
        self._written: list[CallSignature | None] = [None] * RING

    @classmethod
    def nbytes(cls, size: int) -> int:
        """Return the bytes of memory that `size` ranks need."""
        return size * cls._PART

    # -- operations, by their number -------------------------------------------------------------

    def arrive(self, number: int, signature: CallSignature, payload: Payload | None = None) -> None:
        """Publish this rank's arrival at operation `number`, after all earlier writes (release)."""
        slot = number % RING
        if self._written[slot] is not signature:
            self._slots[slot][...] = signature.values
            self._written[slot] = signature
        with _FENCE:
            pass
        self._values[self._numbers[slot]] = number

    def all_arrived(self, number: int) -> bool:
        """Whether the other ranks have arrived at operation `number`."""
        return self._all_at(self._SLOT * (1 + number % RING) + _NUMBER, number)

    def arrive_and_compare(
        self, number: int, signature: CallSignature, payload: Payload | None = None
    ) -> bool:
        """Arrive, spin for a few microseconds, and return whether all have with the same call."""
        # One body, not three methods: this is part of every blocking sum.
        slot = number % RING
        if self._written[slot] is not signature:
            self._slots[slot][...] = signature.values
            self._written[slot] = signature
        values, digest = self._values, signature.digest
        with _FENCE:
            pass
        values[self._numbers[slot]] = number
        offset = 8 * slot + 15  # of the slot's number; constants of the class take longer to find
        for start in self._others:
            index = start + offset
            if values[index] < number and not _soon_reaches(values, index, number):
                return False
            if values[index - 1] != digest:
                return False
        return True

    def missing(self, number: int) -> list[int]:
        """Return the ranks of the node that have not arrived at operation `number`."""
        offset = self._SLOT * (1 + number % RING) + _NUMBER
        return [
            rank
            for rank, start in enumerate(self._starts)
            if self._values[start + offset] != number
        ]

    def equal(self, number: int, signature: CallSignature) -> bool:
        """Whether all arrived with this signature, and with balances that add up to 0."""
        same = self.same_call(number, signature)
        return same and (signature.balance is None or self.balance(number) == 0)

    def same_call(self, number: int, signature: CallSignature) -> bool:
        """Whether all arrived with this signature, but for the balance."""
        values, offset = self._values, self._SLOT * (1 + number % RING) + _DIGEST
        digest = signature.digest
        for start in self._others:  # noqa: SIM110  # part of every operation
            if values[start + offset] != digest:
                return False
        return True

    def balance(self, number: int) -> int:
        """Return the sum of the balances of all ranks, modulo 2**64."""
        offset = self._SLOT * (1 + number % RING) + _BALANCE
        return sum(self._values[start + offset] for start in self._starts) % 2**64

    def breaks(self, number: int) -> bool:
        """Whether any rank made a call of which a part is under way."""
        offset = self._SLOT * (1 + number % RING) + _BREAKS
        return any(self._values[start + offset] for start in self._starts)

    def finish(self, number: int) -> None:
        """Publish that this rank has finished operation `number` and all before it (release)."""
        with _FENCE:
            pass
        self._values[self._own] = number
        # Last: where another thread drives this operation, the next one may be over as soon as this
        # is finished here, and the number in shared memory must not go back.
        self.finished = number

    def all_finished(self, number: int) -> bool:
        """Whether the other ranks have finished operation `number`."""
        return self._all_at(0, number)

    def soon_finished(self, number: int) -> bool:
        """Spin for a few microseconds, and return whether the other ranks have finished it."""
        return self._soon_at(0, number)

    def least_finished(self) -> int:
        """Return the number of the last operation that all ranks have finished."""
        return min(self._values[start] for start in self._starts)

    def unfinished(self, number: int) -> list[int]:
        """Return the ranks of the node that have not finished operation `number`."""
        return [rank for rank, start in enumerate(self._starts) if self._values[start] < number]

    # -- phases inside an operation, counted over all operations ---------------------------------

    def reach(self, phase: int) -> None:
        """Publish that this rank has reached a phase, after all earlier writes (release)."""
        with _FENCE:
            pass
        self._values[self._own + 1] = phase

    def all_reached(self, phase: int) -> bool:
        """Whether the other ranks have reached a phase."""
        return self._all_at(1, phase)

    def soon_reached(self, phase: int) -> bool:
        """Spin for a few microseconds, and return whether the other ranks have reached it."""
        return self._soon_at(1, phase)

    def not_reached(self, phase: int) -> list[int]:
        """Return the ranks of the node that have not reached a phase."""
        return [rank for rank, start in enumerate(self._starts) if self._values[start + 1] < phase]

    # -- memory ----------------------------------------------------------------------------------

    def _all_at(self, offset: int, number: int) -> bool:
        """Whether this word of all others is at least `number`."""
        values = self._values
        for start in self._others:  # noqa: SIM110  # this is polled
            if values[start + offset] < number:
                return False
        return True

    def _soon_at(self, offset: int, number: int) -> bool:
        """Whether it is, or becomes so soon."""
        values = self._values
        for start in self._others:
            index = start + offset
            if values[index] < number and not _soon_reaches(values, index, number):
                return False
        return True

    def small_buffers(self) -> list[memoryview]:
        """Return `2 * SMALL_NBYTES` bytes of each rank, for small arrays."""
        starts = [8 * start + self._BUFFERS for start in self._starts]
        return [self._bytes[start : start + 2 * SMALL_NBYTES] for start in starts]


def _soon_reaches(values: memoryview, index: int, number: int) -> bool:
    """Whether a word reaches a number within a few microseconds."""
    for polls in range(_POLLS):
        if polls >= _SPINS:
            sched_yield()
        if values[index] >= number:
            return True
    return False


def fence() -> None:
    """Make what this rank has written visible before what it writes from now on."""
    with _FENCE:
        pass


class Sequencer:
    """The collectives of a group: first in, first out.

    No operation does its work before the earlier ones are finished on this rank, so that the ranks
    need not agree on anything but the order of their calls. A blocking call begins by
    `wait_for_earlier` and `begin_blocking`, and ends by `finish_together` or by `counters.finish`;
    an immediate call takes the same steps as a generator, which itself waits for nothing.

    Parameters
    ----------
    counters : ArrivalCounters
        Of the ranks of this node; of this rank alone where the ranks share no memory.
    topology : NodeTopology
        The ranks that share the counters.
    comparison : SignatureComparison or None
        How the ranks of the group compare their calls; None if all of them share the
        counters.
    refuse : callable
        Called with the number of an operation, the description of this rank's call, and whether
        the group stays usable; returns the steps that raise the error on all ranks.

    Attributes
    ----------
    begun : int
        Number of the last operation that this rank has begun.
    """

    def __init__(
        self,
        counters: ArrivalCounters,
        topology: NodeTopology,
        comparison: SignatureComparison | None,
        refuse: Refuse,
    ) -> None:
        self.counters = counters
        self.topology = topology
        self.begun = 0
        # With counters that all share, most blocking calls are over within a few microseconds.
        self._by_counters = comparison is None
        self._comparison: SignatureComparison = comparison or counters
        self._in_slots = self._comparison.in_slots
        self._refuse = refuse
        self._arrived = 0
        self._free = 0
        self._phase = 0

    # -- a blocking call -------------------------------------------------------------------------

    def wait_for_earlier(self, waiters: Waiters) -> None:
        """Wait until all operations that were begun earlier are finished on this rank."""
        if self.counters.finished != self.begun:
            waiters().wait_for(
                lambda: self.counters.finished == self.begun,
                missing=lambda: self.missing(self.counters.finished + 1),
            )

    def arrive(self, waiter: Waiter, route: Route) -> None:
        """Wait until all ranks have made the call, compare it, and finish: a barrier."""

        def waiters() -> Waiter:
            return waiter

        self.wait_for_earlier(waiters)
        signature = signature_of(waiter, route)
        number = self.begin_blocking(signature, waiters)
        if self._by_counters and signature.balance is not None:
            self._check(number, signature, waiter)
        self.counters.finish(number)

    def begin_blocking(
        self, signature: CallSignature, waiters: Waiters, payload: Payload | None = None
    ) -> int:
        """Begin an operation, the earlier ones being finished, and wait until all ranks have.

        Parameters
        ----------
        signature : CallSignature
            The signature of this rank's call.
        waiters : callable
            Makes the waiter of the call, where it has to wait longer.
        payload : Payload, optional
            What travels with the arrival, where ranks are on several nodes.

        Returns
        -------
        int
            The number of the operation.

        Raises
        ------
        CollectiveMismatchError
            On all ranks, if their signatures differ.
        """
        # As short as it can be: this is part of every small sum.
        self.begun = self._arrived = number = self.begun + 1
        if (
            number <= self._free + RING or not self._in_slots or self._slot_free(number)
        ) and self._comparison.arrive_and_compare(number, signature, payload):
            return number
        self._begin_slowly(number, signature, waiters(), payload)
        return number

    def _begin_slowly(
        self, number: int, signature: CallSignature, waiter: Waiter, payload: Payload | None
    ) -> None:
        """Arrive at an operation, and wait until all ranks have with the same signature."""
        counters, comparison = self.counters, self._comparison
        if self._in_slots and not self._slot_free(number):
            waiter.wait_for(
                lambda: self._slot_free(number),
                missing=lambda: self._ranks(counters.unfinished(number - RING)),
            )
        comparison.arrive(number, signature, payload)
        waiter.wait_for(
            lambda: comparison.all_arrived(number), missing=lambda: self.missing(number)
        )
        self._check(number, signature, waiter)

    def _check(self, number: int, signature: CallSignature, waiter: Waiter) -> None:
        """Raise on all ranks if their calls of an operation differ."""
        if not self._comparison.equal(number, signature):
            for step in self.mismatch_steps(number, describe_with_route(waiter, signature)):
                waiter.wait_for(step.condition, missing=step.missing)

    def phase_barrier(self, waiters: Waiters) -> None:
        """Wait until the ranks of the node have reached the next phase of an operation."""
        self._phase = phase = self._phase + 1
        counters = self.counters
        counters.reach(phase)
        if not counters.soon_reached(phase):
            waiters().wait_for(
                lambda: counters.all_reached(phase),
                missing=lambda: self._ranks(counters.not_reached(phase)),
            )

    def finish_together(self, number: int, waiters: Waiters) -> None:
        """Finish an operation, and wait for the other ranks of the node."""
        counters = self.counters
        counters.finish(number)
        if not counters.soon_finished(number):
            waiters().wait_for(
                lambda: counters.all_finished(number),
                missing=lambda: self._ranks(counters.unfinished(number)),
            )

    # -- an immediate call, as steps -------------------------------------------------------------

    def arrival_steps(
        self, call: ComparedCall, route: Route, array: RegisteredArray | None = None
    ) -> ConditionSteps[int]:
        """Begin an operation, and return its number when all ranks have arrived at it."""
        number = self.next_number()
        yield from self.arrive_steps(number, call, signature_of(call, route, array))
        return number

    def arrive_steps(
        self, number: int, call: ComparedCall, signature: CallSignature
    ) -> ConditionSteps[None]:
        """Arrive at an operation that has begun, and go on when all ranks have."""
        if not self.try_to_arrive(number, signature):
            yield Condition(
                lambda: self.try_to_arrive(number, signature),
                lambda: self._ranks(self.counters.unfinished(number - RING)),
            )
        yield Condition(lambda: self.all_arrived(number), lambda: self.missing(number))
        if not self._comparison.equal(number, signature):
            yield from self.mismatch_steps(number, describe_with_route(call, signature))

    def compare(self, call: ComparedCall, route: Route, *, begun: bool = False) -> Arrival:
        """Arrive with an immediate call that needs no shared memory, and compare it.

        Parameters
        ----------
        call, route, begun
            See `signature_of`.

        Returns
        -------
        Arrival
            Complete when all ranks have made the same call. The caller has to poll it: later
            operations wait for it.
        """
        return Arrival(self, call, signature_of(call, route, begun=begun))

    def finish_steps(self, number: int) -> ConditionSteps[None]:
        """Finish an operation, and wait for the other ranks of the node."""
        counters = self.counters
        counters.finish(number)
        yield Condition(
            lambda: counters.all_finished(number), lambda: self._ranks(counters.unfinished(number))
        )

    def equal(self, number: int, signature: CallSignature) -> bool:
        """Whether the signatures of all ranks are equal; called once, when all have arrived."""
        return self._comparison.equal(number, signature)

    def mismatch_steps(self, number: int, described: Described) -> ConditionSteps[None]:
        """Raise `CollectiveMismatchError`, with what each rank has called, on all ranks."""
        usable = not self._comparison.breaks(number)
        # All ranks must have read the signatures before a later operation overwrites a slot.
        yield from self.finish_steps(number)
        yield from conditions(self._refuse(number, described, usable))

    # -- an immediate call, step by step ---------------------------------------------------------

    def next_number(self) -> int:
        """Return the number of the operation that begins now."""
        self.begun += 1
        return self.begun

    def earlier_finished(self, number: int) -> bool:
        """Whether all operations before this one are finished on this rank."""
        return self.counters.finished == number - 1

    def try_to_arrive(self, number: int, signature: CallSignature) -> bool:
        """Arrive at an operation unless an earlier one has still to arrive, or the ring is full."""
        if self._in_slots and (self._arrived < number - 1 or not self._slot_free(number)):
            return False
        self._comparison.arrive(number, signature)
        self._arrived = number
        return True

    def all_arrived(self, number: int) -> bool:
        """Whether all ranks have arrived, and the earlier operations are finished here."""
        # Polled first: leaders pass on the arrivals of their nodes, also of what cannot begin yet.
        return self._comparison.all_arrived(number) and self.counters.finished == number - 1

    # -- the state of the ring----------------------------------------------------------------------

    def _slot_free(self, number: int) -> bool:
        """Whether all ranks have finished the operation that used the slot of this one before."""
        last = number - RING
        if last > self._free:
            self._free = self.counters.least_finished()
        return last <= self._free

    def missing(self, number: int) -> list[int]:
        """Return the ranks that have not arrived at an operation, as far as is known."""
        return self._comparison.missing(number)

    def _ranks(self, local_ranks: list[int]) -> list[int]:
        return [self.topology.local[local_rank] for local_rank in local_ranks]


class Arrival(PolledWork):
    """The arrival of an immediate call that uses no shared memory otherwise.

    A class of its own and not steps, for speed: most immediate calls arrive by it.

    Parameters
    ----------
    sequencer : Sequencer
        The operations of the group.
    call, signature : ComparedCall, CallSignature
        The call of this rank and its signature.
    """

    def __init__(self, sequencer: Sequencer, call: ComparedCall, signature: CallSignature) -> None:
        self._sequencer = sequencer
        self._call = call
        self._signature = signature
        self._number = number = sequencer.next_number()
        self._arrived = sequencer.try_to_arrive(number, signature)
        self._over = False
        self._mismatch: StepsWork | None = None
        self._driven = threading.Lock()

    def done(self) -> bool:
        """Poll; raises `CollectiveMismatchError` if the calls of the ranks differ."""
        if self._over:
            return True
        # Another thread, waiting on another group, may be driving this one just now.
        if not self._driven.acquire(blocking=False):
            return False
        try:
            return self._advance()
        finally:
            self._driven.release()

    def _advance(self) -> bool:
        if self._mismatch is not None:
            return self._mismatch.done()
        sequencer, number, signature = self._sequencer, self._number, self._signature
        if not self._arrived:
            self._arrived = sequencer.try_to_arrive(number, signature)
        if not self._arrived or not sequencer.all_arrived(number):
            return False
        if sequencer.equal(number, signature):
            sequencer.counters.finish(number)
            self._over = True
            return True
        described = describe_with_route(self._call, signature)
        self._mismatch = StepsWork(sequencer.mismatch_steps(number, described))
        return False

    def missing(self) -> Sequence[int]:
        """Return the ranks that have not arrived, as far as is known."""
        if self._mismatch is not None:  # all have arrived; their slots may be reused
            return self._mismatch.missing()
        return () if self._over else self._sequencer.missing(self._number)
