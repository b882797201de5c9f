"""Device arrays by way of the host: copied to pinned memory, moved by the host transport, and back.

For groups without NCCL, where the user has asked for it (``MPIDIST_ENABLE_GPU_FALLBACK=1``): it
takes the host's part in every operation, and its cores.

Sums and broadcasts go in chunks, so that copies and sums overlap.

[Note: two buffers] While the ranks sum one chunk, the device writes the next one into the other
buffer, after it has read the one before out of it. All copies are on one stream, and that order
alone keeps each buffer from being written too early.

What is only moved, messages and broadcasts, needs no copies where the host transport takes device
arrays itself: an MPI library that is CUDA-aware, see `mpidist.backends.device.cuda_aware`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import MAX, Array
from mpidist.arrays.boxes import part_slices
from mpidist.arrays.namespaces import array_namespace, is_device, pinned_empty
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.device.base import DeviceBackend, DeviceWork
from mpidist.backends.verbs import (
    AllGather,
    AllReduce,
    AllToAll,
    Broadcast,
    Collective,
    Gather,
    Reduce,
    ReduceScatter,
    Scatter,
)
from mpidist.backends.work import Message, PolledWork, Steps, Waiter, Work
from mpidist.errors import (
    BackendUnavailableError,
    CollectiveMismatchError,
    UnsupportedOperationError,
)

_CHUNK = 8 << 20
"""Bytes of a chunk. At 25 GB/s one takes 0.3 ms on its way to the host, so that starting a copy and
noticing its end, some ten microseconds, costs little; and 16 MiB are pinned for each group."""


class _Copy(NamedTuple):
    """Two arrays of the same size and dtype, of which one is copied to the other."""

    device: Array
    host: Array


class _Piece(NamedTuple):
    """One call of the host transport, and the copies before and after it.

    Attributes
    ----------
    call : Collective
        What the host transport performs; its arrays are pinned memory.
    to_host, to_device : sequence of _Copy
        The copies to the host before the call, and to the device after it.
    """

    call: Collective
    to_host: Sequence[_Copy]
    to_device: Sequence[_Copy]


class _EventWork(PolledWork):
    """Complete when the device has reached an event."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        over: bool = self._event.done
        return over


class _PinnedBuffers:
    """The two pinned buffers of a rank, on the device of `x`, and the stream of its copies."""

    def __init__(self, x: Array) -> None:
        self.cuda = array_namespace(x).cuda
        self.device: int = self.cuda.Device().id
        self.stream = self.cuda.Stream(non_blocking=True)
        self._buffers = [pinned_empty(_CHUNK), pinned_empty(_CHUNK)]

    def chunks(self, x: Array, first: int) -> Iterator[tuple[slice, _Copy]]:
        """Yield the parts of an array, and the copy of each to a buffer, in turn.

        `first` is the number of chunks before these, since which the buffers have been in use.
        """
        step = _CHUNK // x.dtype.itemsize
        # One part at least, also of nothing: all ranks make the same calls.
        for index, start in enumerate(range(0, max(x.size, 1), step), first):
            part = slice(start, start + step)
            buffer = self._buffers[index % 2][: x[part].nbytes].view(x.dtype)
            yield part, _Copy(x[part], buffer)

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

    def to_host(self, copies: Sequence[_Copy]) -> Work[None]:
        """Start copies to the host; return work that is complete when they are."""
        event = self.event()
        for device, host in copies:
            device.get(stream=self.stream, out=host, blocking=False)  # type: ignore[attr-defined]
        event.record(self.stream)
        return _EventWork(event)

    def to_device(self, copies: Sequence[_Copy]) -> None:
        """Start copies to the device."""
        for device, host in copies:
            device.set(host, stream=self.stream)  # type: ignore[attr-defined]


def _pieces(call: Collective, rank: int, pinned: _PinnedBuffers, first: int) -> list[_Piece]:
    """Return the pieces by which a collective of rank `rank` goes by way of the host.

    What combines or copies whole arrays goes in chunks, of which there have been `first` before;
    what concatenates parts goes at once.
    """
    if isinstance(call, Broadcast):
        root = rank == call.root
        return [
            _Piece(replace(call, x=copy.host), [copy] if root else [], [] if root else [copy])
            for _, copy in pinned.chunks(call.x, first)
        ]
    if isinstance(call, (AllReduce, Reduce)):
        pieces = []
        for part, copy in pinned.chunks(call.x, first):
            host, out = copy.host, call.out
            result = [] if out is None else [_Copy(out[part], host)]
            arrays: dict[str, Any] = {"x": host, "out": None if out is None else host}
            pieces.append(_Piece(replace(call, **arrays), [copy], result))
        return pieces
    if isinstance(call, (Gather, AllGather, Scatter, ReduceScatter, AllToAll)):
        given = None if call.x is None else _pinned(call.x)
        taken = None if call.out is None else _pinned(call.out)
        arrays = {"x": given and given.host, "out": taken and taken.host}
        if isinstance(call, AllGather) and taken is not None and given is None:
            own = part_slices(call.counts)[rank]
            given = _Copy(taken.device[own], taken.host[own])
        return [_Piece(replace(call, **arrays), [given] if given else [], [taken] if taken else [])]
    raise UnsupportedOperationError(
        f"{call.verb}: arrays of a device do not go by way of the host in it"
    )


