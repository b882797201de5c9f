"""Sums over the ranks of one node by way of the memory that they share.

There are three kinds, by whether the array is registered and by its size; an immediate sum of a
short ordinary array is of the first kind, too. All combine in rank order. A program repeats the
same few calls, and the shortest take microseconds: what can be prepared is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from mpidist._types import Array, DType, ReduceOp
from mpidist.backends.combine import combination, combining, even_slices, quietly
from mpidist.backends.crossovers import Crossovers
from mpidist.backends.node.direct_path import NodeContext, prepare_all_reduce
from mpidist.backends.node.registered_memory import RegisteredArray, Registry
from mpidist.backends.node.sequencer import SMALL_NBYTES, Sequencer, Waiters
from mpidist.backends.node.signatures import ComparedCall, Route, signature_of
from mpidist.backends.verbs import AllReduce
from mpidist.backends.work import Condition, ConditionSteps, Waiter
from mpidist.observe.recorder import Name

__all__ = ["NodeSums", "PreparedSum", "Sum", "Sums", "remember"]

K = TypeVar("K")
V = TypeVar("V")

_ALL_CHUNKS, _SHORTEST_CHUNK = 2 << 20, 256 << 10
"""Bytes of an ordinary array that are summed at a time, by all ranks together and at least by each.

Long enough to lie in a cache that cores share when others read it, short enough to stay there; the
more ranks, the less memory for each.
"""

_SKEW = 2048
"""Bytes between the beginning of a page and that of the scratch buffer in it.

Arrays begin at the beginning of a page, or a few bytes behind it, and copying from one to another
that is a little ahead of it modulo 4096 is several times slower: processors compare these 12 bits
of the addresses alone (4K aliasing; Fog, The microarchitecture of Intel, AMD and VIA CPUs, sections
on store forwarding).
"""

_PAGE = 4096
"""The second of two halves must begin as far behind a page as the first, and as well aligned."""

_REMEMBERED = 256
"""Calls of each kind whose preparations are kept."""


class Sum(Protocol):
    """A blocking all_reduce of one kind of array, prepared.

    Attributes
    ----------
    name : Name or None
        Its name in the recorder; None until it has been recorded once.
    """

    name: Name | None

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine `x` of all ranks into `out`, which may be `x`."""


class Sums(Protocol):
    """The all_reduces of a group that need neither the library nor messages in lanes."""

    def take(self, sizes: Crossovers) -> None:
        """Choose the kind of sum by these sizes from now on; the same on all ranks."""

    def find(self, x: Array, op: ReduceOp) -> Sum | None:
        """Return the sum of `x` in place, if one like it has been prepared before."""

    def prepared(self, call: AllReduce) -> Sum | None:
        """Return a sum if one like it has been prepared before; local, unlike `prepare`."""

    def prepare(self, call: AllReduce, waiter: Waiter) -> Sum | None:
        """Return a sum, or None where another way is faster; collective."""

    def steps(self, call: AllReduce, waiter: Waiter) -> ConditionSteps[None] | None:
        """Return the steps of an immediate sum of at most `SMALL_NBYTES`, or None for messages."""


class PreparedSum:
    """What the kinds share, those over several nodes, too.

    Parameters
    ----------
    sequencer : Sequencer
        The order of the group's operations.
    context : NodeContext
        The ranks.
    call : ComparedCall
        The call of this rank; all like it have the same signature.
    route : Route
        The kind.
    array : RegisteredArray, optional
        The registered array, of a sum of one.
    """

    name: Name | None = None

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        call: ComparedCall,
        route: Route,
        array: RegisteredArray | None = None,
    ) -> None:
        self._sequencer = sequencer
        self._run: Callable[..., None] = context.silent_context.run
        self._me = context.topology.rank
        self._signature = signature_of(call, route, array)


