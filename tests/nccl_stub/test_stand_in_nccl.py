"""CuPy's own NCCL extension on the streams of the stand-in, with one rank."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.nccl_stub.stand_in import queues

COUNT = 4


@pytest.fixture
def cupy(stand_in: ModuleType) -> Any:
    return importlib.import_module("cupy")


@pytest.fixture
def nccl(stand_in: ModuleType) -> Any:
    return importlib.import_module("cupy.cuda.nccl")


@pytest.fixture
def communicator(nccl: Any) -> Iterator[Any]:
    made = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    yield made
    made.abort()


def sum_into(communicator: Any, nccl: Any, x: Any, out: Any, stream: Any) -> None:
    communicator.allReduce(
        x.data.ptr, out.data.ptr, COUNT, nccl.NCCL_FLOAT64, nccl.NCCL_SUM, stream.ptr
    )


def test_it_is_cupys_extension_without_cupy(cupy: Any, nccl: Any) -> None:
    assert nccl.available
    assert nccl.NcclCommunicator.__module__ == "cupy_backends.cuda.libs.nccl"
    assert cupy.cuda.nccl is nccl
    assert "cupy._core" not in sys.modules


@pytest.mark.parametrize("forgotten", ["", "before", "behind", "array"])
def test_who_forgets_something_gets_garbage(
    cupy: Any, nccl: Any, communicator: Any, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "IDLE_SECONDS", math.inf)  # this machine may be slow
    compute, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    x, out = cupy.ones(COUNT) * 3, cupy.zeros(COUNT)
    x += 1
    if forgotten != "before":
        side.wait_event(compute.record())
    sum_into(communicator, nccl, x, out, side)
    if forgotten == "array":
        del x
    if forgotten != "behind":
        compute.wait_event(side.record())
    assert ((out + 1).get() == 5).all() == (not forgotten)


def test_a_call_is_made_when_its_stream_is_waited_for(
    stand_in: Any, cupy: Any, nccl: Any, communicator: Any
) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    x, out = cupy.ones(COUNT), cupy.zeros(COUNT)
    cupy.cuda.get_current_stream().synchronize()
    sum_into(communicator, nccl, x, out, side)
    assert stand_in.contents(out).tolist() == [0] * COUNT
    assert side.record().done
    assert stand_in.contents(out).tolist() == [1] * COUNT


def test_the_device_goes_on_if_nobody_waits(
    stand_in: Any, cupy: Any, nccl: Any, communicator: Any
) -> None:
    compute, side = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    x, out = cupy.ones(COUNT) * 2, cupy.zeros(COUNT)
    side.wait_event(compute.record())
    sum_into(communicator, nccl, x, out, side)
    deadline = time.monotonic() + 20
    while (stand_in.contents(out) != 2).any():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_goes_on_behind_a_call_that_was_aborted(
    stand_in: ModuleType, cupy: Any, nccl: Any, communicator: Any
) -> None:
    side = cupy.cuda.Stream(non_blocking=True)
    x, out = cupy.ones(COUNT), cupy.zeros(COUNT)
    side.wait_event(cupy.cuda.get_current_stream().record())
    release = stand_in.hold(side)
    sum_into(communicator, nccl, x, out, side)
    with side:
        y = x + 1
    assert not side.done
    communicator.abort()
    release()
    side.synchronize()
    assert stand_in.contents(out).tolist() == [0] * COUNT
    assert stand_in.contents(y).tolist() == [2] * COUNT
