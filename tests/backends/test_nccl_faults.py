"""What goes wrong in NCCL ends in an error of ours, within seconds, on the stub of libnccl."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mpidist.backends.device.nccl import NcclCommunicator
from mpidist.collectives import all_reduce, barrier, broadcast, iall_reduce
from mpidist.errors import (
    CollectiveTimeoutError,
    DistributedError,
    GroupBrokenError,
    LaunchError,
    TransportError,
)
from mpidist.group import ProcessGroup
from tests.nccl_stub import raw
from tests.nccl_stub.fixtures import needs_cupy

pytestmark = [needs_cupy, pytest.mark.ranks(3)]

DEADLINE = 0.5
SECONDS = 3.0
"""How long a failure may take to be noticed, the deadline included."""


@pytest.fixture
def cupy(stand_in: ModuleType) -> Any:
    return sys.modules["cupy"]


@pytest.fixture
def order_faults() -> Iterator[Callable[[str], None]]:
    """Give what lets this process's next operations fail; see faults.c."""

    def order(faults: str) -> None:
        assert raw.library().nccl_stub_faults(faults.encode()) == 0

    yield order
    raw.library().nccl_stub_faults(None)


@pytest.fixture
def group(cupy: Any, world: ProcessGroup) -> ProcessGroup:
    """A group whose ranks are connected, and that may break."""
    made = world.duplicate("fragile")
    iall_reduce(cupy.zeros(1), made).synchronize()
    made.timeout = DEADLINE
    return made


def fails(call: Callable[[], Any], *kinds: type[DistributedError]) -> DistributedError:
    """Return the error that a call raises, soon."""
    began = time.monotonic()
    with pytest.raises(kinds) as caught:
        call()
    assert time.monotonic() - began < SECONDS
    return caught.value


def check_broken(group: ProcessGroup, cupy: Any) -> None:
    """Every verb is refused at once; the group can be closed."""
    began = time.monotonic()
    for call in (
        lambda: all_reduce(cupy.ones(2), group),
        lambda: iall_reduce(np.ones(2), group),
        lambda: barrier(group),
    ):
        with pytest.raises(GroupBrokenError, match=group.name):
            call()
    group.close()
    assert time.monotonic() - began < 1


def sum_of(group: ProcessGroup, cupy: Any) -> None:
    result = iall_reduce(cupy.full(3, float(group.rank)), group).synchronize()
    assert result.get().tolist() == [float(sum(range(group.size)))] * 3


