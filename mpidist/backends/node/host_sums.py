"""Blocking sums over the ranks of several nodes, each of which sends its own sum to the others.

There are two kinds. A short array travels with the arrival (`mpidist.backends.node.leaders`): the
leader of each node combines the arrays of its ranks, and sends that with the signature. A longer
one follows the arrival, in pieces. Either way arrays are combined in the order of the ranks of a
node, then of the nodes, so that all ranks have the same bits; and the caller's array is untouched
until all ranks have made the same call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np

from mpidist._types import MEAN, Array, ReduceOp
from mpidist.backends import algorithms
from mpidist.backends.algorithms import Lane, undivided
from mpidist.backends.combine import combination, combining, even_slices, quietly
from mpidist.backends.crossovers import Crossovers
from mpidist.backends.node.direct_path import (
    NodeContext,
    accumulation_dtype,
    sum_widely,
    write_result,
)
from mpidist.backends.node.leaders import HEADER_NBYTES, PAYLOAD_NBYTES
from mpidist.backends.node.registered_memory import Registry
from mpidist.backends.node.sequencer import Sequencer, Waiters
from mpidist.backends.node.signatures import ComparedCall, Route
from mpidist.backends.node.sums import PreparedSum, Sum, remember
from mpidist.backends.verbs import AllReduce
from mpidist.backends.work import ConditionSteps, Waiter, Work

__all__ = ["HostSums"]


class ShortHostSum(PreparedSum):
    """A sum that travels with the arrival, as its `Payload`.

    One message between two nodes; the leader reads the arrays of its node, the others its result.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        parts: list[memoryview],
        messages: list[Array],
        x: Array,
        op: ReduceOp,
        call: ComparedCall,
    ) -> None:
        super().__init__(sequencer, context, call, Route.ARRIVAL)
        self._wide = wide = accumulation_dtype(x.dtype)
        self._divisor = context.transport.size if op is MEAN else 1
        self._alone = len(parts) == 1
        self._nbytes = x.size * wide.itemsize
        self._combine = combination(undivided(op), wide)
        arrays = [np.frombuffer(part, np.uint8).reshape(2, -1)[:, : x.nbytes] for part in parts]
        self._inputs = [both[0].view(x.dtype) for both in arrays]
        self._result = arrays[0][1].view(x.dtype)
        self._wider = None if wide == x.dtype else np.empty(x.size, wide)
        nodes = [m[HEADER_NBYTES:][: self._nbytes].view(wide) for m in messages]
        if nodes:  # on a leader
            self._node = nodes[context.topology.node_of(context.transport.rank)]
            self._work = combining(nodes, undivided(op))
        self._x = self._out = self._result  # the caller's, while the leader is inside of a call

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer = self._sequencer
        if sequencer.begun != sequencer.counters.finished:
            sequencer.wait_for_earlier(waiters)
        if self._me:
            self._inputs[self._me][...] = x
            number = sequencer.begin_blocking(self._signature, waiters)
            out[...] = self._result
        else:
            self._x, self._out = x, out
            number = sequencer.begin_blocking(self._signature, waiters, self)
            self._x = self._out = self._result
        sequencer.counters.finish(number)

    def pack(self) -> int:
        """Combine the arrays of this node; see `Payload`."""
        node = self._node
        if self._alone:
            node[...] = self._x
        else:
            parts = [self._x, *self._inputs[1:]]
            if self._wider is not None:
                parts = [part.astype(self._wide) for part in parts]
            self._run(self._combine, parts, node)
        return self._nbytes

    def unpack(self) -> None:
        """Combine the arrays of all nodes; see `Payload`."""
        total = self._out if self._wider is None else self._wider
        self._run(*self._work, total)
        if self._divisor > 1:
            self._run(np.divide, total, self._divisor, total)
        if total is not self._out:
            self._run(np.copyto, self._out, total, "unsafe")
        if not self._alone:
            self._result[...] = self._out


