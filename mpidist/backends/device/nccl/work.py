"""An operation of NCCL under way: what it holds, and how one sees that it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpidist.backends.device.base import DeviceWork
from mpidist.backends.device.nccl.streams import order_behind

if TYPE_CHECKING:
    from mpidist.backends.device.nccl.link import Link
    from mpidist.backends.work import Waiter

__all__ = ["NcclWork"]


class NcclWork(DeviceWork):
    """An operation of NCCL under way.

    Parameters
    ----------
    link : Link
        Of the ranks that perform it.
    event : cupy.cuda.Event
        Happens when it is over.
    held : tuple
        What it reads and writes.
    waiter : callable
        Returns what waits for it; asked only if something is wrong.

    Attributes
    ----------
    event, waiter
        As given.
    """

    def __init__(
        self, link: Link, event: Any, held: tuple[Any, ...], waiter: Callable[[], Waiter]
    ) -> None:
        self.event = event
        self.waiter = waiter
        self._began = time.monotonic()
        self._link = link
        self._held = held
        self._over = False
        self._then: Callable[[], None] | None = None

    def when_over(self, then: Callable[[], None]) -> None:
        """Call this when it is seen to be over."""
        self._then = then

    def done(self) -> bool:
        """Return whether the device is done with it."""
        if not self._over:
            self._link.check()
            self._over = bool(self.event.done)
            if self._over:
                self._held = ()
                self._link.release(self, self.event)
                if self._then is not None:
                    self._then()
                # What NCCL has given up is over for the device, too.
                self._link.look(self.waiter)
        return self._over

    def reached(self) -> bool:
        """Whether the device is done with it, without any consequences; from any thread."""
        # In this order: when it is over, its event may be another operation's already.
        return bool(self.event.done) or self._over

    def overdue(self) -> bool:
        """Whether its deadline is over; from any thread."""
        return time.monotonic() - self._began > self.waiter().timeout

    def order(self) -> None:
        """Let the current stream go on only behind this operation."""
        self._link.check()
        if not self._over:
            order_behind(self.event)

    def wait(self, timeout: float | None = None) -> None:
        """Order the current stream; groups bring the deadline."""
        self.order()
