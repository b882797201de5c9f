"""Cases of the order between the caller's streams and the transport's.

Each has something slow before what must wait for it: an event that is left out lets the later one
go first, and it reads what is not there yet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from mpidist import collectives, point_to_point
from mpidist._types import MAX, Array
from mpidist.backends.work import Work
from mpidist.group import ProcessGroup
from mpidist.point_to_point import Receive, Send
from mpidist.testing.contract._memory import DevicePlace, with_peers
from mpidist.testing.contract._values import check_that, expect

COUNT = 5000
SECONDS = 0.1
"""How long something slow takes: much longer than to launch what has to wait for it."""


def _array(device: DevicePlace, value: float = -1.0) -> Array:
    """Return an array whose elements have arrived."""
    x = device.put(np.full(COUNT, float(value)))
    device.take(x)
    return x


def _sum(group: ProcessGroup, value: float = 0.0) -> Array:
    """Return the sum of `value` plus the rank."""
    return np.full(COUNT, sum(value + rank for rank in range(group.size)))


def _stall(group: ProcessGroup, device: DevicePlace) -> Work[Any]:
    """Let the transport be busy for a while, and the current stream not."""
    with device.cupy.cuda.Stream(non_blocking=True):
        x = _array(device)
        device.busy(SECONDS)
        x[...] = 1
        return collectives.iall_reduce(x, group)


def _all_reduce(form: str, x: Array, group: ProcessGroup, out: Array) -> None:
    """Sum `x`, in one of three ways, and let the current stream go on behind that."""
    if form == "blocking":
        collectives.all_reduce(x, group, out=out)
    elif form == "immediate":
        collectives.iall_reduce(x, group, out=out).wait()
    else:
        out[...] = x
        collectives.all_reduce(out, group, out=out)


FORMS = ("blocking", "immediate", "in place", "in place")  # the second of which is a repeated call


def behind_a_slow_kernel(group: ProcessGroup, device: DevicePlace) -> None:
    """Read, in every form of a call, what a slow kernel before the collective writes."""
    device.ready(group)
    for form in FORMS:
        x, out = _array(device), _array(device)
        device.busy(SECONDS)
        x[...] = group.rank
        _all_reduce(form, x, group, out)
        expect(device.take(out), _sum(group), f"{form} all_reduce behind a slow kernel")


@with_peers
def messages_behind_a_slow_kernel(group: ProcessGroup, device: DevicePlace) -> None:
    """Send what a slow kernel before the message writes."""
    device.ready(group)
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    x, out = _array(device), _array(device)
    device.busy(SECONDS)
    x[...] = group.rank
    point_to_point.exchange(
        group, sends=[Send(x, after)], receives=[Receive(before, out=out)]
    ).wait()
    doubled = out * 2.0
    expect(device.take(doubled), np.full(COUNT, 2.0 * before), "message behind a slow kernel")


def consumers(group: ProcessGroup, device: DevicePlace) -> None:
    """Launch something behind a collective: it reads the result, however long that takes."""
    device.ready(group)
    for form in FORMS:
        stalled = _stall(group, device)
        x, out = _array(device, group.rank), _array(device)
        _all_reduce(form, x, group, out)
        doubled = out * 2.0
        expect(device.take(doubled), 2 * _sum(group), f"what follows a {form} all_reduce")
        stalled.wait()


def late_consumers(group: ProcessGroup, device: DevicePlace) -> None:
    """Wait on another stream than that of the call: what is current in `wait` goes on behind it."""
    device.ready(group)
    with device.cupy.cuda.Stream(non_blocking=True):
        x, out = _array(device), _array(device)
        device.busy(SECONDS)
        x[...] = group.rank
        work = collectives.iall_reduce(x, group, out=out)
    with device.cupy.cuda.Stream(non_blocking=True):
        work.wait()
        doubled = out * 2.0
        expect(device.take(doubled), 2 * _sum(group), "another stream behind wait")
    work.wait()
    doubled = out * 3.0
    expect(device.take(doubled), 3 * _sum(group), "a third stream behind a second wait")


def other_streams(group: ProcessGroup, device: DevicePlace) -> None:
    """Make a stream of the user's own the current one, for some of the operations."""
    device.ready(group)
    stream = device.cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = _array(device)
        device.busy(SECONDS)
        x[...] = group.rank
        out = collectives.all_reduce(x, group)
        out += 1.0
        again = collectives.all_reduce(out, group)
        expect(device.take(again), group.size * (_sum(group) + 1), "on a stream of the user's own")
    third = collectives.all_reduce(_array(device, group.rank), group)
    expect(device.take(third), _sum(group), "on the first stream again")


