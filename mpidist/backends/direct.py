"""The direct path: collectives by way of memory that all ranks of a node share.

Arrays that lie there are worked on where they lie: nothing is packed, sent or received inside the
node. Each rank reads and writes the others' arrays between two meetings: at the first all have come
with their contribution, at the second all are done. Other arrays are summed by way of room that the
ranks keep there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpidist._types import MAX, Array
from mpidist.backends import algorithms, in_place
from mpidist.backends.agreement import Call, Way
from mpidist.backends.compared import BY_MESSAGES
from mpidist.backends.kernels import quiet
from mpidist.backends.meetings import Meetings, Until
from mpidist.backends.registered import Registry
from mpidist.backends.turns import Turns
from mpidist.backends.work import Steps

__all__ = ["Direct"]

_NOTHING = np.zeros(6, np.uint64)
"""What a rank tells the other nodes when its own does not agree."""


class Direct:
    """The collectives of one group by way of the memory that the ranks of each node share.

    Parameters
    ----------
    turns : Turns
        The order of its operations.
    transport : Exchanger
        Carries messages to other nodes.
    lane_of : callable
        Returns the lane of the operation with a number.
    """

    def __init__(
        self,
        turns: Turns,
        transport: algorithms.Exchanger,
        lane_of: Callable[[int], int],
    ) -> None:
        self.turns = turns
        self.team = in_place.Team(turns.near, transport, quiet())
        self._lane_of = lane_of

    def begin(
        self, verb: str, args: tuple[Any, ...], registered: Registry, least: int
    ) -> Meetings[None] | None:
        """Return the steps of a collective on which the ranks have to agree, else None."""
        call = Call.of(verb, args, registered, least)
        return None if call is None else self.plan(call, args)

    def plan(self, call: Call, args: tuple[Any, ...]) -> Meetings[None]:
        """Return the steps of a collective that the ranks have to agree on.

        Parameters
        ----------
        call : Call
            What this rank comes with.
        args : tuple
            The collective's arguments, as a transport gets them.

        Returns
        -------
        Meetings
            Where no rank's array is registered the call goes by messages when all have come, in a
            lane of its own: it may be immediate, see [Note: phases].
        """
        lane, team = self._next_lane(), self.team
        if call.place is None:
            everybody = algorithms.Lane(team.transport, lane)
            return self._elsewhere(call, lane, BY_MESSAGES[call.verb](everybody, *args))
        arrays = call.place.arrays
        if call.verb == "all_reduce":
            work = in_place.all_reduce(team, lane, call.place, call.op)
        elif call.verb == "reduce_scatter":
            work = in_place.reduce_scatter(team, lane, arrays, args[1], call.counts, call.op)
        elif call.verb == "all_gather":
            work = in_place.all_gather(team, lane, arrays, call.counts)
        else:
            work = in_place.broadcast(team, lane, arrays, call.root)
        return self._operate(call, lane, work)

    def meet(self, call: Call) -> Meetings[None]:
        """Return the steps of the first meeting alone, before a blocking call of the library."""
        return self._meet(call._replace(way=Way.LIBRARY), self._next_lane())

    def _next_lane(self) -> int:
        """Return the lane of the operation that begins next; the same on all ranks."""
        return self._lane_of(self.turns.begun + 1)

    def _operate(self, call: Call, lane: int, work: Steps) -> Meetings[None]:
        """Meet, work, meet."""
        number = yield from self._agree(call, lane)
        yield from _phases(work)
        yield from self.turns.parting(number)

    def _elsewhere(self, call: Call, lane: int, steps: Steps) -> Meetings[None]:
        """Meet, and go by messages."""
        yield from self._meet(call, lane)
        yield from _phases(steps)

    def _meet(self, call: Call, lane: int) -> Meetings[None]:
        number = yield from self._agree(call, lane)
        self.turns.board.finish(number)

    def _agree(self, call: Call, lane: int) -> Meetings[int]:
        """Meet, and return the operation's number if all came with the same."""
        turns, board, record = self.turns, self.turns.board, call.record()
        number = yield from turns.entering(record)
        if not board.same(number, record):
            records = board.records(number)
            if not self.team.alone:
                # The other nodes wait for what this one says.
                yield from self._agree_across(_NOTHING, lane)
            yield from turns.parting(number)
            raise turns.difference(records, call.counts)
        if not self.team.alone:
            if not (yield from self._agree_across(record.words[:6], lane)):
                board.object(number)
            yield from turns.reaching()
            if board.objected(number):
                records = board.records(number)
                yield from turns.parting(number)
                raise turns.difference(records, call.counts)
        return number

    def _agree_across(self, numbers: Array, lane: int) -> Meetings[bool]:
        """Return whether the worker in this place on every node came with the same record."""
        across = self.team.across(lane)
        if across is None:
            return True
        extremes = np.concatenate([numbers, ~numbers])
        greatest = np.empty_like(extremes)
        yield from _phases(
            algorithms.recursive_doubling_all_reduce(across, extremes, greatest, MAX)
        )
        return bool((greatest == extremes).all())


def _phases(steps: Steps) -> Meetings[None]:
    """Wait for each phase as for a meeting."""
    for phase in steps:
        yield Until(phase.done, list)
