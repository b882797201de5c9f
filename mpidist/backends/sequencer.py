"""The collectives of one group in the order of the calls, compared before any hands out a result.

[Note: comparison] Every collective on host arrays, blocking or immediate, comes here once, in the
order of the calls, and gets the next number. The ranks make known what they call. When all have
come to a number they compare their calls, and only then is a result handed out: a collective is
complete on no rank before all have called it. Where all ranks of the group share memory they
compare on a board there, else by an all-reduce of 32 bytes; see `mpidist.backends.comparison`.

A blocking call is compared before its first byte moves, so that a difference leaves the group
usable. An immediate call that the MPI library performs is under way by then: a difference breaks
the group. It does so on all ranks, whatever the timing, since all see whether any has begun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from mpidist.backends.comparison import BoardComparison, Comparison
from mpidist.backends.meetings import RING, DirectBoard, Meetings, Record, Until, phases
from mpidist.backends.neighbours import Neighbours
from mpidist.backends.registered import Place
from mpidist.backends.signatures import Described, Route, Signature
from mpidist.backends.work import Steps, Waiter

__all__ = ["Sequencer", "Waiters"]

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
    comparison : Comparison
        How the ranks of the group compare their calls.
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
                missing=lambda: self._missing(self.board.finished + 1),
            )

    def arrive(self, signature: Signature, route: Route, waiters: Waiters) -> None:
        """Wait until all ranks have come to a call, and compare it; it needs no shared memory."""
        self.settle(waiters)
        number = self.enter(signature.record(route), waiters)
        self.board.finish(number)

    def enter(self, record: Record, waiters: Waiters) -> int:
        """Begin an operation when all before are done here, and wait until all have come to it.

        Parameters
        ----------
        record : Record
            What the ranks compare.
        waiters : callable
            Makes what waits; it knows the signature of the call.

        Returns
        -------
        int
            Its number.

        Raises
        ------
        CollectiveMismatchError
            If they came with different records.
        """
        board, comparison = self.board, self._comparison
        self.begun = self._entered = number = self.begun + 1
        if self._on_board:
            if number > self._free + RING and not self._slot_free(number):
                waiters().wait_for(
                    lambda: self._slot_free(number),
                    missing=lambda: self._ranks(board.unfinished(number - RING)),
                )
            if board.meet(number, record) and record.balance is None:
                return number
        else:
            comparison.enter(number, record)
        waiter = waiters()
        waiter.wait_for(lambda: comparison.arrived(number), missing=lambda: self._missing(number))
        if not comparison.equal(number, record):
            for until in self._differing(number, waiter.signature.described(record)):
                waiter.wait_for(until.condition, missing=until.missing)
        return number

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
        self.begun += 1
        number, board, comparison = self.begun, self.board, self._comparison
        record = signature.record(route, place)
        if self._on_board and (self._entered < number - 1 or not self._slot_free(number)):
            yield Until(
                lambda: self._entered == number - 1 and self._slot_free(number),
                lambda: self._ranks(board.unfinished(number - RING)),
            )
        comparison.enter(number, record)
        self._entered = number
        yield Until(
            lambda: board.finished == number - 1 and comparison.arrived(number),
            lambda: self._missing(number),
        )
        if not comparison.equal(number, record):
            yield from self._differing(number, signature.described(record))
        return number

    def comparing(self, signature: Signature, route: Route) -> Meetings[None]:
        """Arrive with an immediate call that needs no shared memory, and compare it."""
        number = yield from self.entering(signature, route)
        self.board.finish(number)

    def parting(self, number: int) -> Meetings[None]:
        """Be done with an operation, and wait until all of the node are."""
        board = self.board
        board.finish(number)
        yield Until(
            lambda: board.all_finished(number), lambda: self._ranks(board.unfinished(number))
        )

    def _differing(self, number: int, described: Described) -> Meetings[None]:
        """Raise on all ranks what they have called."""
        usable = not self._comparison.breaks(number)
        # All have to have read what the others came with before anybody writes over it.
        yield from self.parting(number)
        yield from phases(self._refuse(number, described, usable))

    # -- who and whether -------------------------------------------------------------------------

    def _slot_free(self, number: int) -> bool:
        """Whether nobody needs any more what stands where this operation's record will."""
        last = number - RING
        if last > self._free:
            self._free = self.board.least_finished()
        return last <= self._free

    def _missing(self, number: int) -> list[int]:
        return self._ranks(self._comparison.missing(number))

    def _ranks(self, places: list[int]) -> list[int]:
        return [self.near.local[place] for place in places]
