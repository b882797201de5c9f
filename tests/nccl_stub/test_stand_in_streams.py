"""The stand-in for cupy: garbage for those who forget an event, or an array that is in use."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import time
from typing import Any

import numpy as np
import pytest

from tests.nccl_stub import stand_in
from tests.nccl_stub.stand_in import memory

pytestmark = pytest.mark.usefixtures("stand_in_without_nccl")


@pytest.fixture
def cupy(stand_in_without_nccl: Any) -> Any:
    return importlib.import_module("cupy")


def test_a_result_is_garbage_until_its_stream_is_waited_for(cupy: Any) -> None:
    y = cupy.arange(5, dtype=cupy.float32) * 2
    assert np.isnan(stand_in.contents(y)).all()
    cupy.cuda.get_current_stream().synchronize()
    assert stand_in.contents(y).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    "change",
    [
        lambda cupy, x: x.__iadd__(1),
        lambda cupy, x: x.__setitem__(..., 2),
        lambda cupy, x: x.__setitem__(slice(0, 1), cupy.ones(1)),
        lambda cupy, x: x.fill(2),
        lambda cupy, x: x.sort(),
        lambda cupy, x: cupy.add(x, 1, out=x),
        lambda cupy, x: cupy.add(x, 1, x),
        lambda cupy, x: cupy.clip(x, 1, 2, x),
        lambda cupy, x: cupy.ones((2, 2)).sum(0, None, x),
        lambda cupy, x: cupy.copyto(x, 2),
        lambda cupy, x: cupy.put(x, 0, 2),
        lambda cupy, x: np.multiply(x, 2, out=x),
        lambda cupy, x: cupy.sum(cupy.ones((2, 2)), axis=0, out=x),
        lambda cupy, x: x.set(np.ones(2)),
    ],
)
def test_a_change_is_not_seen_until_its_stream_is_waited_for(cupy: Any, change: Any) -> None:
    x = cupy.asarray(np.array([3.0, 0.0]))
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    change(cupy, x)
    assert stand_in.contents(x).tolist() == [3, 0]
    stream.synchronize()
    assert stand_in.contents(x).tolist() != [3, 0]


@pytest.mark.parametrize("waits", [False, True])
def test_a_side_stream_needs_an_event_of_the_compute_stream(cupy: Any, waits: bool) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4) * 3
    event = cupy.cuda.Event(disable_timing=True)
    event.record()
    if waits:
        side.wait_event(event)
    with side:
        y = x + 1
    assert (y.get(stream=side) == 4).all() == waits


@pytest.mark.parametrize("waits", [False, True])
def test_the_compute_stream_needs_an_event_of_a_side_stream(cupy: Any, waits: bool) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    compute = cupy.cuda.get_current_stream()
    x = cupy.ones(4)
    side.wait_event(compute.record())
    with side:
        x += 1
    if waits:
        compute.wait_event(side.record())
    assert ((x * 10).get() == 20).all() == waits


@pytest.mark.parametrize("non_blocking", [False, True])
def test_only_blocking_streams_are_ordered_with_the_null_stream(
    cupy: Any, non_blocking: bool
) -> None:
    side = cupy.cuda.Stream(non_blocking=non_blocking)
    x = cupy.ones(4) * 3
    with side:
        x += 1
        behind = x * 1
        side.synchronize()
    assert (stand_in.contents(behind) == 4).all() != non_blocking


def test_an_event_is_where_it_was_recorded_last_when_it_was_waited_for(cupy: Any) -> None:
    stream, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    event = cupy.cuda.Event()
    assert event.done  # before it is recorded there is nothing to wait for
    x = cupy.ones(2)
    event.record(stream)
    side.wait_event(event)
    y = cupy.ones(2)
    event.record(stream)
    side.synchronize()
    assert (stand_in.contents(x) == 1).all()
    assert np.isnan(stand_in.contents(y)).all()
    assert event.done
    assert (stand_in.contents(y) == 1).all()


def test_streams_are_current_per_thread_device_and_block(cupy: Any) -> None:
    null, side = cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)
    assert cupy.cuda.get_current_stream() == null
    assert (null.ptr, side.ptr > 0) == (0, True)
    with side:
        assert cupy.cuda.get_current_stream() is side
        with cupy.cuda.Device(1):
            assert cupy.cuda.get_current_stream() == null
            with pytest.raises(RuntimeError, match="does not match"):
                side.use()
    assert cupy.cuda.get_current_stream() == null
    side.use()
    assert cupy.cuda.get_current_stream() is side
    null.use()


def test_an_event_cannot_be_recorded_on_another_device(cupy: Any) -> None:
    event = cupy.cuda.Event()
    with cupy.cuda.Device(1), pytest.raises(RuntimeError, match="InvalidResourceHandle"):
        event.record()


def test_times_between_events_are_those_of_running(cupy: Any) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    begin = stream.record()
    stand_in.delay(stream, lambda: time.sleep(0.01))
    end = stream.record()
    end.synchronize()
    assert 10 <= cupy.cuda.get_elapsed_time(begin, end) < 1000


def test_functions_of_the_host_run_in_their_turn(cupy: Any) -> None:
    stream, seen = cupy.cuda.Stream(non_blocking=True), []
    stream.launch_host_func(seen.append, 1)
    stand_in.delay(stream, lambda: seen.append(2))
    assert seen == []
    assert stream.done
    assert seen == [1, 2]


def test_the_host_goes_on_where_a_stream_has_to_wait(cupy: Any) -> None:
    compute, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    kernel = cupy.ElementwiseKernel("T x", "T y", "y = x + 1", "plus_one")
    x, order = cupy.arange(4.0), cupy.asarray([3, 2, 1, 0])
    release = stand_in.hold(side)
    with side:
        x += 1
    compute.wait_event(side.record())
    y = x * 2
    total, parts = y.sum(), cupy.split(y * y, 2)
    low, high = cupy.divmod(y, 3)
    turned, plus = x[order], kernel(x)
    y[1:] -= x[:3]
    del x
    assert not compute.done
    assert np.isnan(stand_in.contents(total))
    release()
    assert y.get().tolist() == [2, 3, 4, 5]
    assert total.get() == 20
    assert [part.tolist() for part in parts] == [[4, 16], [36, 64]]
    assert (low.tolist(), high.tolist()) == ([0, 1, 2, 2], [2, 1, 0, 2])
    assert (turned.tolist(), plus.tolist()) == ([4, 3, 2, 1], [2, 3, 4, 5])


def test_errors_are_raised_at_the_call_even_where_a_stream_has_to_wait(cupy: Any) -> None:
    stream, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    stand_in.hold(side)()
    stream.wait_event(side.record())
    with pytest.raises(ValueError, match="broadcast"):
        cupy.ones(3) + cupy.ones(4)


def test_freed_memory_is_garbage_to_who_still_reads_it(cupy: Any) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    side.wait_event(cupy.cuda.get_current_stream().record())
    bytes_of_x = memory.block_of(x).memory.data
    view = x[1:]
    before = cupy.get_default_memory_pool().used_bytes()
    del x
    side.synchronize()
    assert stand_in.contents(view).tolist() == [1, 1, 1]  # a view holds it
    del view
    gc.collect()
    assert np.isnan(bytes_of_x.view(np.float64)).all()
    assert before - cupy.get_default_memory_pool().used_bytes() == 32


def test_memory_may_be_freed_when_its_stream_waits_for_its_readers(cupy: Any) -> None:
    compute, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4)
    release = stand_in.hold(side)
    side.wait_event(compute.record())
    with side:
        y = x + 1
    compute.wait_event(side.record())
    del x  # used next by what comes behind the wait
    release()
    assert (y + 0).tolist() == [2, 2, 2, 2]


def test_a_copy_to_the_device_reads_pinned_memory_when_it_runs(cupy: Any) -> None:
    pinned = importlib.import_module("cupyx").zeros_pinned(3)
    ordinary = np.zeros(3)
    x, y, z = cupy.empty(3), cupy.empty(3), cupy.empty(3)
    x.set(pinned)
    y.set(ordinary)
    pinned[:] = ordinary[:] = 1
    assert (x.tolist(), y.tolist()) == ([1, 1, 1], [0, 0, 0])
    z.set(pinned)
    del pinned
    assert np.isnan(z.get()).all()


def test_a_copy_to_the_host_can_be_waited_for(cupy: Any) -> None:
    pinned = importlib.import_module("cupyx").zeros_pinned(3)
    (cupy.ones(3) * 2).get(out=pinned, blocking=False)
    assert pinned.tolist() == [0, 0, 0]
    cupy.cuda.get_current_stream().synchronize()
    assert pinned.tolist() == [2, 2, 2]  # what was copied has been freed, behind the copy
    x = cupy.ones(3)
    x.get(out=pinned)
    assert pinned.tolist() == [1, 1, 1]
