"""The collectives of one group in the order of the calls, compared before any hands out a result.

[Note: comparison] Every collective on host arrays, blocking or immediate, gets the next number here
in the order of the calls. Each rank publishes the signature of its call. When all ranks have
arrived at a number they compare the signatures, and only then is a result handed out: a collective
is complete on no rank before all have called it. Where all ranks of the group share memory they
compare signatures there, else by an all-reduce of 32 bytes; see `mpidist.backends.node.comparison`.

A collective on host arrays over MPI begins when the calls have been compared, so that a difference
leaves the group usable. If a part of the call was begun earlier (an immediate call of simulated
ranks, the collectives for the other dtypes of a list), a difference breaks the group. It does so on
all ranks, whatever the timing, since the signature says whether a part has begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from mpidist.backends.node.comparison import CounterComparison, SignatureComparison
from mpidist.backends.node.counters import RING, ArrivalCounters
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
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Steps, StepsWork, Waiter, Work

__all__ = ["Arrival", "Condition", "ConditionSteps", "Sequencer", "Waiters", "conditions"]

T = TypeVar("T")

Waiters: TypeAlias = Callable[[], Waiter]
"""Makes the waiter of the operation that has begun: few operations wait long enough to need one."""

Refuse: TypeAlias = Callable[[int, Described, bool], Steps]
"""Returns the steps that raise `CollectiveMismatchError` on all ranks."""


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
        self._comparison = comparison or CounterComparison(counters, topology.local)
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

    def begin_blocking(self, signature: CallSignature, waiters: Waiters) -> int:
        """Begin an operation, the earlier ones being finished, and wait until all ranks have.

        Parameters
        ----------
        signature : CallSignature
            The signature of this rank's call.
        waiters : callable
            Makes the waiter of the call, where it has to wait longer.

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
            self._by_counters
            and (number <= self._free + RING or self._slot_free(number))
            and self.counters.arrive_and_compare(number, signature)
        ):
            return number
        self._begin_slowly(number, signature, waiters())
        return number

    def _begin_slowly(self, number: int, signature: CallSignature, waiter: Waiter) -> None:
        """Arrive at an operation, and wait until all ranks have with the same signature."""
        counters, comparison = self.counters, self._comparison
        if self._by_counters and not self._slot_free(number):
            waiter.wait_for(
                lambda: self._slot_free(number),
                missing=lambda: self._ranks(counters.unfinished(number - RING)),
            )
        comparison.arrive(number, signature)
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
        signature = signature_of(call, route, array)
        number = self.next_number()
        if not self.try_to_arrive(number, signature):
            yield Condition(
                lambda: self.try_to_arrive(number, signature),
                lambda: self._ranks(self.counters.unfinished(number - RING)),
            )
        yield Condition(lambda: self.all_arrived(number), lambda: self.missing(number))
        if not self._comparison.equal(number, signature):
            yield from self.mismatch_steps(number, describe_with_route(call, signature))
        return number

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

    def try_to_arrive(self, number: int, signature: CallSignature) -> bool:
        """Arrive at an operation unless an earlier one has still to arrive, or the ring is full."""
        if self._by_counters and (self._arrived < number - 1 or not self._slot_free(number)):
            return False
        self._comparison.arrive(number, signature)
        self._arrived = number
        return True

    def all_arrived(self, number: int) -> bool:
        """Whether all ranks have arrived, and the earlier operations are finished here."""
        return self.counters.finished == number - 1 and self._comparison.all_arrived(number)

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


class Arrival(Work[None]):
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

    def wait(self, timeout: float | None = None) -> None:
        """Wait without driving anything else."""
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


class Condition(Work[None]):
    """Complete when a condition holds.

    Parameters
    ----------
    condition : callable
        Polled; the work is complete when it returns True.
    missing : callable
        Returns the ranks that it waits for.
    """

    def __init__(self, condition: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        self.condition = condition
        self._missing = missing

    def done(self) -> bool:
        """Return whether the condition holds."""
        return self.condition()

    def missing(self) -> list[int]:
        """Return the ranks that it waits for."""
        return self._missing()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it holds, without driving anything else."""
        wait_until(self.condition, timeout=float("inf") if timeout is None else timeout)


ConditionSteps: TypeAlias = Generator[Condition, None, T]
"""An operation on the direct path, as a generator of the conditions that it waits for."""


def conditions(steps: Steps) -> ConditionSteps[None]:
    """Return other steps as conditions."""
    for work in steps:
        yield Condition(work.done, list)
