"""The order of a group's operations on its device: a side stream, and events both ways.

The caller computes on the stream that is current, NCCL works on the side stream. An operation
begins behind what is on the current stream when it is called (`Side.wait_for_current`), and a
reader of its result puts the current stream behind its event (`order_behind`). The memory of an
array goes back to CuPy's pool as soon as the last reference is dropped, and may be given to the
next computation while NCCL still reads it: so a work holds its arrays until its event has happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpidist.arrays.namespaces import device_module

__all__ = ["Side", "order_behind"]


_SUCCESS, _NOT_READY = 0, 600
"""Of ``cudaError_t``."""


class Side:
    """The side stream of a group on the current device.

    Attributes
    ----------
    stream : cupy.cuda.Stream
        Where NCCL works.
    """

    def __init__(self) -> None:
        cuda = device_module().cuda
        self._cuda = cuda
        self.stream = cuda.Stream(non_blocking=True)
        self.handle: int = self.stream.ptr
        self._ready = cuda.Event(disable_timing=True)
        self._spare: list[Any] = []

    def current_device(self) -> int:
        """Return the current device of this thread."""
        device: int = self._cuda.runtime.getDevice()
        return device

    def wait_for_current(self) -> None:
        """Make the side stream wait for the work that is on the current stream now."""
        # One event serves all: a wait is for what it recorded when the wait was put there.
        self._ready.record()
        self.stream.wait_event(self._ready)

    def mark(self) -> Any:
        """Return an event behind all that is on the side stream."""
        event = self._spare.pop() if self._spare else self._cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def take_back(self, event: Any) -> None:
        """Take back an event that has happened and is not waited for any more."""
        self._spare.append(event)

    def check(self, event: Any) -> None:
        """Raise if the device has failed: an event does not happen then, and `done` is just False.

        Raises
        ------
        CUDARuntimeError
            What has failed, such as an illegal access of some kernel before.
        """
        runtime = self._cuda.runtime
        code = runtime.eventQuery(event.ptr)
        if code not in (_SUCCESS, _NOT_READY):
            raise runtime.CUDARuntimeError(code)

    def fence(self) -> Callable[[], bool]:
        """Return a function that says whether the current stream has done its work up to now."""
        event = self._cuda.Event(disable_timing=True)
        event.record()
        return lambda: bool(event.done)


def order_behind(event: Any) -> None:
    """Let the current stream go on only when an event has happened."""
    device_module().cuda.get_current_stream().wait_event(event)