def _pinned(x: Array) -> _Copy:
    """Return an array of the device with pinned memory for it."""
    return _Copy(x, _pinned_like(x))


def _pinned_like(x: Array) -> Array:
    """Return an array like `x` in memory of the host that the device copies from and to."""
    # Never ask for 0 bytes of pinned memory.
    return pinned_empty(max(x.nbytes, 1))[: x.nbytes].view(x.dtype)


class _Staged(DeviceWork):
    """An operation that goes by way of the host.

    `steps`, the host's part, is over when the last copy to the device has been asked for. `copied`
    is the event behind that copy; until it has happened the device may read and write the arrays,
    which are kept.
    """

    def __init__(
        self, steps: Work[None], copied: Any, waiter: Waiter, *, cuda: Any, keep: object
    ) -> None:
        self._steps = steps
        self._copied = copied
        self._waiter = waiter
        self._cuda = cuda
        self._keep = keep
        self._over = False

    def done(self) -> bool:
        if not self._over and self._steps.done() and self._copied.done:
            self._over, self._keep = True, None
            if self._then is not None:
                self._then()
        return self._over

    def order(self) -> None:
        """Let the current stream go on behind this operation; blocks until the host's part is over.

        Before that there is nothing on any stream that could be waited for.
        """
        self._waiter.wait_for(self._steps.done, missing=self._steps.missing)
        self._cuda.get_current_stream().wait_event(self._copied)

    def missing(self) -> Sequence[int]:
        return self._steps.missing()