class LongHostSum(PreparedSum):
    """A sum that follows the arrival, piece by piece.

    The ranks of a node copy a piece into memory that they share, but for the slices that they
    combine themselves; each worker combines its slice, all-reduces that with the workers of its
    local rank on the other nodes, and gives the result to its node. While some pieces are on their
    way, the next one is copied and combined: `_SLOTS` parts of the memory are used in turn.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        parts: list[memoryview],
        x: Array,
        op: ReduceOp,
        call: ComparedCall,
        lane_of: Callable[[int], int],
    ) -> None:
        super().__init__(sequencer, context, call, Route.SCRATCH)
        self._context = context
        self._lane_of = lane_of
        self._op = op
        self._wide = accumulation_dtype(x.dtype)
        self._step = _piece_nbytes(x.nbytes) // x.itemsize
        arrays = [
            np.frombuffer(part, np.uint8).view(x.dtype).reshape(2, _SLOTS, -1) for part in parts
        ]
        # By slot: what every rank gives, and what every worker has combined.
        self._given = [[both[0, slot] for both in arrays] for slot in range(_SLOTS)]
        self._results = [[both[1, slot] for both in arrays] for slot in range(_SLOTS)]

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer = self._sequencer
        sequencer.wait_for_earlier(waiters)
        number = sequencer.begin_blocking(self._signature, waiters)
        lane = self._context.between_nodes(self._lane_of(number))
        slots, step = range(_SLOTS), self._step
        given, received = (
            zip(cycle(slots), [flat[at : at + step] for at in range(0, x.size, step)], strict=False)
            for flat in (x, out)
        )
        combined = (self._combine(slot, piece, waiters) for slot, piece in given)

        def deliver(total: Array) -> None:
            self._hand_out(*next(received), total, waiters)

        op = undivided(self._op)
        for work in algorithms.pipelined_all_reduce(lane, combined, op, deliver):
            _complete(work, waiters)
        sequencer.counters.finish(number)

    def _combine(self, slot: int, x: Array, waiters: Waiters) -> Array:
        """Copy a piece, and return the sum of this rank's slice of it over the node."""
        topology, given = self._context.topology, self._given[slot]
        me, slices = topology.rank, even_slices(x.size, x.itemsize, topology.workers)
        for worker, part in enumerate(slices):
            if worker != me:
                given[me][part] = x[part]
        self._sequencer.phase_barrier(waiters)
        if me >= topology.workers:
            return np.empty(0, self._wide)
        own = slices[me]
        parts = [(x if rank == me else array)[own] for rank, array in enumerate(given)]
        total: Array = self._results[slot][me][: parts[me].size]
        if self._wide != x.dtype:
            total = np.empty(total.size, self._wide)
        quietly(sum_widely, parts, self._op, total)
        return total

    def _hand_out(self, slot: int, out: Array, total: Array, waiters: Waiters) -> None:
        """Give this rank's slice to the node, and copy the slices of all workers to `out`."""
        topology, results = self._context.topology, self._results[slot]
        me, slices = topology.rank, even_slices(out.size, out.itemsize, topology.workers)
        if me < topology.workers:
            targets = [out[slices[me]]]
            if total.dtype != out.dtype:
                targets.append(results[me][: total.size])
            quietly(write_result, total, self._op, self._context.transport.size, targets)
        self._sequencer.phase_barrier(waiters)
        for worker, part in enumerate(slices):
            if worker != me:
                out[part] = results[worker][: part.stop - part.start]


def _complete(work: Work[Any], waiters: Waiters) -> None:
    """Wait until messages are over."""
    if not work.done():
        waiters().wait_for(work.done, missing=work.missing)


class MessageHostSum(PreparedSum):
    """A sum on nodes of one rank each, that follows the arrival: by messages."""

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        op: ReduceOp,
        call: ComparedCall,
        lane_of: Callable[[int], int],
    ) -> None:
        super().__init__(sequencer, context, call, Route.MESSAGES)
        self._transport = context.transport
        self._lane_of = lane_of
        self._op = op

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer = self._sequencer
        sequencer.wait_for_earlier(waiters)
        number = sequencer.begin_blocking(self._signature, waiters)
        lane, size = Lane(self._transport, self._lane_of(number)), self._transport.size
        wide, step = accumulation_dtype(x.dtype), _piece_nbytes(x.nbytes) // x.itemsize
        under_way: deque[Array] = deque()

        def combined() -> Iterator[Array]:
            for start in range(0, x.size, step):
                under_way.append(piece := out[start : start + step])
                total = piece if wide == x.dtype else np.empty(piece.size, wide)
                quietly(sum_widely, [x[start : start + step]], self._op, total)
                yield total

        def deliver(total: Array) -> None:
            quietly(write_result, total, self._op, size, [under_way.popleft()])

        op = undivided(self._op)
        for work in algorithms.pipelined_all_reduce(lane, combined(), op, deliver):
            _complete(work, waiters)
        sequencer.counters.finish(number)


_BY_MESSAGES = 256 << 10
"""Bytes from which nodes of one rank each send messages of their own. On four hosts MPICH's
all-reduce over TCP is up to a tenth faster until 4 MiB, and a third slower from 16 MiB on."""

