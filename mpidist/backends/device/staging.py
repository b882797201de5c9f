"""Device arrays by way of the host: copied to pinned memory, moved by the host transport, and back.

For groups without NCCL, where the user has asked for it (``MPIDIST_ENABLE_GPU_FALLBACK=1``): it
takes the host's part in every operation, and its cores.

Sums and broadcasts go in chunks, so that copies and sums overlap; see [Note: two buffers].

What is only moved, messages and broadcasts, needs no copies where the host transport takes device
arrays itself: an MPI library that is CUDA-aware, see `mpidist.backends.device.cuda_aware`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpidist._types import MAX, Array
from mpidist.arrays.namespaces import is_device
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.device.base import DeviceBackend, DeviceWork
from mpidist.backends.device.pinned import (
    Copy,
    EventWork,
    Piece,
    PinnedBuffers,
    StagedCalls,
    pinned_like,
)
from mpidist.backends.verbs import AllReduce, Broadcast, Collective
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Message, Steps, Waiter, Work
from mpidist.errors import (
    BackendUnavailableError,
    CollectiveMismatchError,
    UnsupportedOperationError,
)

__all__ = ["HostStaging"]


class _Staged(DeviceWork):
    """An operation that goes by way of the host.

    Parameters
    ----------
    steps : Work
        The host's part; over when the last copy to the device has been asked for.
    brought : cupy.cuda.Event
        Recorded behind that copy.
    waiter : Waiter
        Waits for the host's part.
    cuda : module
        ``cupy.cuda``.
    keep : object
        The arrays, which the device may read and write until then.
    """

    def __init__(
        self, steps: Work[None], brought: Any, waiter: Waiter, *, cuda: Any, keep: object
    ) -> None:
        self._steps = steps
        self._brought = brought
        self._waiter = waiter
        self._cuda = cuda
        self._keep = keep
        self._over = False
        self._then: Callable[[], None] | None = None

    def when_over(self, then: Callable[[], None]) -> None:
        """Call this when the copies to the device are seen to be over."""
        self._then = then

    def done(self) -> bool:
        if not self._over and self._steps.done() and self._brought.done:
            self._over, self._keep = True, None
            if self._then is not None:
                self._then()
        return self._over

    def order(self) -> None:
        """Let the current stream go on behind this operation; blocks until the host's part is over.

        Before that there is nothing on any stream that could be waited for.
        """
        self._waiter.wait_for(self._steps.done, missing=self._steps.missing)
        self._cuda.get_current_stream().wait_event(self._brought)

    def wait(self, timeout: float | None = None) -> None:
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)

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
        self._pinned_buffers: PinnedBuffers | None = None
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
        pieces: list[Piece] = []
        for call in collective.together:
            if isinstance(call, Broadcast) and self._aware:
                pieces.append(Piece(call, [], []))
            else:
                pieces += call.by(StagedCalls(own.rank, pinned, len(pieces)))
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
        fetched = [Copy(m.array, self._host_buffer(m.array)) for m in sends]
        brought = [Copy(m.array, self._host_buffer(m.array)) for m in receives]
        pinned.stream.wait_event(pinned.record_event())
        waiter.wait_for(pinned.to_host([] if self._aware else fetched).done)
        moving = own.exchange(
            [Message(buffer, m.peer, lane) for (_, buffer), m in zip(fetched, sends, strict=True)],
            [
                Message(buffer, m.peer, lane)
                for (_, buffer), m in zip(brought, receives, strict=True)
            ],
        )
        over = pinned.event()

        def arrive() -> Steps:
            yield moving
            pinned.to_device([] if self._aware else brought)
            over.record(pinned.stream)

        keep = (fetched, brought)
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

    def _host_buffer(self, x: Array) -> Array:
        """Return the memory that the host transport sends from, or receives into."""
        return x if self._aware else pinned_like(x)

    def fence(self) -> Callable[[], bool]:
        """Return a function that says whether the current stream has done its work up to now."""
        assert self._pinned_buffers is not None, "something has been started"
        return EventWork(self._pinned_buffers.record_event()).done

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

    def _ready(self, args: Iterable[Any], waiter: Waiter) -> tuple[Backend, PinnedBuffers]:
        """Return what `prepare` has made, and what the first device array makes."""
        if self._own is None:
            raise UnsupportedOperationError(
                f"{waiter.operation}: the ranks of this group are not connected for device arrays "
                "yet, which takes all of them: call a collective on one first, such as all_reduce"
            )
        if self._pinned_buffers is None:
            self._pinned_buffers = PinnedBuffers(next(x for x in args if is_device(x)))
        return self._own, self._pinned_buffers


class _Over(Work[None]):
    """Complete when an operation is over, also if the ranks had called different things in it.

    Nothing has been changed then, and its `wait` raises the difference.
    """

    def __init__(self, work: Work[None]) -> None:
        self._work = work

    def done(self) -> bool:
        """Poll the operation."""
        try:
            return self._work.done()
        except CollectiveMismatchError as error:
            if error.usable:
                return True
            raise

    def wait(self, timeout: float | None = None) -> None:
        """Wait without driving anything else."""
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


def _in_pieces(
    own: Backend,
    pinned: PinnedBuffers,
    pieces: Sequence[Piece],
    events: tuple[Any, Any],
    *,
    behind: Work[None] | None,
    waiter: Waiter,
) -> Steps:
    """Copy, call and copy back, piece by piece.

    Parameters
    ----------
    own, pinned : Backend, PinnedBuffers
        What calls, and what copies.
    pieces : sequence of Piece
        At least one.
    events : (cupy.cuda.Event, cupy.cuda.Event)
        Behind what the arrays' owner has put on its stream, and to be recorded at the end.
    behind : Work or None
        The operation before this one, if there was any.
    waiter : Waiter
        Knows the signature of the operation.
    """
    before, over = events
    if behind is not None:
        yield _Over(behind)
    pinned.stream.wait_event(before)
    fetching = pinned.to_host(pieces[0].fetched)
    for index, piece in enumerate(pieces):
        fetched = fetching
        # The next copy is on its way while the ranks sum; its buffer is free, since the copy out
        # of it is before this one on the stream.
        if index + 1 < len(pieces):
            fetching = pinned.to_host(pieces[index + 1].fetched)
        yield fetched
        yield own.transfer(piece.call, waiter)
        pinned.to_device(piece.brought)
    over.record(pinned.stream)
