"""Moving boxes as planned: the collective of host arrays, and exchanges of device arrays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeAlias, TypeVar

from mpidist._types import Array
from mpidist.arrays.boxes import Box, part_slices
from mpidist.arrays.namespaces import (
    array_namespace,
    as_native,
    is_device,
    is_host,
    reduce_in_rank_order,
)
from mpidist.backends.algorithms import Lane, rank_order_all_reduce
from mpidist.backends.verbs import AllReduce, AllToAll, Collective, Performer
from mpidist.backends.work import Steps, Work
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout
from mpidist.mesh.redistribution import Phase, Redistribution

__all__ = ["Exchange", "Redistribute", "Total", "Transfer", "exchange_boxes", "view_of"]

T = TypeVar("T")

Exchange: TypeAlias = Callable[
    [Sequence[tuple[Array, int]], Sequence[tuple[Array, int]]], "Work[Any]"
]
"""Starts to send and receive (array, peer) pairs: flat arrays, at most one per peer."""


def exchange_boxes(
    plan: Redistribution, x: Array | None, out: Array, rank: int, exchange: Exchange
) -> Steps:
    """Carry out a plan.

    Parameters
    ----------
    plan : Redistribution
        Of this rank.
    x : Array or None
        What this rank has before; None if that is nothing.
    out : Array, C-contiguous
        Receives what it has afterwards; of native byte order.
    rank : int
        This rank.
    exchange : callable
        Moves the boxes. It is called once for each phase, with nothing to move too.

    Yields
    ------
    Work
        What has to be waited for.
    """
    xp = array_namespace(out)
    if plan.first is not None:
        phase = plan.first
        parts = [
            _cut(x, phase.before, box) if peer == rank else xp.empty(box.sizes, out.dtype)
            for peer, box in phase.receives
        ]
        yield exchange(_sends(phase, x, rank), _receives(phase, parts, rank))
        x = None
        if phase.after is not None and plan.op is None:
            (x,) = parts
        elif phase.after is not None and plan.op is not None:
            x = xp.empty(phase.after.sizes, out.dtype)
            reduce_in_rank_order(parts, plan.op, x)
    if plan.fill is not None:
        out[...] = plan.fill
    phase = plan.second
    views = [_cut(out, phase.after, box) for _, box in phase.receives]
    parts = [
        _cut(x, phase.before, box) if peer == rank else _landing(view)
        for (peer, box), view in zip(phase.receives, views, strict=True)
    ]
    yield exchange(_sends(phase, x, rank), _receives(phase, parts, rank))
    for view, part in zip(views, parts, strict=True):
        if part is not view:
            view[...] = part


def _cut(x: Array | None, origin: Box | None, box: Box) -> Array:
    """Return the part of an array that is a box of the whole; a view, also of a 0-d one."""
    assert x is not None, "the plan says that there is something"
    assert origin is not None, "the plan says what it is"
    return view_of(x, box.relative_to(origin))


def view_of(x: Array, box: Box) -> Array:
    """Return a part of an array; of a 0-d one a view, too, not a scalar."""
    index: tuple[Any, ...] = (*box.slices, ...)
    part: Array = x[index]
    return part


def _landing(view: Array) -> Array:
    """Return where a part is received: where it belongs, if that is one piece of host memory."""
    if is_host(view) and view.flags.c_contiguous:
        return view
    fresh: Array = array_namespace(view).empty(view.shape, view.dtype)
    return fresh


def _sends(phase: Phase, x: Array | None, rank: int) -> list[tuple[Array, int]]:
    return [
        (as_native(_cut(x, phase.before, box)).reshape(-1), peer)
        for peer, box in phase.sends
        if peer != rank
    ]


def _receives(phase: Phase, parts: Sequence[Array], rank: int) -> list[tuple[Array, int]]:
    peers = [peer for peer, _ in phase.receives]
    return [
        (part.reshape(-1), peer) for peer, part in zip(peers, parts, strict=True) if peer != rank
    ]


@dataclass(slots=True, eq=False, repr=False)
class Redistribute(Collective):
    """Exchange boxes, as every rank has planned.

    Attributes
    ----------
    title : str
        What has to be the same on all ranks.
    move : callable or None
        Returns the steps, given what exchanges; None where the ranks only compare.
    """

    verb: ClassVar[str] = "redistribute"
    title: Final[str]
    move: Final[Callable[[Exchange], Steps] | None]

    @property
    def arrays(self) -> tuple[Array, ...]:
        """Return none: they differ by rank, and `title` describes the array of which they are."""
        return ()

    def key(self) -> Hashable:
        """Return the title."""
        return self.verb, self.title

    def describe(self) -> str:
        """Return the title."""
        return f"{self.verb} {self.title}"

    def steps(self, lane: Lane) -> Steps:
        """Exchange the boxes."""
        if self.move is not None:
            yield from self.move(lane.exchange)


@dataclass(slots=True, eq=False, repr=False)
class Total(AllReduce):
    """Combine what all ranks of one node have into what all get, in rank order.

    It takes the place of a `Redistribute`, whose title is `listed` here. The order is part of what
    a redistribution promises: sums in shared memory have it on one node, and on several they have
    not.
    """

    verb: ClassVar[str] = Redistribute.verb

    def describe(self) -> str:
        """Return the title."""
        return f"{self.verb} {self.listed}"

    def steps(self, lane: Lane) -> Steps:
        """Combine in rank order, whatever the size."""
        return rank_order_all_reduce(lane, self.x, self.out, self.op)

    def by(self, library: Performer[T]) -> T:
        """Leave it to memory or messages: the library has an order of its own."""
        return library.other(self)


@dataclass(frozen=True, slots=True)
class Transfer(Generic[T]):
    """A redistribution that has been checked and planned.

    Parameters
    ----------
    group : ProcessGroup
        Who takes part.
    title : str
        What has to be the same on all ranks.
    steps : callable
        Moves the boxes, given what exchanges them.
    out : Array
        Where they arrive.
    made : T
        The result, when they have.
    timeout : float or datetime.timedelta, optional
        Seconds for this call; the group's when omitted.
    total : Total, optional
        Does the same faster.
    """

    group: ProcessGroup
    title: str
    steps: Callable[[Exchange], Steps]
    out: Array
    made: T
    timeout: Timeout
    total: Total | None = None

    def run(self) -> T:
        """Perform it."""
        if is_device(self.out):
            return self._start_on_device().wait()
        return self.group.operations.run(self._call, lambda: self.made, self.timeout)

    def start(self) -> Work[T]:
        """Start it."""
        if is_device(self.out):
            return self._start_on_device()
        return self.group.operations.start(self._call, lambda: self.made, self.timeout)

    @property
    def _call(self) -> Collective:
        """What does it for arrays of the host."""
        return Redistribute(self.title, self.steps) if self.total is None else self.total

    def _start_on_device(self) -> Work[T]:
        """Put it on the current stream, when the hosts have compared their calls.

        Each exchange is an all_to_all, which is what transports of device arrays know.
        """
        self.group.operations.run(Redistribute(self.title, None), lambda: None, self.timeout)
        work: Work[Any] | None = None
        for work in self.steps(self._all_to_all):
            work.wait()
        assert work is not None, "there is always a second exchange"
        return work.then(lambda _: self.made)

    def _all_to_all(
        self, sends: Sequence[tuple[Array, int]], receives: Sequence[tuple[Array, int]]
    ) -> Work[None]:
        """Exchange arrays of a device; an `Exchange`."""
        xp, dtype = array_namespace(self.out), self.out.dtype
        leaving = [0] * self.group.size
        arriving = [0] * self.group.size
        for array, peer in sends:
            leaving[peer] = array.size
        for array, peer in receives:
            arriving[peer] = array.size
        joined = xp.concatenate([xp.empty(0, dtype), *(array for array, _ in sends)])
        landed = xp.empty(sum(arriving), dtype)

        def finish() -> None:
            parts = part_slices(arriving)
            for array, peer in receives:
                array[...] = landed[parts[peer]]

        call = AllToAll(
            joined, landed, tuple(leaving), tuple(arriving), shape=(), rows=(), listed=self.title
        )
        return self.group.operations.start(call, finish, self.timeout)