_PIECES, _LEAST_PIECE, _MOST_PIECE = 4, 256 << 10, 1 << 20
"""Into how many pieces an array is cut, and bytes of the shortest and of the longest one."""

_SLOTS = algorithms.AHEAD + 2
"""Pieces whose memory is in use: those on their way, and one that is made or handed out."""


def _piece_nbytes(nbytes: int) -> int:
    piece = min(max(nbytes // _PIECES, _LEAST_PIECE), _MOST_PIECE)
    return piece // 4096 * 4096


class HostSums:
    """The blocking all_reduces of a group on several nodes; as `NodeSums`.

    Parameters
    ----------
    sequencer : Sequencer
        The order of the group's operations.
    context : NodeContext
        The ranks.
    registered : Registry
        Knows the arrays that lie in shared memory, which need not be copied.
    parts : list of buffer
        Memory of each rank of this node, `2 * PAYLOAD_NBYTES`; that of its leader holds the result.
    messages : list of Array
        Those of the leaders, on a leader; see `mpidist.backends.node.leaders`.
    share : callable
        Returns memory of so many bytes of each rank of the node, or None; collective, blocks.
    lane_of : callable
        Returns the lane of the operation with a number.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        registered: Registry,
        parts: list[memoryview],
        messages: list[Array],
        share: Callable[[int, Waiter], list[memoryview] | None],
        lane_of: Callable[[int], int],
    ) -> None:
        self._sequencer = sequencer
        self._context = context
        self._registered = registered
        self._parts = parts
        self._messages = messages
        self._share = share
        self._lane_of = lane_of
        self._one_each = max(map(len, context.topology.nodes)) == 1
        self._short = PAYLOAD_NBYTES // (len(context.topology.nodes) - 1)
        self._kept: dict[Any, Sum] = {}
        self._scratch: list[memoryview] | None = None
        self._scratch_refused = False

    def take(self, sizes: Crossovers) -> None:
        """Do nothing: these sizes are those of one node."""

    def find(self, x: Array, op: ReduceOp) -> Sum | None:
        """Return the sum of `x` in place, if one like it has been prepared before."""
        if type(x) is not np.ndarray or x.ndim != 1 or not x.flags.carray:
            return None
        kept = self._kept.get((op, x.dtype, x.size))
        return None if kept is None or self._is_registered(x, x) else kept

    def prepared(self, call: AllReduce) -> Sum | None:
        """Return a sum if one like it has been prepared before; local, unlike `prepare`."""
        return None if self._is_registered(call.x, call.out) else self._kept.get(_key_of(call))

    def prepare(self, call: AllReduce, waiter: Waiter) -> Sum | None:
        """Return a sum, or None where another way is faster; collective."""
        if self._is_registered(call.x, call.out):
            return None
        kept = self.prepared(call)
        if kept is None:
            kept = self._make(call.x, call.op, waiter)
            if kept is not None:
                remember(self._kept, _key_of(call), kept)
        return kept

    def steps(self, call: AllReduce, waiter: Waiter) -> ConditionSteps[None] | None:
        """Return None: an immediate sum goes by messages, after the arrival."""
        return None

    def _is_registered(self, x: Array, out: Array) -> bool:
        """Whether it is too long for an arrival, and summed where it lies."""
        long = x is out and x.nbytes > self._short
        return long and self._registered.find(x) is not None

    def _make(self, x: Array, op: ReduceOp, waiter: Waiter) -> Sum | None:
        sequencer, context, lane_of = self._sequencer, self._context, self._lane_of
        if x.size * accumulation_dtype(x.dtype).itemsize <= self._short:
            return ShortHostSum(sequencer, context, self._parts, self._messages, x, op, waiter)
        if self._one_each:
            if x.nbytes < _BY_MESSAGES:
                return None
            return MessageHostSum(sequencer, context, op, waiter, lane_of)
        if self._scratch is None and not self._scratch_refused:
            sequencer.arrive(waiter, Route.SCRATCH)
            self._scratch = self._share(2 * _SLOTS * _MOST_PIECE, waiter)
            self._scratch_refused = self._scratch is None
        if self._scratch is None:
            return None
        parts = [part[: 2 * _SLOTS * _MOST_PIECE] for part in self._scratch]
        return LongHostSum(sequencer, context, parts, x, op, waiter, lane_of)


def _key_of(call: AllReduce) -> object:
    """Return what all like it have in common; `find` asks for flat arrays only."""
    key = (call.op, call.x.dtype, call.x.size)
    return key if call.shape == call.x.shape else (key, call.shape)