class SmallSum(PreparedSum):
    """Each rank publishes its array together with its arrival, and combines all arrays itself.

    One barrier; p arrays read per rank.

    [Note: two halves] A rank may write its next array while others still read this one, so there
    are two buffers. No more are needed: no rank passes the arrival at the next sum before all ranks
    have arrived there, and a rank that has arrived there no longer reads this one.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        buffers: _Buffers,
        x: Array,
        op: ReduceOp,
        call: ComparedCall,
    ) -> None:
        super().__init__(sequencer, context, call, Route.ARRIVAL)
        self._buffers = buffers
        halves = [buffers.arrays(half, x.dtype, x.size) for half in (0, 1)]
        self._own = [parts[self._me] for parts in halves]
        self._work = [combining(parts, op) for parts in halves]

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer, buffers = self._sequencer, self._buffers
        if sequencer.begun != sequencer.counters.finished:
            sequencer.wait_for_earlier(waiters)
        half = buffers.half
        self._own[half][...] = x
        number = sequencer.begin_blocking(self._signature, waiters)
        buffers.half = 1 - half
        self._run(*self._work[half], out)
        sequencer.counters.finish(number)

    def steps(self, x: Array, out: Array, call: ComparedCall) -> ConditionSteps[None]:
        """Combine as an immediate operation; `call` is this rank's."""
        sequencer, buffers, signature = self._sequencer, self._buffers, self._signature
        number = sequencer.next_number()
        if not sequencer.earlier_finished(number):  # else a half may still be read
            yield Condition(
                lambda: sequencer.earlier_finished(number), lambda: sequencer.missing(number - 1)
            )
        half = buffers.half
        self._own[half][...] = x
        yield from sequencer.arrive_steps(number, call, signature)
        buffers.half = 1 - half
        quietly(*self._work[half], out)
        sequencer.counters.finish(number)


class RegisteredSum(PreparedSum):
    """Sums arrays in registered memory in place.

    Two barriers; see `direct_path.all_reduce`. The registered array refers to this object, so this
    object does not refer to it: a cycle would keep the memory until the garbage collector runs.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        array: RegisteredArray,
        op: ReduceOp,
        call: ComparedCall,
    ) -> None:
        super().__init__(sequencer, context, call, Route.REGISTERED, array)
        self._work = prepare_all_reduce(context, array, op)

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer = self._sequencer
        sequencer.wait_for_earlier(waiters)
        number = sequencer.begin_blocking(self._signature, waiters)
        self._run(*self._work)
        sequencer.finish_together(number, waiters)


class ScratchSum(PreparedSum):
    """Sums ordinary arrays by way of scratch buffers in shared memory.

    For each chunk a rank copies the slices that the others combine into its buffer, combines its
    own slice, and copies the others' results: 2 barriers, and 2 (p - 1) / p of the array copied in
    and out. Two halves of the buffer are used in turn, see [Note: two halves].
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        buffers: _Buffers,
        x: Array,
        op: ReduceOp,
        call: ComparedCall,
    ) -> None:
        super().__init__(sequencer, context, call, Route.SCRATCH)
        self._buffers = buffers
        self._combine = combination(op, x.dtype)
        self._step = buffers.nbytes // x.itemsize
        self._chunks: dict[tuple[int, int], _Chunk] = {}

    def run(self, x: Array, out: Array, waiters: Waiters) -> None:
        """Combine; see `Sum`."""
        sequencer, buffers, step = self._sequencer, self._buffers, self._step
        sequencer.wait_for_earlier(waiters)
        number = 0
        for start in range(0, x.size, step):
            inputs, result = x[start : start + step], out[start : start + step]
            chunk = self._chunk(inputs)
            for part, buffer in chunk.inputs:
                buffer[...] = inputs[part]
            if start:
                sequencer.phase_barrier(waiters)
            else:
                number = sequencer.begin_blocking(self._signature, waiters)
            buffers.half ^= 1
            own, total = inputs[chunk.own], result[chunk.own]
            if x is out and self._me > 1:
                # It is added third or later, when the sum of the first two has overwritten it.
                own = own.copy()
            # Straight into the result, which is in this core's cache; the buffer may not be.
            self._run(self._combine, [*chunk.before, own, *chunk.after], total)
            chunk.result[...] = total
            sequencer.phase_barrier(waiters)
            for part, buffer in chunk.results:
                result[part] = buffer
        sequencer.counters.finish(number)

    def _chunk(self, inputs: Array) -> _Chunk:
        """Return the slices of every rank's buffer for a chunk, in the current half."""
        key = (self._buffers.half, inputs.size)
        return self._chunks.get(key) or remember(self._chunks, key, self._cut(inputs))

    def _cut(self, inputs: Array) -> _Chunk:
        me, buffers = self._me, self._buffers.arrays(self._buffers.half, inputs.dtype, inputs.size)
        slices = even_slices(inputs.size, inputs.itemsize, len(buffers))
        others = [rank for rank in range(len(buffers)) if rank != me]
        own = slices[me]
        return _Chunk(
            own,
            [(slices[rank], buffers[me][slices[rank]]) for rank in others],
            [buffer[own] for buffer in buffers[:me]],
            [buffer[own] for buffer in buffers[me + 1 :]],
            buffers[me][own],
            [(slices[rank], buffers[rank][slices[rank]]) for rank in others],
        )


