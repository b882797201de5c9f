"""Copies of device arrays to pinned memory of the host and back.

[Note: two buffers] While the ranks sum one chunk, the device writes the next one into the other
buffer, after it has read the one before out of it. All copies are on one stream, and that order
alone keeps each buffer from being written too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import array_namespace, pinned_empty
from mpidist.backends.verbs import (
    AllGather,
    AllReduce,
    AllToAll,
    Barrier,
    Broadcast,
    Collective,
    Gather,
    Reduce,
    ReduceScatter,
    Scatter,
)
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Work
from mpidist.errors import UnsupportedOperationError

__all__ = ["Copy", "EventWork", "Piece", "PinnedBuffers", "StagedCalls", "pinned_like"]

_CHUNK = 8 << 20
"""Bytes of a chunk. At 25 GB/s one takes 0.3 ms on its way to the host, so that starting a copy and
noticing its end, some ten microseconds, costs little; and 16 MiB are pinned for each group."""


class Copy(NamedTuple):
    """Two arrays of the same size and dtype, of which one is copied to the other."""

    device: Array
    host: Array


class Piece(NamedTuple):
    """One call of the host transport, and the copies before and after it.

    Attributes
    ----------
    call : Collective
        What the host transport performs; its arrays are pinned memory.
    fetched, brought : sequence of Copy
        The copies to the host before the call, and to the device after it.
    """

    call: Collective
    fetched: Sequence[Copy]
    brought: Sequence[Copy]


class EventWork(Work[None]):
    """Complete when the device has reached an event."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        """Return whether the device has reached the event."""
        over: bool = self._event.done
        return over

    def wait(self, timeout: float | None = None) -> None:
        """Wait for it; groups wait by `done`."""
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


class PinnedBuffers:
    """The two pinned buffers of a rank, and the stream on which its device copies.

    Parameters
    ----------
    x : Array
        An array on the device.
    """

    def __init__(self, x: Array) -> None:
        self.cuda = array_namespace(x).cuda
        self.device: int = self.cuda.Device().id
        self.stream = self.cuda.Stream(non_blocking=True)
        self._buffers = [pinned_empty(_CHUNK), pinned_empty(_CHUNK)]

    def buffer(self, index: int, x: Array) -> Array:
        """Return the beginning of one of the buffers as an array like `x`."""
        return self._buffers[index % 2][: x.nbytes].view(x.dtype)

    def event(self) -> Any:
        """Return an event, not recorded yet."""
        # The calling thread may use another device just now, and an event belongs to one.
        with self.cuda.Device(self.device):
            return self.cuda.Event(disable_timing=True)

    def record_event(self) -> Any:
        """Return an event recorded on the current stream."""
        event = self.event()
        event.record()
        return event

    def to_host(self, copies: Sequence[Copy]) -> Work[None]:
        """Start copies to the host; return work that is complete when they are."""
        event = self.event()
        for device, host in copies:
            device.get(stream=self.stream, out=host, blocking=False)  # type: ignore[attr-defined]
        event.record(self.stream)
        return EventWork(event)

    def to_device(self, copies: Sequence[Copy]) -> None:
        """Start copies to the device."""
        for device, host in copies:
            device.set(host, stream=self.stream)  # type: ignore[attr-defined]


class StagedCalls:
    """How each collective goes by way of the host; see `mpidist.backends.verbs.Performer`.

    What combines or copies whole arrays goes in chunks, what concatenates parts goes at once.

    Parameters
    ----------
    rank : int
        This rank.
    pinned : PinnedBuffers
        The buffers, used in turn.
    first : int
        Index of the first buffer: the number of chunks before these.
    """

    def __init__(self, rank: int, pinned: PinnedBuffers, first: int) -> None:
        self._rank = rank
        self._pinned_buffers = pinned
        self._first = first

    def _chunks(self, x: Array) -> Iterator[tuple[slice, Copy]]:
        """Yield the parts of an array, and the copy of each to a buffer."""
        step = _CHUNK // x.dtype.itemsize
        # One call at least, also for nothing: all ranks make the same calls.
        for index, start in enumerate(range(0, max(x.size, 1), step), self._first):
            part = slice(start, start + step)
            yield part, Copy(x[part], self._pinned_buffers.buffer(index, x[part]))

    def all_reduce(self, x: Array, out: Array, op: ReduceOp) -> list[Piece]:
        """Combine chunk by chunk."""
        return [
            Piece(AllReduce(copy.host, copy.host, op), [copy], [Copy(out[part], copy.host)])
            for part, copy in self._chunks(x)
        ]

    def reduce(self, x: Array, out: Array | None, op: ReduceOp, root: int) -> list[Piece]:
        """Combine chunk by chunk."""
        pieces = []
        for part, copy in self._chunks(x):
            brought = [] if out is None else [Copy(out[part], copy.host)]
            lands = None if out is None else copy.host
            pieces.append(Piece(Reduce(copy.host, lands, op, root), [copy], brought))
        return pieces

    def broadcast(self, x: Array, root: int) -> list[Piece]:
        """Copy chunk by chunk."""
        fetches = self._rank == root
        return [
            Piece(Broadcast(copy.host, root), [copy] if fetches else [], [] if fetches else [copy])
            for _, copy in self._chunks(x)
        ]

    def gather(self, x: Array, out: Array | None, counts: Sequence[int], root: int) -> list[Piece]:
        """Fetch this rank's part, and bring all parts to the root."""
        given, taken = _pinned(x), None if out is None else _pinned(out)
        call = Gather(given.host, None if taken is None else taken.host, tuple(counts), root)
        return [Piece(call, [given], [] if taken is None else [taken])]

    def all_gather(self, x: Array | None, out: Array, counts: Sequence[int]) -> list[Piece]:
        """Fetch this rank's part, and bring all parts."""
        taken = _pinned(out)
        if x is not None:
            given = _pinned(x)
            return [Piece(AllGather(given.host, taken.host, tuple(counts)), [given], [taken])]
        start = sum(counts[: self._rank])
        own = slice(start, start + counts[self._rank])
        given = Copy(out[own], taken.host[own])
        return [Piece(AllGather(None, taken.host, tuple(counts)), [given], [taken])]

    def scatter(self, x: Array | None, out: Array, counts: Sequence[int], root: int) -> list[Piece]:
        """Fetch all parts on the root, and bring this rank's."""
        given, taken = None if x is None else _pinned(x), _pinned(out)
        call = Scatter(None if given is None else given.host, taken.host, tuple(counts), root)
        return [Piece(call, [] if given is None else [given], [taken])]

    def reduce_scatter(
        self, x: Array, out: Array, counts: Sequence[int], op: ReduceOp
    ) -> list[Piece]:
        """Fetch all, and bring this rank's part of the result."""
        given, taken = _pinned(x), _pinned(out)
        call = ReduceScatter(given.host, taken.host, tuple(counts), op)
        return [Piece(call, [given], [taken])]

    def all_to_all(
        self, x: Array, out: Array, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> list[Piece]:
        """Fetch all that is sent, and bring all that is received."""
        given, taken = _pinned(x), _pinned(out)
        call = AllToAll(given.host, taken.host, tuple(send_counts), tuple(recv_counts))
        return [Piece(call, [given], [taken])]

    def barrier(self) -> list[Piece]:
        """Perform it on the host."""
        return [Piece(Barrier(), [], [])]

    def other(self, collective: Collective) -> list[Piece]:
        """Refuse what is not known here."""
        raise UnsupportedOperationError(
            f"{collective.verb}: arrays of a device do not go by way of the host in it"
        )


def _pinned(x: Array) -> Copy:
    """Return an array of the device with pinned memory for it."""
    return Copy(x, pinned_like(x))


def pinned_like(x: Array) -> Array:
    """Return an array like `x` in memory of the host that the device copies from and to."""
    # Never ask for 0 bytes of pinned memory.
    return pinned_empty(max(x.nbytes, 1))[: x.nbytes].view(x.dtype)