def test_a_call_that_fails_on_one_rank(
    order_faults: Callable[[str], None], group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    order_faults("fail:1:2")
    sum_of(group, cupy)
    error = fails(
        lambda: iall_reduce(cupy.ones(4), group).synchronize(),
        TransportError if group.rank == 1 else CollectiveTimeoutError,
    )
    assert "all_reduce" in str(error)
    assert str(group) in str(error)
    check_broken(group, cupy)
    order_faults("")
    sum_of(world, cupy)


def test_a_communicator_that_cannot_even_be_aborted(
    order_faults: Callable[[str], None],
    group: ProcessGroup,
    cupy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As releases of NCCL do that wait for all ranks of the node to abort."""
    monkeypatch.setattr("mpidist.backends.device.nccl.link._GOODBYE", 0.2)
    monkeypatch.setattr(NcclCommunicator, "abort", lambda _: time.sleep(2 * SECONDS))
    order_faults(f"fail:{group.rank}:1")
    error = fails(lambda: all_reduce(cupy.ones(4), group), TransportError)
    assert "all_reduce" in str(error)
    check_broken(group, cupy)


def test_an_asynchronous_error(
    order_faults: Callable[[str], None], group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    order_faults("async:1:1")
    error = fails(
        lambda: iall_reduce(cupy.ones(4), group).synchronize(),
        TransportError if group.rank == 1 else CollectiveTimeoutError,
    )
    assert "all_reduce" in str(error)
    assert str(error).count(str(group)) == 1
    check_broken(group, cupy)
    order_faults("")
    sum_of(world, cupy)


def test_an_asynchronous_error_before_anybody_waits(
    order_faults: Callable[[str], None], group: ProcessGroup, cupy: Any
) -> None:
    order_faults(f"async:{group.rank}:1")
    work = iall_reduce(cupy.ones(4), group)
    time.sleep(0.3)  # the watchdog finds it
    error = fails(group.close, TransportError)
    assert "all_reduce" in str(error)
    assert str(group) in str(error)
    assert fails(work.wait, TransportError) is error


def test_an_operation_that_hangs(
    order_faults: Callable[[str], None], group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    order_faults("hang:2:1")
    error = fails(lambda: iall_reduce(cupy.ones(4), group).synchronize(), CollectiveTimeoutError)
    assert "all_reduce" in str(error)
    assert str(group) in str(error)
    check_broken(group, cupy)
    order_faults("")
    sum_of(world, cupy)


def test_an_operation_that_hangs_and_that_nobody_waits_for(
    order_faults: Callable[[str], None], group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    order_faults("hang:0:1")
    x = cupy.ones(4)
    all_reduce(x, group, out=x)
    began = time.monotonic()
    x.get()  # the watchdog ends it; what comes is not to be used
    assert time.monotonic() - began < SECONDS
    check_broken(group, cupy)


def test_an_operation_that_hangs_behind_one_that_nobody_has_seen_complete(
    order_faults: Callable[[str], None], group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    order_faults("hang:0:2")
    x = cupy.ones(4)
    if group.rank != 0:
        time.sleep(0.1)  # the first is under way when rank 0 begins the second
    all_reduce(x, group, out=x)
    all_reduce(x, group, out=x)
    began = time.monotonic()
    x.get()
    assert time.monotonic() - began < SECONDS
    check_broken(group, cupy)


@pytest.mark.parametrize("planned", [False, True])
def test_a_call_that_does_not_return(
    planned: bool, group: ProcessGroup, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library's first call between two ranks, of which one does not come."""
    aborted = threading.Event()

    def wait(communicator: NcclCommunicator, *_: Any) -> None:
        assert aborted.wait(2 * SECONDS)
        raise KeyError(3)  # as the binding says of a result for which it has no words

    monkeypatch.setattr(NcclCommunicator, "all_reduce", wait)
    monkeypatch.setattr(NcclCommunicator, "abort", lambda communicator: aborted.set())
    x = cupy.ones(4)
    out = None if planned else x
    error = fails(lambda: all_reduce(x, group, out=out), CollectiveTimeoutError)
    assert "all_reduce" in str(error)
    assert str(group) in str(error)
    check_broken(group, cupy)


def test_a_device_that_fails(
    order_faults: Callable[[str], None],
    group: ProcessGroup,
    cupy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its events just do not happen: CuPy's `done` is False whatever CUDA says."""
    group.timeout = 10 * SECONDS
    order_faults(f"hang:{group.rank}:1")
    work = iall_reduce(cupy.ones(4), group)
    monkeypatch.setattr(cupy.cuda.runtime, "eventQuery", lambda event: 700)
    monkeypatch.setattr(cupy.cuda.Event, "done", False)
    error = fails(work.synchronize, TransportError)
    for words in ("all_reduce", str(group), f"device {group.rank}", "CUDARuntimeError: 700"):
        assert words in str(error)
    check_broken(group, cupy)


def test_a_communicator_that_is_in_progress_for_ever(
    order_faults: Callable[[str], None], group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    order_faults("progress:0:1000000")
    for _ in range(3):
        sum_of(group, cupy)
        time.sleep(0.15)  # the watchdog looks
    sum_of(world, cupy)
    group.close()


def test_a_rank_that_hangs_while_the_ranks_are_connected(
    order_faults: Callable[[str], None], world: ProcessGroup, cupy: Any
) -> None:
    late = world.duplicate("late")
    late.timeout = DEADLINE
    order_faults("hang-init:1")
    error = fails(lambda: all_reduce(cupy.ones(4), late), CollectiveTimeoutError)
    assert "all_reduce" in str(error)
    assert str(late) in str(error)
    check_broken(late, cupy)
    order_faults("")
    sum_of(world, cupy)


def test_a_rank_that_fails_while_the_ranks_are_connected(
    order_faults: Callable[[str], None], world: ProcessGroup, cupy: Any
) -> None:
    late = world.duplicate("late")
    order_faults("fail-init:1")
    error = fails(lambda: all_reduce(cupy.ones(4), late), TransportError)
    assert "all_reduce" in str(error)
    assert str(late) in str(error)
    check_broken(late, cupy)
    order_faults("")
    sum_of(world, cupy)


def test_a_rank_that_does_not_come_to_be_connected(world: ProcessGroup, cupy: Any) -> None:
    late = world.duplicate("late")
    late.timeout = DEADLINE
    if world.rank != 0:
        error = fails(lambda: all_reduce(cupy.ones(4), late), CollectiveTimeoutError)
        assert "all_reduce" in str(error)
        assert str(late) in str(error)
        check_broken(late, cupy)
    barrier(world)


def test_ranks_that_call_different_operations(
    group: ProcessGroup, world: ProcessGroup, cupy: Any
) -> None:
    x = cupy.ones(4)

    def call() -> None:
        if group.rank == 1:
            broadcast(x, group, out=x)
        else:
            all_reduce(x, group, out=x)
        iall_reduce(x, group).synchronize()

    error = fails(call, TransportError, CollectiveTimeoutError)
    assert "all_reduce" in str(error) or "broadcast" in str(error)
    assert str(group) in str(error)
    check_broken(group, cupy)
    sum_of(world, cupy)


def test_two_ranks_on_one_device(
    world: ProcessGroup, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy.cuda.Device(world.rank % 2).use()
    crowd = world.duplicate("crowd")
    # It is not called.
    monkeypatch.setattr("mpidist.backends.device.nccl.backend.NcclCommunicator", None)
    error = fails(lambda: all_reduce(cupy.ones(4), crowd), LaunchError)
    for words in ("ranks 0 and 2", "0000:01:00.0", "NCCL_MULTI_RANK_GPU_ENABLE=1"):
        assert words in str(error)
    # All ranks know, and nothing has begun: the group still carries host arrays.
    assert all_reduce(np.ones(1), crowd) == crowd.size
    crowd.close()


@pytest.mark.parametrize("version", ["23002", "23003"])
def test_two_ranks_on_one_device_where_that_is_allowed(
    version: str, world: ProcessGroup, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    monkeypatch.setenv("NCCL_STUB_VERSION", version)
    cupy.cuda.Device(0).use()
    crowd = world.duplicate("crowd")
    if version == "23003":
        sum_of(crowd, cupy)
    else:
        fails(lambda: all_reduce(cupy.ones(4), crowd), LaunchError)
    crowd.close()
