"""Device arrays by way of the host: copied to pinned memory, moved by the host transport, and back.

For groups without NCCL, where the user has asked for it (``MPIDIST_ENABLE_GPU_FALLBACK=1``): it
takes the host's part in every operation, and its cores.

Sums and broadcasts go in chunks, by way of two buffers: while the ranks sum one chunk, the device
writes the next one into the other buffer, after it has read the one before out of it. All copies
are on one stream, and that order alone keeps each buffer from being written too early.

What is only moved, messages and broadcasts, needs no copies where the host transport takes device
arrays itself: an MPI library that is CUDA-aware, see `mpidist.backends.cuda_aware`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mpidist._types import MAX, Array
from mpidist.arrays import array_namespace, is_device, pinned_empty
from mpidist.backends.base import Backend, Traffic
from mpidist.backends.device import DeviceBackend, DeviceWork
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Message, Steps, Waiter, Work
from mpidist.errors import BackendUnavailableError, UnsupportedOperationError

__all__ = ["Staging"]

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
    verb, args : str, tuple
        The call; its arrays are pinned memory.
    fetched, brought : sequence of _Copy
        From the device before it, and to the device after it.
    """

    verb: str
    args: tuple[Any, ...]
    fetched: Sequence[_Copy]
    brought: Sequence[_Copy]


class _Reached(Work[None]):
    """Complete when the device has come to an event."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        over: bool = self._event.done
        return over

    def wait(self, timeout: float | None = None) -> None:
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


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


class _Lift:
    """What one rank needs on its device: a stream for the copies, and the two buffers.

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
        return self.cuda.Event(disable_timing=True)

    def here(self) -> Any:
        """Return an event behind what is on the current stream."""
        event = self.event()
        event.record()
        return event

    def fetch(self, copies: Sequence[_Copy]) -> Work[None]:
        """Ask for copies to the host; return what is complete when they are."""
        event = self.event()
        for device, host in copies:
            device.get(stream=self.stream, out=host, blocking=False)  # type: ignore[attr-defined]
        event.record(self.stream)
        return _Reached(event)

    def bring(self, copies: Sequence[_Copy]) -> None:
        """Ask for copies to the device."""
        for device, host in copies:
            device.set(host, stream=self.stream)  # type: ignore[attr-defined]


class Staging(DeviceBackend):
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

    def __init__(self, host: Backend, *, aware: bool = False) -> None:
        self.capabilities = replace(
            host.capabilities, max_tag=0, any_source=False, unknown_shapes=False
        )
        self._host = host
        self._aware = aware
        self._own: Backend | None = None
        self._lift: _Lift | None = None
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
        own.run("all_reduce", (differ, differ, MAX), waiter=waiter)
        if differ.all():
            own.close()
            raise BackendUnavailableError(
                f"{waiter.operation}: MPIDIST_CUDA_AWARE_MPI is set on some ranks only; set it on "
                "all (mpirun -x, or -genv, or srun --export), or on none"
            )
        self._own = own

    def begin(self, verb: str, args: tuple[Any, ...], waiter: Waiter) -> DeviceWork:
        """Start a collective behind what is on the current stream; the host goes on."""
        calls = args if verb == "together" else ((verb, args),)
        own, lift = self._ready(calls[0][1], waiter)
        pieces: list[_Piece] = []
        for each, some in calls:
            if each == "broadcast" and self._aware:
                pieces.append(_Piece(each, some, [], []))
            else:
                pieces += _pieces(each, some, own.rank, lift, first=len(pieces))
        over = lift.event()
        steps = _in_pieces(own, lift, pieces, (lift.here(), over), behind=self._last)
        self._last = own.start(steps)
        return self._hold(_Staged(self._last, over, waiter, cuda=lift.cuda, keep=pieces))

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], waiter: Waiter
    ) -> DeviceWork:
        """Start messages; blocks until what is sent is there, so that they start in this order."""
        own, lift = self._ready([m.array for m in (*sends, *receives)], waiter)
        lane = own.lane(Traffic.PAYLOAD, 0)
        fetched = [_Copy(m.array, self._room(m.array)) for m in sends]
        brought = [_Copy(m.array, self._room(m.array)) for m in receives]
        lift.stream.wait_event(lift.here())
        waiter.wait_for(lift.fetch([] if self._aware else fetched).done)
        moving = own.exchange(
            [Message(room, m.peer, lane) for (_, room), m in zip(fetched, sends, strict=True)],
            [Message(room, m.peer, lane) for (_, room), m in zip(brought, receives, strict=True)],
        )
        over = lift.event()

        def arrive() -> Steps:
            yield moving
            lift.bring([] if self._aware else brought)
            over.record(lift.stream)

        keep = (fetched, brought)
        return self._hold(_Staged(own.start(arrive()), over, waiter, cuda=lift.cuda, keep=keep))

    def _hold(self, work: _Staged) -> _Staged:
        """Keep an operation until it is over, whoever else lets go of it."""
        self.idle()
        self._under_way.append(work)
        return work

    def idle(self) -> bool:
        """Let go of what is over; return whether nothing is under way."""
        while self._under_way:
            try:
                if not self._under_way[0].done():
                    return False
            except Exception:  # noqa: BLE001  # whoever waits for it gets it
                self._failed.append(self._under_way[0])
            del self._under_way[0]
        return True

    def _room(self, x: Array) -> Array:
        """Return the memory that the host transport sends from, or receives into."""
        return x if self._aware else _pinned(x)

    def fence(self) -> Callable[[], bool]:
        """Return what tells whether all that is on the current stream by now has been done."""
        assert self._lift is not None, "something has been started"
        return _Reached(self._lift.here()).done

    def split(
        self, color: int | None, key: int, host: Backend | None, waiter: Waiter
    ) -> Staging | None:
        """Make the staging of the host's new transport; local."""
        return None if host is None else Staging(host, aware=self._aware)

    def create(self, host: Backend) -> Staging:
        """Make the staging of the host's new transport; local."""
        return Staging(host, aware=self._aware)

    def check_place(self, x: Array, words: str) -> None:
        """Raise unless this array lies on this rank's device: that of the first one."""
        here = array_namespace(x).cuda.Device().id if self._lift is None else self._lift.device
        lies: int = x.device.id  # type: ignore[attr-defined]  # cupy's
        if lies != here:
            raise UnsupportedOperationError(
                f"{words} lies on device {lies}, and this rank's is device {here}; copy it there "
                f"(with cupy.cuda.Device({here}): cupy.array(x)), or choose the device by "
                "cupy.cuda.Device(i).use() before the group's first operation"
            )

    def close(self) -> None:
        """Release the transport on which staged operations ran."""
        if self._own is not None:
            self._own.close()
        self._own = self._lift = self._last = None

    def _ready(self, args: Iterable[Any], waiter: Waiter) -> tuple[Backend, _Lift]:
        """Return what `prepare` has made, and what the first device array makes."""
        if self._own is None:
            raise UnsupportedOperationError(
                f"{waiter.operation}: the ranks of this group are not connected for device arrays "
                "yet, which takes all of them: call a collective on one first, such as all_reduce"
            )
        if self._lift is None:
            self._lift = _Lift(next(x for x in args if is_device(x)))
        return self._own, self._lift