class _Chunk(NamedTuple):
    """Buffers for a chunk of an ordinary array, cut into one slice per rank.

    Attributes
    ----------
    own : slice
        The elements that this rank combines.
    inputs : list of (slice, Array)
        The elements that each other rank combines, and this rank's buffer for them.
    before, after : list of Array
        The buffers of lower and of higher ranks with the elements that this rank combines.
    result : Array
        This rank's buffer for what it has combined, read by the others.
    results : list of (slice, Array)
        The elements that each other rank combines, and its buffer with the result.
    """

    own: slice
    inputs: list[tuple[slice, Array]]
    before: list[Array]
    after: list[Array]
    result: Array
    results: list[tuple[slice, Array]]


class _Buffers:
    """A buffer of every rank, in two halves that are used in turn.

    Parameters
    ----------
    parts : sequence of buffer
        Shared memory of each rank, at least `skew + 2 * nbytes` bytes.
    nbytes : int
        Bytes of one half: the largest array.
    skew : int, optional
        Bytes that are left out at the beginning.

    Attributes
    ----------
    half : int
        The half to be used next, the same on all ranks: 0 or 1.
    """

    def __init__(self, parts: Sequence[memoryview], nbytes: int, skew: int = 0) -> None:
        self._parts = [np.frombuffer(part, np.uint8) for part in parts]
        self._skew = skew
        self.nbytes = nbytes
        self.half = 0

    def arrays(self, half: int, dtype: DType, count: int) -> list[Array]:
        """Return the array at the beginning of a half of every rank's buffer."""
        start = self._skew + half * self.nbytes
        stop = start + count * dtype.itemsize
        return [part[start:stop].view(dtype) for part in self._parts]


