"""Several messages that are started, and waited for, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpidist._types import Array
from mpidist.arrays.namespaces import is_device
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.point_to_point._messages import (
    Receive,
    ReceiveWork,
    Send,
    device_receive,
    device_send,
    prepare_receive,
    prepare_send,
)

__all__ = ["exchange_on_device", "prepare_batch"]


class _Batch(Work[list[Array]]):
    """Several sends and receives that are waited for together."""

    def __init__(self, sends: list[Work[None]], receives: list[ReceiveWork]) -> None:
        self._sends = sends
        self._receives = receives

    def done(self) -> bool:
        """Return whether all are complete."""
        received = all(work.done() for work in self._receives)
        return all(work.done() for work in self._sends) and received

    def wait(self, timeout: float | None = None) -> list[Array]:
        """Wait for all."""
        received = [work.wait(timeout) for work in self._receives]
        for work in self._sends:
            work.wait(timeout)
        return received

    def synchronize(self, timeout: float | None = None) -> list[Array]:
        """Block the host until all are there."""
        received = [work.synchronize(timeout) for work in self._receives]
        for work in self._sends:
            work.synchronize(timeout)
        return received


class _DeviceBatch(Work[list[Array]]):
    """The messages of device arrays, which are one operation, and those of the host."""

    def __init__(self, places: Sequence[int], works: tuple[Work[list[Array]], ...]) -> None:
        self._places = places
        self._works = works

    def done(self) -> bool:
        """Return whether all are complete."""
        return all(work.done() for work in self._works)

    def _in_order(self, results: list[list[Array]]) -> list[Array]:
        received = dict(zip(self._places, (x for result in results for x in result), strict=True))
        return [received[place] for place in range(len(received))]

    def wait(self, timeout: float | None = None) -> list[Array]:
        """Wait for all."""
        return self._in_order([work.wait(timeout) for work in self._works])

    def synchronize(self, timeout: float | None = None) -> list[Array]:
        """Block the host until all are there."""
        return self._in_order([work.synchronize(timeout) for work in self._works])


def exchange_on_device(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive]
) -> Work[list[Array]]:
    """Start messages of which some are of device arrays: NCCL has to get these at once."""
    leaving = [device_send(message, group) for message in sends if is_device(message.x)]
    places = sorted(range(len(receives)), key=lambda place: not is_device(receives[place].out))
    arriving = [device_receive(each, group) for each in receives if is_device(each.out)]
    host = prepare_batch(
        group,
        [message for message in sends if not is_device(message.x)],
        [receives[place] for place in places[len(arriving) :]],
    )
    landings = [message for message, _ in arriving]
    finish = [each for _, each in arriving]
    device = group.start_messages(leaving, landings, lambda: [each() for each in finish])
    return _DeviceBatch(places, (device, host()))


def prepare_batch(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive]
) -> Callable[[], _Batch]:
    """Check several messages of host arrays, and return what starts them."""
    # All are checked before one is started: a receive left behind would take another's message.
    arriving = [prepare_receive(receive, group) for receive in receives]
    leaving = [prepare_send(message, group) for message in sends]

    def begin() -> _Batch:
        received = [start() for start in arriving]
        return _Batch([start() for start in leaving], received)

    return begin
