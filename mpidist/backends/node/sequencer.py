"""The collectives of one group in the order of the calls, compared before any hands out a result.

[Note: comparison] Every collective on host arrays, blocking or immediate, comes here once, in the
order of the calls, and gets the next number. The ranks make known what they call. When all have
come to a number they compare their calls, and only then is a result handed out: a collective is
complete on no rank before all have called it. Where all ranks of the group share memory they
compare on a board there, else by an all-reduce of 32 bytes; see `mpidist.backends.node.comparison`.

A collective on host arrays over MPI begins when the calls have been compared, so that a difference
leaves the group usable. What was begun before (an immediate call of simulated ranks, the
collectives for the other dtypes of a list) makes a difference break the group. It does so on all
ranks, whatever the timing, since all see whether any has begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from mpidist.backends.node.comparison import BoardComparison, Comparison
from mpidist.backends.node.counters import RING, DirectBoard
from mpidist.backends.node.registered_memory import Place
from mpidist.backends.node.signatures import (
    Described,
    Record,
    Route,
    Signature,
    describe_with_route,
    record_of,
)
from mpidist.backends.node.topology import Neighbours
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Steps, StepsWork, Waiter, Work

__all__ = ["Arrival", "Meetings", "Sequencer", "Until", "Waiters", "phases"]

T = TypeVar("T")

Waiters: TypeAlias = Callable[[], Waiter]
"""Makes the waiter of the operation that has begun: few have to wait for so long."""

Refuse: TypeAlias = Callable[[int, Described, bool], Steps]
"""Steps that raise on all ranks what they have called; see `MpiBackend._refuse`."""


class Sequencer:
    """The collectives of a group: first in, first out.

    None does its work before those begun earlier are done here, so that the ranks need not agree on
    anything but the order of their calls. A blocking call has its turn by `settle` and `enter`, and
    ends by `part`, or by the board's `finish`; an immediate one by the same steps as a generator,
    which waits for nothing itself.

    Parameters
    ----------
    board : DirectBoard
        Where the ranks of this node meet; of this rank alone where they share no memory.
    near : Neighbours
        Who they are.
    comparison : Comparison or None
        How the ranks of the group compare their calls; None if all of them are on the board.
    refuse : callable
        Makes the steps that raise the error of a difference.

    Attributes
    ----------
    begun : int
        Number of the last operation that this rank has begun.
    """

    def __init__(
        self,
        board: DirectBoard,
        near: Neighbours,
        comparison: Comparison | None,
        refuse: Refuse,
    ) -> None:
        self.board = board
        self.near = near
        self.begun = 0
        # On a board that all share, most blocking calls meet within a few microseconds.
        self._on_board = comparison is None
        self._comparison = BoardComparison(board) if comparison is None else comparison
        self._refuse = refuse
        self._entered = 0
        self._free = 0
        self._stage = 0

    # -- a blocking call -------------------------------------------------------------------------

    def settle(self, waiters: Waiters) -> None:
        """Wait until all operations that were begun before are done here."""
        if self.board.finished != self.begun:
            waiters().wait_for(
                lambda: self.board.finished == self.begun,
                missing=lambda: self.missing(self.board.finished + 1),
            )

    def arrive(self, waiter: Waiter, route: Route) -> None:
        """Wait until all ranks have come to a call, and compare it; it needs no shared memory."""

        def waiters() -> Waiter:
            return waiter

        self.settle(waiters)
        record = record_of(waiter, route)
        number = self.enter(record, waiters)
        if self._on_board and record.balance is not None:
            self._check(number, record, waiter)
        self.board.finish(number)

    def enter(self, record: Record, waiters: Waiters) -> int:
        """Begin an operation when all before are done here, and wait until all have come to it.

        Parameters
        ----------
        record : Record
            What the ranks compare.
        waiters : callable
            Makes what waits, and has the signature of the call.

        Returns
        -------
        int
            Its number.

        Raises
        ------
        CollectiveMismatchError
            If they came with different records.
        """
        # As short as it can be: this is part of every small sum.
        self.begun = self._entered = number = self.begun + 1
        if (
            self._on_board
            and (number <= self._free + RING or self._slot_free(number))
            and self.board.meet(number, record)
        ):
            return number
        self._enter(number, record, waiters())
        return number

    def _enter(self, number: int, record: Record, waiter: Waiter) -> None:
        """Enter an operation, and wait until all ranks have come to it with the same."""
        board, comparison = self.board, self._comparison
        if self._on_board and not self._slot_free(number):
            waiter.wait_for(
                lambda: self._slot_free(number),
                missing=lambda: self._ranks(board.unfinished(number - RING)),
            )
        comparison.enter(number, record)
        waiter.wait_for(lambda: comparison.arrived(number), missing=lambda: self.missing(number))
        self._check(number, record, waiter)

    def _check(self, number: int, record: Record, waiter: Waiter) -> None:
        """Raise on all ranks if they came to an operation with different calls."""
        if not self._comparison.equal(number, record):
            for until in self.differing(number, describe_with_route(waiter, record)):
                waiter.wait_for(until.condition, missing=until.missing)

    def reach(self, waiters: Waiters) -> None:
        """Meet again inside an operation."""
        self._stage = stage = self._stage + 1
        board = self.board
        board.reach(stage)
        if not board.soon_reached(stage):
            waiters().wait_for(
                lambda: board.all_reached(stage), missing=lambda: self._ranks(board.behind(stage))
            )

    def part(self, number: int, waiters: Waiters) -> None:
        """Be done with an operation, and wait until all of the node are."""
        board = self.board
        board.finish(number)
        if not board.soon_finished(number):
            waiters().wait_for(
                lambda: board.all_finished(number),
                missing=lambda: self._ranks(board.unfinished(number)),
            )

    # -- the same for whoever drives the operation -----------------------------------------------

    def entering(
        self, signature: Signature, route: Route, place: Place | None = None
    ) -> Meetings[int]:
        """Begin an operation, and return its number when it has its turn and all have come."""
        record = record_of(signature, route, place)
        number = self.begin()
        if not self.try_to_enter(number, record):
            yield Until(
                lambda: self.try_to_enter(number, record),
                lambda: self._ranks(self.board.unfinished(number - RING)),
            )
        yield Until(lambda: self.has_met(number), lambda: self.missing(number))
        if not self._comparison.equal(number, record):
            yield from self.differing(number, describe_with_route(signature, record))
        return number

    def compare(self, signature: Signature, route: Route, *, begun: bool = False) -> Arrival:
        """Arrive with an immediate call that needs no shared memory, and compare it.

        Parameters
        ----------
        signature, route, begun
            Of the call; see `record_of`.

        Returns
        -------
        Arrival
            Complete when all ranks have come with the same call. Whoever gets it has to poll it:
            later operations wait for it.
        """
        return Arrival(self, signature, record_of(signature, route, begun=begun))

    def parting(self, number: int) -> Meetings[None]:
        """Be done with an operation, and wait until all of the node are."""
        board = self.board
        board.finish(number)
        yield Until(
            lambda: board.all_finished(number), lambda: self._ranks(board.unfinished(number))
        )

    def equal(self, number: int, record: Record) -> bool:
        """Whether all ranks came to an operation with the same; asked once, when they have met."""
        return self._comparison.equal(number, record)

    def differing(self, number: int, described: Described) -> Meetings[None]:
        """Raise on all ranks what they have called."""
        usable = not self._comparison.breaks(number)
        # All have to have read what the others came with before anybody writes over it.
        yield from self.parting(number)
        yield from phases(self._refuse(number, described, usable))

    # -- the same, one step at a time ------------------------------------------------------------

    def begin(self) -> int:
        """Return the number of the operation that begins now."""
        self.begun += 1
        return self.begun

    def try_to_enter(self, number: int, record: Record) -> bool:
        """Make known that this rank has come to an operation, if its turn to do so has come."""
        if self._on_board and (self._entered < number - 1 or not self._slot_free(number)):
            return False
        self._comparison.enter(number, record)
        self._entered = number
        return True

    def has_met(self, number: int) -> bool:
        """Whether all ranks have come to an operation, and those before it are done here."""
        return self.board.finished == number - 1 and self._comparison.arrived(number)

    # -- who and whether -------------------------------------------------------------------------

    def _slot_free(self, number: int) -> bool:
        """Whether nobody needs any more what stands where this operation's record will."""
        last = number - RING
        if last > self._free:
            self._free = self.board.least_finished()
        return last <= self._free

    def missing(self, number: int) -> list[int]:
        """Return the ranks that have not come to an operation, as far as is known."""
        return self._ranks(self._comparison.missing(number))

    def _ranks(self, places: list[int]) -> list[int]:
        return [self.near.local[place] for place in places]