def _in_pieces(
    own: Backend,
    lift: _Lift,
    pieces: Sequence[_Piece],
    events: tuple[Any, Any],
    *,
    behind: Work[None] | None,
) -> Steps:
    """Copy, call and copy back, piece by piece.

    Parameters
    ----------
    own, lift : Backend, _Lift
        What calls, and what copies.
    pieces : sequence of _Piece
        At least one.
    events : (cupy.cuda.Event, cupy.cuda.Event)
        Behind what the arrays' owner has put on its stream, and to be recorded at the end.
    behind : Work or None
        The operation before this one, if there was any.
    """
    before, over = events
    if behind is not None:
        yield behind
    lift.stream.wait_event(before)
    fetching = lift.fetch(pieces[0].fetched)
    for index, piece in enumerate(pieces):
        fetched = fetching
        # The next copy is on its way while the ranks sum; its buffer is free, since the copy out
        # of it is before this one on the stream.
        if index + 1 < len(pieces):
            fetching = lift.fetch(pieces[index + 1].fetched)
        yield fetched
        yield own.transfer(piece.verb, piece.args)
        lift.bring(piece.brought)
    over.record(lift.stream)


def _pieces(
    verb: str, args: tuple[Any, ...], rank: int, lift: _Lift, *, first: int
) -> Iterator[_Piece]:
    """Yield what is called for one collective; `first` pieces of others are before it."""
    if verb not in ("all_reduce", "reduce", "broadcast"):
        yield _whole(verb, args, rank)
        return
    x = args[0]
    step = _CHUNK // x.dtype.itemsize
    # One call at least, also for nothing: all ranks make the same calls.
    for index, start in enumerate(range(0, max(x.size, 1), step), first):
        part = slice(start, start + step)
        buffer = lift.buffer(index, x[part])
        here = _Copy(x[part], buffer)
        if verb == "all_reduce":
            _, out, op = args
            yield _Piece(verb, (buffer, buffer, op), [here], [_Copy(out[part], buffer)])
        elif verb == "reduce":
            _, out, op, root = args
            lands = [_Copy(out[part], buffer)] if rank == root else []
            yield _Piece(verb, (buffer, buffer if lands else None, op, root), [here], lands)
        else:
            sends = rank == args[1]
            yield _Piece(verb, (buffer, args[1]), [here] if sends else [], [] if sends else [here])


def _whole(verb: str, args: tuple[Any, ...], rank: int) -> _Piece:
    """Return the call for a collective that lays arrays one behind the other."""
    x, out, *rest = args
    source = None if x is None else _pinned(x)
    landing = None if out is None else _pinned(out)
    fetched = [] if source is None else [_Copy(x, source)]
    if verb == "all_gather" and x is None:
        assert landing is not None, "all ranks receive"
        start = sum(rest[0][:rank])
        own = slice(start, start + rest[0][rank])
        fetched = [_Copy(out[own], landing[own])]
    brought = [] if landing is None else [_Copy(out, landing)]
    return _Piece(verb, (source, landing, *rest), fetched, brought)


def _pinned(x: Array) -> Array:
    """Return an array like `x` in memory of the host that the device copies from and to."""
    # Of nothing no memory is asked for.
    return pinned_empty(max(x.nbytes, 1))[: x.nbytes].view(x.dtype)