class NodeSums:
    """The blocking all_reduces of a group whose ranks all share memory.

    Parameters
    ----------
    sequencer : Sequencer
        The order of the group's operations.
    context : NodeContext
        The ranks.
    registered : Registry
        Knows the arrays that lie in shared memory.
    share : callable
        Returns memory of so many bytes of each rank of the node, or None; collective, blocks.
    """

    def __init__(
        self,
        sequencer: Sequencer,
        context: NodeContext,
        registered: Registry,
        share: Callable[[int, Waiter], list[memoryview] | None],
    ) -> None:
        self._sequencer = sequencer
        self._context = context
        self._registered = registered
        self._share = share
        self._sizes = Crossovers()
        self._small: dict[Any, Sum] = {}
        self._long: dict[Any, Sum] = {}
        self._immediate: dict[Any, SmallSum] = {}
        self._small_buffers = _Buffers(sequencer.counters.small_buffers(), SMALL_NBYTES)
        self._scratch: _Buffers | None = None
        self._scratch_refused = False

    def take(self, sizes: Crossovers) -> None:
        """Choose the kind of sum by these sizes from now on; the same on all ranks."""
        self._sizes = sizes
        self._small.clear()
        self._long.clear()

    def find(self, x: Array, op: ReduceOp) -> Sum | None:
        """Return the sum of `x` in place, if one like it has been prepared before.

        Parameters
        ----------
        x : Array
            Any, as the caller gave it.
        op : ReduceOp
            How to combine.
        """
        if type(x) is not np.ndarray or x.ndim != 1 or not x.flags.carray:
            return None
        if x.nbytes <= self._sizes.small:  # as `_choose`, at less cost
            return self._small.get((op, x.dtype, x.size))
        kept = self._choose(x, x, op)
        return None if kept is None else kept[0].get(kept[1])

    def prepared(self, call: AllReduce) -> Sum | None:
        """Return a sum if one like it has been prepared before; local, unlike `prepare`."""
        kept = self._choose(call.x, call.out, call.op)
        if kept is None:
            return None
        sums, key, _ = kept
        return sums.get(_key_of(call, key))

    def prepare(self, call: AllReduce, waiter: Waiter) -> Sum | None:
        """Return a sum, or None where the library is faster.

        Parameters
        ----------
        call : AllReduce
            The arrays, and how to combine them.
        waiter : Waiter
            Has the signature of the call.

        Notes
        -----
        Collective; it makes scratch buffers in shared memory for the first array that needs them.
        """
        kept = self._choose(call.x, call.out, call.op)
        if kept is None:
            return None
        sums, key, array = kept
        key = _key_of(call, key)
        prepared = sums.get(key)
        if prepared is None:
            prepared = self._make(call.x, call.op, array, waiter)
            if prepared is not None:
                remember(sums, key, prepared)
        return prepared

    def steps(self, call: AllReduce, waiter: Waiter) -> ConditionSteps[None] | None:
        """Return the steps of an immediate sum of at most `SMALL_NBYTES`, or None for messages.

        Messages carry short arrays in registered memory, such as the short buckets of gradients:
        they add in another order, which is part of the bits of a training run.
        """
        x = call.x
        if x is call.out and self._registered.find(x) is not None:
            return None
        key = (x.dtype, x.size, call.op, waiter.digest)
        small = self._immediate.get(key)
        if small is None:
            context, buffers = self._context, self._small_buffers
            small = SmallSum(self._sequencer, context, buffers, x, call.op, waiter)
            remember(self._immediate, key, small)
        return small.steps(x, call.out, waiter)

    def _choose(
        self, x: Array, out: Array, op: ReduceOp
    ) -> tuple[dict[Any, Sum], object, RegisteredArray | None] | None:
        """Choose the kind of sum: the cache of such sums, the key in it, the registered array."""
        nbytes, sizes = x.nbytes, self._sizes
        if nbytes <= sizes.small:
            return self._small, (op, x.dtype, x.size), None
        if x is out and nbytes >= sizes.registered:
            array = self._registered.find(x)
            if array is not None:
                return array.prepared, ("sum", op), array
        if nbytes >= sizes.scratch:
            return self._long, (op, x.dtype, x.size), None
        return None

    def _make(
        self, x: Array, op: ReduceOp, array: RegisteredArray | None, waiter: Waiter
    ) -> Sum | None:
        sequencer, context = self._sequencer, self._context
        if array is not None:
            return RegisteredSum(sequencer, context, array, op, waiter)
        small = x.nbytes <= self._sizes.small
        small_enough = small and x.nbytes <= SMALL_NBYTES
        buffers = self._small_buffers if small_enough else self._make_scratch(waiter)
        if buffers is None:
            return None
        if small:
            return SmallSum(sequencer, context, buffers, x, op, waiter)
        return ScratchSum(sequencer, context, buffers, x, op, waiter)

    def _make_scratch(self, waiter: Waiter) -> _Buffers | None:
        """Make the scratch buffers when all ranks have arrived; asked for once, also if refused."""
        if self._scratch is not None or self._scratch_refused:
            return self._scratch
        self._sequencer.arrive(waiter, Route.SCRATCH)
        chunk = _chunk_bytes(self._context.transport.size)
        parts = self._share(_SKEW + 2 * chunk, waiter)
        if parts is None:
            self._scratch_refused = True
            return None
        self._scratch = _Buffers(parts, chunk, _SKEW)
        return self._scratch


def _key_of(call: AllReduce, key: object) -> object:
    """Return the key of a call: one of an array of another shape, though as long, is another.

    `NodeSums.find` asks for those alone whose key this leaves as it is.
    """
    return key if call.shape == call.x.shape else (key, call.shape, call.listed)


def _chunk_bytes(size: int) -> int:
    """Return how many bytes of an ordinary array are summed at a time by so many ranks."""
    return max(_ALL_CHUNKS // size, _SHORTEST_CHUNK) // _PAGE * _PAGE


def remember(kept: dict[K, V], key: K, value: V) -> V:
    """Keep what was prepared; all is forgotten where there is too much of it."""
    if len(kept) >= _REMEMBERED:
        kept.clear()
    kept[key] = value
    return value