class HostStaging(DeviceBackend[Backend]):
    """Carries the device arrays of a group by way of its host transport.

    Parameters
    ----------
    host : Backend
        The transport of the group's host arrays.
    aware : bool, optional
        Whether it gets device arrays in messages and broadcasts; the same on all ranks.

    Notes
    -----
    The host's operations start when a copy is over, which is at another time on each rank. So they
    have a transport of their own, on which one operation begins when the one before has ended: in
    the same order on all ranks. See [Note: phases].
    """

    name = "staging"
    compares_calls = True

    def __init__(self, host: Backend, *, aware: bool = False) -> None:
        super().__init__()
        self.capabilities = replace(
            host.capabilities, max_tag=0, any_source=False, unknown_shapes=False
        )
        self._host = host
        self._aware = aware
        self._own: Backend | None = None
        self._pinned_buffers: _PinnedBuffers | None = None
        self._last: Work[None] | None = None
        # What failed stays: the host transport may still write into its memory.
        self._under_way: list[_Staged] = []
        self._failed: list[_Staged] = []

    def prepare(self, waiter: Waiter) -> None:
        """Make the transport on which staged operations run; collective, blocks.

        Raises
        ------
        BackendUnavailableError
            On all ranks, if ``MPIDIST_CUDA_AWARE_MPI`` is set on some of them only.
        """
        if self._own is not None:
            return
        own = self._host.split(0, self._host.rank, waiter=waiter)
        assert own is not None, "every rank gave color 0"
        own.join(self._host)
        # The largest of both is 1 only if ranks differ.
        differ = np.array([self._aware, not self._aware], np.int32)
        own.run(AllReduce(differ, differ, MAX), waiter=waiter)
        if differ.all():
            own.close()
            raise BackendUnavailableError(
                f"{waiter.operation}: MPIDIST_CUDA_AWARE_MPI is set on some ranks only; set it on "
                "all (mpirun -x, or -genv, or srun --export), or on none"
            )
        self._own = own

    def begin(self, collective: Collective, waiter: Waiter) -> DeviceWork:
        """Start a collective behind what is on the current stream; the host goes on."""
        own, pinned = self._ready(collective.arrays, waiter)
        pieces: list[_Piece] = []
        for call in collective.together:
            if isinstance(call, Broadcast) and self._aware:
                pieces.append(_Piece(call, [], []))
            else:
                pieces += _pieces(call, own.rank, pinned, len(pieces))
        over = pinned.event()
        events = pinned.record_event(), over
        steps = _in_pieces(own, pinned, pieces, events, behind=self._last, waiter=waiter)
        self._last = own.start(steps)
        return self._hold(_Staged(self._last, over, waiter, cuda=pinned.cuda, keep=pieces))

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], waiter: Waiter
    ) -> DeviceWork:
        """Start messages; blocks until what is sent is there, so that they start in this order."""
        own, pinned = self._ready([m.array for m in (*sends, *receives)], waiter)
        lane = own.lane(Traffic.PAYLOAD, 0)
        to_host, to_device = (
            [_Copy(m.array, m.array if self._aware else _pinned_like(m.array)) for m in messages]
            for messages in (sends, receives)
        )
        pinned.stream.wait_event(pinned.record_event())
        waiter.wait_for(pinned.to_host([] if self._aware else to_host).done)
        moving = own.exchange(
            [Message(copy.host, m.peer, lane) for copy, m in zip(to_host, sends, strict=True)],
            [Message(copy.host, m.peer, lane) for copy, m in zip(to_device, receives, strict=True)],
        )
        over = pinned.event()

        def arrive() -> Steps:
            yield moving
            pinned.to_device([] if self._aware else to_device)
            over.record(pinned.stream)

        keep = (to_host, to_device)
        return self._hold(_Staged(own.start(arrive()), over, waiter, cuda=pinned.cuda, keep=keep))

    def _hold(self, work: _Staged) -> _Staged:
        """Hold an operation until it has ended, so that the caller may drop it."""
        self.idle()
        self._under_way.append(work)
        return work

    def idle(self) -> bool:
        """Release finished operations; return whether none is pending."""
        while self._under_way:
            try:
                if not self._under_way[0].done():
                    return False
            except Exception:  # noqa: BLE001  # its `wait` raises it
                self._failed.append(self._under_way[0])
            del self._under_way[0]
        return True

    def fence(self) -> Callable[[], bool]:
        """Return a function that says whether the current stream has done its work up to now."""
        assert self._pinned_buffers is not None, "something has been started"
        return _EventWork(self._pinned_buffers.record_event()).done

    def split(
        self, color: int | None, key: int, host: Backend | None, waiter: Waiter
    ) -> HostStaging | None:
        """Make the staging of the host's new transport; local."""
        return None if host is None else HostStaging(host, aware=self._aware)

    def create(self, host: Backend) -> HostStaging:
        """Make the staging of the host's new transport; local."""
        return HostStaging(host, aware=self._aware)

    @property
    def chosen(self) -> int | None:
        """The device of the first array; None before that."""
        return None if self._pinned_buffers is None else self._pinned_buffers.device

    def close(self) -> None:
        """Release the transport on which staged operations ran."""
        if self._own is not None:
            self._own.close()
        self._own = self._pinned_buffers = self._last = None

    def _ready(self, arrays: Sequence[Array], waiter: Waiter) -> tuple[Backend, _PinnedBuffers]:
        """Return what `prepare` has made, and what the first device array makes."""
        if self._own is None:
            raise UnsupportedOperationError(
                f"{waiter.operation}: the ranks of this group are not connected for device arrays "
                "yet, which takes all of them: call a collective on one first, such as all_reduce"
            )
        if self._pinned_buffers is None:
            self._pinned_buffers = _PinnedBuffers(next(x for x in arrays if is_device(x)))
        return self._own, self._pinned_buffers


class _Over(PolledWork):
    """Complete when an operation is over, also if the ranks had called different things in it.

    Nothing has been changed then, and its `wait` raises the difference.
    """

    def __init__(self, work: Work[None]) -> None:
        self._work = work

    def done(self) -> bool:
        try:
            return self._work.done()
        except CollectiveMismatchError as error:
            if error.usable:
                return True
            raise


def _in_pieces(
    own: Backend,
    pinned: _PinnedBuffers,
    pieces: Sequence[_Piece],
    events: tuple[Any, Any],
    *,
    behind: Work[None] | None,
    waiter: Waiter,
) -> Steps:
    """Copy, call and copy back, piece by piece, when the operation `behind` is over.

    The first of the events is behind what the arrays' owner has put on its stream; the other is
    recorded at the end.
    """
    before, over = events
    if behind is not None:
        yield _Over(behind)
    pinned.stream.wait_event(before)
    next_copy = pinned.to_host(pieces[0].to_host)
    for index, piece in enumerate(pieces):
        copy = next_copy
        # The next copy is on its way while the ranks sum; its buffer is free, since the copy out
        # of it is before this one on the stream.
        if index + 1 < len(pieces):
            next_copy = pinned.to_host(pieces[index + 1].to_host)
        yield copy
        yield own.transfer(piece.call, waiter)
        pinned.to_device(piece.to_device)
    over.record(pinned.stream)
