"""Several messages that are started, and waited for, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpidist._types import Array
from mpidist.arrays.namespaces import is_device
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.group.operations import Timeout
from mpidist.point_to_point._messages import (
    Receive,
    Send,
    device_receive,
    device_send,
    prepare_receive,
    prepare_send,
)

__all__ = ["exchange_on_device", "prepare_batch"]


def exchange_on_device(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive], timeout: Timeout
) -> Work[list[Array]]:
    """Start messages of which some are of device arrays: NCCL has to get these at once."""
    leaving = [device_send(message, group) for message in sends if is_device(message.x)]
    order = sorted(range(len(receives)), key=lambda index: not is_device(receives[index].out))
    arriving = [device_receive(each, group) for each in receives if is_device(each.out)]
    host = prepare_batch(
        group,
        [message for message in sends if not is_device(message.x)],
        [receives[index] for index in order[len(arriving) :]],
        timeout,
    )
    landings = [message for message, _ in arriving]
    finish = [each for _, each in arriving]
    device = group.start_messages(leaving, landings, lambda: [each() for each in finish], timeout)

    def in_order(results: list[list[Array]]) -> list[Array]:
        received = dict(zip(order, (x for result in results for x in result), strict=True))
        return [received[index] for index in range(len(received))]

    return Work.all([device, host()]).then(in_order)


def prepare_batch(
    group: ProcessGroup, sends: Sequence[Send], receives: Sequence[Receive], timeout: Timeout
) -> Callable[[], Work[list[Array]]]:
    """Check several messages of host arrays, and return what starts them."""
    # All are checked before one is started: a receive left behind would take another's message.
    arriving = [prepare_receive(receive, group, timeout) for receive in receives]
    leaving = [prepare_send(message, group, timeout) for message in sends]

    def begin() -> Work[list[Array]]:
        works: list[Work[Any]] = [start() for start in arriving]
        works += [start() for start in leaving]
        return Work.all(works).then(lambda results: results[: len(arriving)])

    return begin