def freed_memory(group: ProcessGroup, device: DevicePlace) -> None:
    """Arrays that nobody keeps live until the transport is done with them; a Work, too."""
    device.ready(group)
    stalled = _stall(group, device)
    out = _array(device)
    x = _array(device)
    x[...] = group.rank
    work = collectives.iall_reduce(x, group, out=out)
    del x
    gc.collect()
    # The pool gives the memory of what was freed to whoever asks next on this stream.
    others = [device.cupy.full(COUNT, 99.0) for _ in range(4)]
    expect(device.take(work.wait()), _sum(group), "memory that was freed too early")
    stalled.wait()

    stalled = _stall(group, device)
    collectives.iall_reduce(_array(device, group.rank), group, out=out)
    gc.collect()
    others += [device.cupy.full(COUNT, 77.0) for _ in range(4)]
    collectives.iall_reduce(_array(device), group).wait()
    expect(device.take(out), _sum(group), "the result of a Work that nobody kept")
    stalled.wait()
    for number, other in enumerate(others):
        expect(device.take(other), np.full(COUNT, 99.0 if number < 4 else 77.0), "memory of others")


def temporaries(group: ProcessGroup, device: DevicePlace) -> None:
    """So do the copies that are made of arrays which are not contiguous, or to keep NaN."""
    device.ready(group)
    stalled = _stall(group, device)
    wide = device.put(np.full((COUNT, 2), float(group.rank)))
    target = device.put(np.full((COUNT, 2), -1.0))
    total = collectives.iall_reduce(wide[:, 1], group, out=target[:, 0])
    most = collectives.iall_reduce(_array(device, group.rank), group, op=MAX)
    gc.collect()
    others = [device.cupy.full(COUNT, 99.0) for _ in range(6)]
    total.wait()
    expect(device.take(target[:, 0].copy()), _sum(group), "a result that is not contiguous")
    expect(device.take(target[:, 1].copy()), np.full(COUNT, -1.0), "what lies between its elements")
    expect(device.take(most.wait()), np.full(COUNT, group.size - 1.0), "the largest of all ranks")
    stalled.wait()
    for other in others:
        expect(device.take(other), np.full(COUNT, 99.0), "memory of others")


def two_groups(group: ProcessGroup, device: DevicePlace) -> None:
    """Give one group what another gave: each has a stream of its own."""
    other = group.duplicate("other")
    device.ready(group)
    device.ready(other)
    stalled = _stall(group, device)
    first = collectives.iall_reduce(_array(device, group.rank), group).wait()
    second = collectives.all_reduce(first, other)
    expect(device.take(second), group.size * _sum(group), "a sum on one group of a sum on another")
    stalled.wait()
    other.close()


def synchronized(group: ProcessGroup, device: DevicePlace) -> None:
    """After `synchronize` the result is there for everybody, whatever stream is current."""
    device.ready(group)
    for out in (_array(device), device.put(np.full((COUNT, 2), -1.0))[:, 0]):
        stalled = _stall(group, device)
        work = collectives.iall_reduce(_array(device, group.rank), group, out=out)
        work.synchronize()
        check_that(work.done(), "not done after synchronize")
        with device.cupy.cuda.Stream(non_blocking=True):
            expect(device.take(out), _sum(group), "on a stream that waits for nothing")
        stalled.wait()


def _agreed(group: ProcessGroup, trial: Callable[[], bool], what: str) -> None:
    """Raise unless a trial succeeds on all ranks at once."""
    votes: list[bool] = []
    for _ in range(5):  # a machine that stops for a moment gets another try
        votes = collectives.all_gather_object(trial(), group)
        if all(votes):
            return
    raise AssertionError(f"{what} on ranks {[rank for rank, ok in enumerate(votes) if not ok]}")


def a_stream_of_its_own(group: ProcessGroup, device: DevicePlace) -> None:
    """Be independent of the stream on which the ranks were connected, where it has no part."""
    device.ready(group)

    def trial() -> bool:
        with device.cupy.cuda.Stream(non_blocking=True):
            x = _array(device, group.rank)
        behind = device.cupy.cuda.Event(disable_timing=True)
        device.busy(3 * SECONDS)
        behind.record()
        with device.cupy.cuda.Stream(non_blocking=True):
            out = collectives.iall_reduce(x, group).synchronize()
            expect(device.take(out), _sum(group), "beside a slow kernel on another stream")
        went_on = not behind.done
        behind.synchronize()
        return went_on

    _agreed(group, trial, "the transport waited for a stream that was not current,")


def the_host_goes_on(group: ProcessGroup, device: DevicePlace) -> None:
    """Neither a blocking verb nor `wait` waits on the host for a result on a device."""
    device.ready(group)

    def trial() -> bool:
        x, out = _array(device, group.rank), _array(device)
        device.busy(3 * SECONDS)
        collectives.all_reduce(x, group, out=out)
        work = collectives.iall_reduce(x, group, out=out)
        work.wait()
        went_on = not work.done()
        work.synchronize()
        expect(device.take(out), _sum(group), "behind a slow kernel")
        return went_on

    _agreed(group, trial, "the host waited for the device")
