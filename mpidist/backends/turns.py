"""Whose turn it is: the operations of one group on its board, first in, first out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from mpidist._types import Array
from mpidist.backends.agreement import Call, tell_difference
from mpidist.backends.meetings import RING, DirectBoard, Meetings, Record, Until
from mpidist.backends.neighbours import Neighbours
from mpidist.backends.work import Waiter
from mpidist.errors import CollectiveMismatchError

__all__ = ["Turns"]


class Turns:
    """The operations of a group that meet on a board, in the order of the calls.

    None does its work before those begun earlier are done here, so that the ranks need not agree on
    anything but the order of their calls. A blocking call has its turn by `open`, `enter` and
    `finish`; an immediate one by the same steps as a generator, which waits for nothing itself.

    Parameters
    ----------
    board : DirectBoard
        Where the ranks of this node meet.
    near : Neighbours
        Who they are.
    open_lane : callable
        Returns the number of the next lane, the same on all ranks.

    Attributes
    ----------
    finished : int
        Number of the last operation that is done here; all before it are, too.
    """

    def __init__(self, board: DirectBoard, near: Neighbours, open_lane: Callable[[], int]) -> None:
        self.board = board
        self.near = near
        self.open_lane = open_lane
        self.finished = 0
        self._begun = 0
        self._entered = 0
        self._free = 0
        self._stage = 0

    # -- a blocking call -------------------------------------------------------------------------

    def open(self, waiter: Waiter) -> int:
        """Return the number of a blocking operation, when all before it are done here."""
        self.open_lane()  # the lanes stay in step when the ranks disagree
        if self.finished != self._begun:
            waiter.wait_for(
                lambda: self.finished == self._begun,
                missing=lambda: self._ranks(self.board.absent(self.finished + 1)),
            )
        self._begun = number = self._begun + 1
        if not self._slot_free(number):
            waiter.wait_for(
                lambda: self._slot_free(number),
                missing=lambda: self._ranks(self.board.unfinished(number - RING)),
            )
        return number

    def enter(self, number: int, record: Record, waiter: Waiter) -> bool:
        """Come to an operation, wait for the others, and return whether all came with the same."""
        board = self.board
        board.enter(number, record)
        self._entered = number
        if not board.all_entered(number):
            waiter.wait_for(
                lambda: board.all_entered(number), missing=lambda: self._ranks(board.absent(number))
            )
        return board.same(number, record)

    def reach(self, waiter: Waiter) -> None:
        """Meet again inside an operation."""
        self._stage = stage = self._stage + 1
        board = self.board
        board.reach(stage)
        if not board.all_reached(stage):
            waiter.wait_for(
                lambda: board.all_reached(stage), missing=lambda: self._ranks(board.behind(stage))
            )

    def finish(self, number: int) -> None:
        """Be done with an operation."""
        # In this order: where another thread drives this one, the next may be over as soon as this
        # is finished here, and the number on the board must not go back.
        self.board.finish(number)
        self.finished = number

    def part(self, number: int, waiter: Waiter) -> None:
        """Be done with an operation, and wait until all of the node are."""
        self.finish(number)
        board = self.board
        if not board.all_finished(number):
            waiter.wait_for(
                lambda: board.all_finished(number),
                missing=lambda: self._ranks(board.unfinished(number)),
            )

    def refuse(self, number: int, call: Call, waiter: Waiter) -> NoReturn:
        """Raise the error that says who came with what."""
        records = self.board.records(number)
        self.part(number, waiter)
        raise self.difference(records, call)

    # -- the same for whoever drives the operation -----------------------------------------------

    def entering(self, record: Record) -> Meetings[int]:
        """Begin an operation, and return its number when it has its turn and all have come."""
        self._begun += 1
        number, board = self._begun, self.board
        if self._entered < number - 1 or not self._slot_free(number):
            yield Until(
                lambda: self._entered == number - 1 and self._slot_free(number),
                lambda: self._ranks(board.unfinished(number - RING)),
            )
        board.enter(number, record)
        self._entered = number
        yield Until(
            lambda: self.finished == number - 1 and board.all_entered(number),
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
        self.finish(number)
        board = self.board
        yield Until(
            lambda: board.all_finished(number), lambda: self._ranks(board.unfinished(number))
        )

    def difference(self, records: Sequence[Array], call: Call) -> CollectiveMismatchError:
        """Return the error that says who came with what."""
        near = self.near
        return CollectiveMismatchError(
            tell_difference(records, near.local, near.local[near.rank], call)
        )

    def _slot_free(self, number: int) -> bool:
        last = number - RING
        if last <= self._free:
            return True
        if self.finished < last or not self.board.all_finished(last):
            return False
        # No need to look again for the many operations that all have finished since.
        self._free = last
        return True

    def _ranks(self, places: list[int]) -> list[int]:
        return [self.near.local[place] for place in places]
