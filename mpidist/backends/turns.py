"""Whose turn it is: the operations of one group on its board, first in, first out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from mpidist._types import Array
from mpidist.backends.agreement import tell_difference
from mpidist.backends.meetings import RING, DirectBoard, Meetings, Record, Until
from mpidist.backends.neighbours import Neighbours
from mpidist.backends.work import Waiter
from mpidist.errors import CollectiveMismatchError

__all__ = ["Turns", "Waiters"]


Waiters: TypeAlias = Callable[[], Waiter]
"""Makes the waiter of the operation that has begun: few have to wait for so long."""


class Turns:
    """The operations of a group that meet on a board, in the order of the calls.

    None does its work before those begun earlier are done here, so that the ranks need not agree on
    anything but the order of their calls. A blocking call has its turn by `settle` and `enter`, and
    ends by `part`, or by the board's `finish`; an immediate one by the same steps as a generator,
    which waits for nothing itself.

    Parameters
    ----------
    board : DirectBoard
        Where the ranks of this node meet.
    near : Neighbours
        Who they are.

    Attributes
    ----------
    begun : int
        Number of the last operation that this rank has begun.
    """

    def __init__(self, board: DirectBoard, near: Neighbours) -> None:
        self.board = board
        self.near = near
        self.begun = 0
        self._entered = 0
        self._free = 0
        self._stage = 0

    # -- a blocking call -------------------------------------------------------------------------

    def settle(self, waiters: Waiters) -> None:
        """Wait until all operations that were begun before are done here."""
        if self.board.finished != self.begun:
            waiters().wait_for(
                lambda: self.board.finished == self.begun,
                missing=lambda: self._ranks(self.board.absent(self.board.finished + 1)),
            )

    def enter(self, record: Record, waiters: Waiters) -> int:
        """Begin an operation when all before are done here, and wait until all have come to it.

        Returns
        -------
        int
            Its number.

        Raises
        ------
        CollectiveMismatchError
            If they came with different records.
        """
        board = self.board
        self.begun = self._entered = number = self.begun + 1
        if number > self._free + RING and not self._slot_free(number):
            waiters().wait_for(
                lambda: self._slot_free(number),
                missing=lambda: self._ranks(board.unfinished(number - RING)),
            )
        if board.meet(number, record):
            return number
        waiters().wait_for(
            lambda: board.all_entered(number), missing=lambda: self._ranks(board.absent(number))
        )
        if not board.same(number, record):
            records = board.records(number)
            self.part(number, waiters)
            raise self.difference(records)
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

    def entering(self, record: Record) -> Meetings[int]:
        """Begin an operation, and return its number when it has its turn and all have come."""
        self.begun += 1
        number, board = self.begun, self.board
        if self._entered < number - 1 or not self._slot_free(number):
            yield Until(
                lambda: self._entered == number - 1 and self._slot_free(number),
                lambda: self._ranks(board.unfinished(number - RING)),
            )
        board.enter(number, record)
        self._entered = number
        yield Until(
            lambda: self.board.finished == number - 1 and board.all_entered(number),
            lambda: self._ranks(board.absent(number)),
        )
        return number

    def reaching(self) -> Meetings[None]:
        """Meet again inside an operation."""
        self._stage = stage = self._stage + 1
        board = self.board
        board.reach(stage)
        yield Until(lambda: board.all_reached(stage), lambda: self._ranks(board.behind(stage)))

    def parting(self, number: int) -> Meetings[None]:
        """Be done with an operation, and wait until all of the node are."""
        board = self.board
        board.finish(number)
        yield Until(
            lambda: board.all_finished(number), lambda: self._ranks(board.unfinished(number))
        )

    def difference(
        self, records: Sequence[Array], counts: Sequence[int] = ()
    ) -> CollectiveMismatchError:
        """Return the error that says who came with what; this rank with these counts."""
        near = self.near
        return CollectiveMismatchError(tell_difference(records, near.local, near.rank, counts))

    def _slot_free(self, number: int) -> bool:
        """Whether nobody needs any more what stands where this operation's record will."""
        last = number - RING
        if last > self._free:
            self._free = self.board.least_finished()
        return last <= self._free

    def _ranks(self, places: list[int]) -> list[int]:
        return [self.near.local[place] for place in places]