class Arrival(Work[None]):
    """An immediate call that is compared, and needs no shared memory besides.

    A class of its own, not steps: most immediate calls are compared so.

    Parameters
    ----------
    sequencer : Sequencer
        Of the group.
    signature, record : Signature, Record
        Of the call.
    """

    def __init__(self, sequencer: Sequencer, signature: Signature, record: Record) -> None:
        self._sequencer = sequencer
        self._signature = signature
        self._record = record
        self._number = number = sequencer.begin()
        self._entered = sequencer.try_to_enter(number, record)
        self._over = False
        self._differing: StepsWork | None = None
        self._driven = threading.Lock()

    def done(self) -> bool:
        """Poll; raises `CollectiveMismatchError` if the ranks came with different calls."""
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
        if self._differing is not None:
            return self._differing.done()
        sequencer, number, record = self._sequencer, self._number, self._record
        if not self._entered:
            self._entered = sequencer.try_to_enter(number, record)
        if not self._entered or not sequencer.has_met(number):
            return False
        if sequencer.equal(number, record):
            sequencer.board.finish(number)
            self._over = True
            return True
        described = describe_with_route(self._signature, record)
        self._differing = StepsWork(sequencer.differing(number, described))
        return False

    def missing(self) -> Sequence[int]:
        """Return the ranks that have not come, as far as is known."""
        if self._differing is not None:  # all have come; what they came with may be gone
            return self._differing.missing()
        return () if self._over else self._sequencer.missing(self._number)

    def wait(self, timeout: float | None = None) -> None:
        """Wait without driving anything else."""
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


class Until(Work[None]):
    """Complete when a condition holds.

    Parameters
    ----------
    condition : callable
        Polled.
    missing : callable
        Returns the ranks that keep it from holding.
    """

    def __init__(self, condition: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        self.condition = condition
        self._missing = missing

    def done(self) -> bool:
        """Return whether the condition holds."""
        return self.condition()

    def missing(self) -> list[int]:
        """Return the ranks that keep it from holding."""
        return self._missing()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it holds, without driving anything else."""
        wait_until(self.condition, timeout=float("inf") if timeout is None else timeout)


Meetings: TypeAlias = Generator[Until, None, T]
"""Steps of an operation on the direct path: it yields each meeting that it has to wait for."""


def phases(steps: Steps) -> Meetings[None]:
    """Wait for each phase of an operation as for a meeting."""
    for phase in steps:
        yield Until(phase.done, list)
