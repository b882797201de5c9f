"""The stand-in for cupy: what it must show to those who forget something."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("stand_in_without_nccl")


def test_a_result_is_garbage_until_its_stream_is_waited_for() -> None:
    import cupy

    x = cupy.arange(5, dtype=cupy.float32)
    y = x * 2
    assert np.isnan(np.asarray(y)).all()
    cupy.cuda.get_current_stream().synchronize()
    assert np.asarray(y).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("waits", [False, True])
def test_a_side_stream_needs_an_event_of_the_compute_stream(waits: bool) -> None:
    import cupy

    side = cupy.cuda.Stream(non_blocking=True)
    x = cupy.ones(4) * 3
    event = cupy.cuda.get_current_stream().record(cupy.cuda.Event(disable_timing=True))
    if waits:
        side.wait_event(event)
    with side:
        y = x + 1
    assert (y.get(stream=side) == 4).all() == waits


@pytest.mark.parametrize("waits", [False, True])
def test_the_compute_stream_needs_an_event_of_a_side_stream(waits: bool) -> None:
    import cupy

    side = cupy.cuda.Stream(non_blocking=True)
    compute = cupy.cuda.get_current_stream()
    x = cupy.ones(4)
    side.wait_event(compute.record())
    with side:
        x += 1
    if waits:
        compute.wait_event(side.record())
    y = x * 10
    assert (y.get() == 20).all() == waits
