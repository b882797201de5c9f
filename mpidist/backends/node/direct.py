"""The direct path: collectives by way of memory that all ranks of a node share.

Arrays that lie there are worked on where they lie: nothing is packed, sent or received inside the
node. Each rank reads and writes the others' arrays between two meetings: at the first all have come
with their contribution, at the second all are done. Other arrays are summed by way of room that the
ranks keep there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpidist.backends import algorithms
from mpidist.backends.combine import quiet
from mpidist.backends.node import in_place
from mpidist.backends.node.meetings import Meetings, phases
from mpidist.backends.node.registered import Place
from mpidist.backends.node.sequencer import Sequencer
from mpidist.backends.node.signatures import Route, Signature
from mpidist.backends.work import Steps

__all__ = ["Direct"]


class Direct:
    """The collectives of one group by way of the memory that the ranks of each node share.

    Parameters
    ----------
    sequencer : Sequencer
        The order of its operations.
    transport : Exchanger
        Carries messages to other nodes.
    lane_of : callable
        Returns the lane of the operation with a number.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        transport: algorithms.Exchanger,
        lane_of: Callable[[int], int],
    ) -> None:
        self.sequencer = sequencer
        self.team = in_place.Team(sequencer.near, transport, quiet())
        self._lane_of = lane_of

    def plan(
        self, verb: str, args: tuple[Any, ...], signature: Signature, place: Place
    ) -> Meetings[None]:
        """Return the steps of a collective on registered memory: meet, work, meet."""
        # The number of the operation that begins next; the same on all ranks.
        lane, team, arrays = self._lane_of(self.sequencer.begun + 1), self.team, place.arrays
        if verb == "all_reduce":
            work = in_place.all_reduce(team, lane, place, args[2])
        elif verb == "reduce_scatter":
            work = in_place.reduce_scatter(team, lane, arrays, *args[1:])
        elif verb == "all_gather":
            work = in_place.all_gather(team, lane, arrays, args[2])
        else:
            work = in_place.broadcast(team, lane, arrays, args[1])
        return self._operate(signature, place, work)

    def _operate(self, signature: Signature, place: Place, work: Steps) -> Meetings[None]:
        sequencer = self.sequencer
        number = yield from sequencer.entering(signature, Route.REGISTERED, place)
        yield from phases(work)
        yield from sequencer.parting(number)
