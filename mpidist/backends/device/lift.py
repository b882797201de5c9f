"""How the device arrays of one rank come to pinned memory of the host and back.

[Note: two buffers] While the ranks sum one chunk, the device writes the next one into the other
buffer, after it has read the one before out of it. All copies are on one stream, and that order
alone keeps each buffer from being written too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mpidist._types import Array
from mpidist.arrays.namespaces import array_namespace, pinned_empty
from mpidist.backends.waiting import wait_until
from mpidist.backends.work import Work

__all__ = ["Copy", "Lift", "Piece", "Reached", "pieces_of", "pinned_like"]

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
    verb, args : str, tuple
        The call; its arrays are pinned memory.
    fetched, brought : sequence of Copy
        From the device before it, and to the device after it.
    """

    verb: str
    args: tuple[Any, ...]
    fetched: Sequence[Copy]
    brought: Sequence[Copy]


class Reached(Work[None]):
    """Complete when the device has come to an event."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        """Return whether it has."""
        over: bool = self._event.done
        return over

    def wait(self, timeout: float | None = None) -> None:
        """Wait for it; groups wait by `done`."""
        wait_until(self.done, timeout=float("inf") if timeout is None else timeout)


class Lift:
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
        """Return an event, not recorded yet."""
        # Whoever drives this may be at work on another device just now, and an event has one.
        with self.cuda.Device(self.device):
            return self.cuda.Event(disable_timing=True)

    def here(self) -> Any:
        """Return an event behind what is on the current stream."""
        event = self.event()
        event.record()
        return event

    def fetch(self, copies: Sequence[Copy]) -> Work[None]:
        """Ask for copies to the host; return what is complete when they are."""
        event = self.event()
        for device, host in copies:
            device.get(stream=self.stream, out=host, blocking=False)  # type: ignore[attr-defined]
        event.record(self.stream)
        return Reached(event)

    def bring(self, copies: Sequence[Copy]) -> None:
        """Ask for copies to the device."""
        for device, host in copies:
            device.set(host, stream=self.stream)  # type: ignore[attr-defined]


def pieces_of(
    verb: str, args: tuple[Any, ...], rank: int, lift: Lift, *, first: int
) -> Iterator[Piece]:
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
        here = Copy(x[part], buffer)
        if verb == "all_reduce":
            _, out, op = args
            yield Piece(verb, (buffer, buffer, op), [here], [Copy(out[part], buffer)])
        elif verb == "reduce":
            _, out, op, root = args
            lands = [Copy(out[part], buffer)] if rank == root else []
            yield Piece(verb, (buffer, buffer if lands else None, op, root), [here], lands)
        else:
            sends = rank == args[1]
            yield Piece(verb, (buffer, args[1]), [here] if sends else [], [] if sends else [here])


def _whole(verb: str, args: tuple[Any, ...], rank: int) -> Piece:
    """Return the call for a collective that lays arrays one behind the other."""
    x, out, *rest = args
    source = None if x is None else pinned_like(x)
    landing = None if out is None else pinned_like(out)
    fetched = [] if source is None else [Copy(x, source)]
    if verb == "all_gather" and x is None:
        assert landing is not None, "all ranks receive"
        start = sum(rest[0][:rank])
        own = slice(start, start + rest[0][rank])
        fetched = [Copy(out[own], landing[own])]
    brought = [] if landing is None else [Copy(out, landing)]
    return Piece(verb, (source, landing, *rest), fetched, brought)


def pinned_like(x: Array) -> Array:
    """Return an array like `x` in memory of the host that the device copies from and to."""
    # Of nothing no memory is asked for.
    return pinned_empty(max(x.nbytes, 1))[: x.nbytes].view(x.dtype)
