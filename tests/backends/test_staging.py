"""Device arrays by way of the host, on the stand-in for CuPy: simulated ranks, and ranks of MPI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import mpidist
from mpidist.backends.device import cuda_aware, staging
from mpidist.backends.device.staging import HostStaging
from mpidist.backends.simulated.backend import SimulatedBackend
from mpidist.group import ProcessGroup
from mpidist.testing import run_ranks
from mpidist.testing.contract import DeviceContract, Run
from tests.nccl_stub.place import StandInPlace

pytestmark = pytest.mark.usefixtures("stand_in_without_nccl")

ITEMS = 16
"""Elements of a chunk in the tests that make chunks small."""


def on_devices(
    size: int, fn: Callable[[ProcessGroup], Any], *, aware: Sequence[int] = ()
) -> list[Any]:
    """Call a function on simulated ranks, each with a device, whose groups stage its arrays."""

    def staged(group: ProcessGroup) -> Any:
        sys.modules["cupy"].cuda.Device(group.rank % 4).use()
        group.transport.device = HostStaging(group.transport, aware=group.rank in aware)
        return fn(group)

    return run_ranks(size, staged)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_CHUNK", ITEMS * 8)


def array(values: Any) -> Any:
    return sys.modules["cupy"].asarray(np.asarray(values))


@pytest.mark.parametrize("size", [1, 3])
class TestStaging(DeviceContract):
    # It does not: `wait` returns when the host's part is over.
    test_the_host_goes_on = None

    @pytest.fixture
    def run(self, size: int) -> Run:
        self.place = StandInPlace(sys.modules["cupy"])
        return partial(on_devices, size)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [0, 1, ITEMS - 1, ITEMS, ITEMS + 1, 5 * ITEMS + 3])
def test_any_number_of_chunks(count: int) -> None:
    parts = [np.arange(count, dtype=float) + 10**rank for rank in range(3)]

    def body(group: ProcessGroup) -> list[np.ndarray[Any, Any]]:
        mine = array(parts[group.rank])
        copied = mpidist.broadcast(mine, group, root=1)
        total = mpidist.all_reduce(mine, group)
        at_root = mpidist.reduce(mine, group, root=2)
        mpidist.all_reduce(mine, group, op=mpidist.MAX, out=mine)
        return [x.get() for x in (copied, total, mine, *([] if at_root is None else [at_root]))]

    told = on_devices(3, body)
    expected = [parts[1], sum(parts), parts[2], sum(parts)]
    for rank, results in enumerate(told):
        assert len(results) == 3 + (rank == 2)
        for result, wanted in zip(results, expected, strict=False):
            np.testing.assert_array_equal(result, wanted)


@pytest.mark.usefixtures("small_chunks")
def test_the_next_chunk_is_on_its_way_while_one_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, int]] = []
    to_host, transfer = staging._PinnedBuffers.to_host, SimulatedBackend.transfer

    def fetched(its: Any, copies: Any) -> Any:
        happened.append(("to_host", len(copies)))
        return to_host(its, copies)

    def transferred(backend: Any, call: Any, waiter: Any) -> Any:
        happened.append((call.verb, call.x.size))
        return transfer(backend, call, waiter)

    def body(group: ProcessGroup) -> Any:
        x = array(np.ones(2 * ITEMS + 1))
        mpidist.all_reduce(x, group)
        # What is asked for first is to connect; only the second one is looked at.
        del happened[:]
        monkeypatch.setattr(staging._PinnedBuffers, "to_host", fetched)
        monkeypatch.setattr(SimulatedBackend, "transfer", transferred)
        return mpidist.all_reduce(x, group).get()

    on_devices(1, body)
    sums = [("all_reduce", ITEMS), ("all_reduce", ITEMS), ("all_reduce", 1)]
    assert happened == [("to_host", 1), ("to_host", 1), sums[0], ("to_host", 1), sums[1], sums[2]]


@pytest.mark.usefixtures("small_chunks")
def test_operations_follow_each_other_on_all_ranks() -> None:
    """Begun without waiting, of several chunks each, and ended in another order."""

    def body(group: ProcessGroup) -> list[Any]:
        works = [
            mpidist.iall_reduce(array(np.full(3 * ITEMS, float(group.rank + i))), group)
            for i in range(4)
        ]
        order = works if group.rank else works[::-1]
        for work in order:
            work.wait()
        return [work.wait().get() for work in works]

    for results in on_devices(3, body):
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, np.full(3 * ITEMS, 3.0 + 3 * i))


def test_a_slow_kernel_before_and_a_reader_after() -> None:
    """The copy waits for what the current stream does, and that stream for the copy back."""

    def body(group: ProcessGroup) -> Any:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Stream(non_blocking=True):
            x = cupy.zeros(5) + group.rank
            work = mpidist.iall_reduce(x * 2, group)
        with cupy.cuda.Stream(non_blocking=True) as reader:
            result = work.wait() + 1
            return result.get(stream=reader)

    for result in on_devices(2, body):
        np.testing.assert_array_equal(result, np.full(5, 3.0))


def test_synchronize_waits_for_the_device() -> None:
    def body(group: ProcessGroup) -> bool:
        work = mpidist.iall_reduce(array(np.ones(3)), group)
        work.synchronize()
        return work.done()

    assert on_devices(2, body) == [True, True]


@pytest.mark.usefixtures("small_chunks")
def test_the_rank_may_be_at_work_on_another_device_meanwhile() -> None:
    """The device refuses events of one device on a stream of another."""

    def body(group: ProcessGroup) -> Any:
        cupy = sys.modules["cupy"]
        work = mpidist.iall_reduce(array(np.ones(5 * ITEMS)), group)
        with cupy.cuda.Device(3):
            while not work.done():
                pass
        return work.wait().get()

    for result in on_devices(2, body):
        np.testing.assert_array_equal(result, np.full(5 * ITEMS, 2.0))


def test_messages_before_the_ranks_are_connected_are_refused() -> None:
    def body(group: ProcessGroup) -> None:
        with pytest.raises(mpidist.UnsupportedOperationError, match="call a collective on one"):
            mpidist.send(array([1.0]), group, dst=1 - group.rank)

    on_devices(2, body)


def test_an_array_on_another_device_is_refused() -> None:
    def body(group: ProcessGroup) -> None:
        cupy = sys.modules["cupy"]
        mpidist.all_reduce(array([1.0]), group)
        with cupy.cuda.Device(3):
            elsewhere = array([1.0])
        with pytest.raises(mpidist.UnsupportedOperationError, match="lies on device 3, and this"):
            mpidist.all_reduce(elsewhere, group)

    on_devices(2, body)


def moves(group: ProcessGroup) -> list[Any]:
    """Broadcast, pass around and sum; what arrives is compared by `check_moves`."""
    x = array(np.arange(4.0) + group.rank)
    got = [mpidist.broadcast(x, group, root=1).get(), mpidist.all_reduce(x, group).get()]
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return [*got, mpidist.sendrecv(x, group, dst=after, src=before).get()]


def check_moves(results: list[Any], rank: int, size: int) -> None:
    base = np.arange(4.0)
    np.testing.assert_array_equal(results[0], base + 1)
    np.testing.assert_array_equal(results[1], size * base + sum(range(size)))
    np.testing.assert_array_equal(results[2], base + (rank - 1) % size)


def test_ranks_must_agree_on_an_aware_transport() -> None:
    def body(group: ProcessGroup) -> None:
        with pytest.raises(mpidist.BackendUnavailableError, match="on some ranks only"):
            mpidist.all_reduce(array([1.0]), group)

    on_devices(2, body, aware=[1])


@pytest.fixture
def fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDIST_ENABLE_GPU_FALLBACK", "1")
    monkeypatch.delenv("MPIDIST_CUDA_AWARE_MPI", raising=False)


@pytest.mark.ranks(3)
def test_on_ranks_of_mpi(
    stand_in_without_nccl: ModuleType, fallback: None, world: ProcessGroup
) -> None:
    assert world.backend == "hybrid"
    assert sys.modules["cupy"].cuda.Device().id == world.local_rank
    check_moves(moves(world), world.rank, world.size)
    half = world.split(world.rank % 2)
    assert half is not None
    x = array(np.full(3_000_000, float(world.rank)))  # three chunks
    members = [rank for rank in range(world.size) if rank % 2 == world.rank % 2]
    np.testing.assert_array_equal(mpidist.all_reduce(x, half).get(), float(sum(members)))
    half.close()


@pytest.mark.ranks(2)
def test_mpi_gets_device_arrays_where_it_says_that_it_takes_them(
    stand_in_without_nccl: ModuleType,
    fallback: None,
    monkeypatch: pytest.MonkeyPatch,
    rank_count: int,
) -> None:
    """The library here takes the stand-in's arrays, whose memory is the host's."""
    copies: list[int] = []
    to_host = staging._PinnedBuffers.to_host

    def fetched(its: Any, some: Any) -> Any:
        copies.append(len(some))
        return to_host(its, some)

    monkeypatch.setattr(staging._PinnedBuffers, "to_host", fetched)
    monkeypatch.setenv("MPIDIST_CUDA_AWARE_MPI", "1")
    monkeypatch.setattr(cuda_aware, "ask_mpi", lambda mpi, path: (True, "for the test"))
    with mpidist.init() as world:
        check_moves(moves(world), world.rank, rank_count)
    assert copies == [0, 1, 0], "a broadcast, a sum by way of the host, and a message"


@pytest.mark.ranks(1)
def test_mpi_that_is_not_aware_is_an_error_at_init(
    stand_in_without_nccl: ModuleType, fallback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIDIST_CUDA_AWARE_MPI", "1")
    with pytest.raises(mpidist.BackendUnavailableError, match="this MPI library is not CUDA-aware"):
        mpidist.init("hybrid")


@pytest.mark.ranks(2)
def test_without_the_variable_device_arrays_are_refused(
    stand_in_without_nccl: ModuleType, monkeypatch: pytest.MonkeyPatch, rank_count: int
) -> None:
    monkeypatch.delenv("MPIDIST_ENABLE_GPU_FALLBACK", raising=False)
    with mpidist.init() as world:
        for verb in (mpidist.all_reduce, mpidist.gpu_all_reduce, mpidist.gpu_broadcast):
            with pytest.raises(mpidist.UnsupportedOperationError) as caught:
                verb(array([1.0]), world)
            for words in ("finds no NCCL", "mpidist[cuda12]", "MPIDIST_ENABLE_GPU_FALLBACK=1"):
                assert words in str(caught.value)
        assert int(mpidist.all_reduce(np.array(1), world)) == rank_count


def gpu_verbs(group: ProcessGroup) -> None:
    """Sum and broadcast device arrays, also into given ones; be refused with those of the host."""
    x, out = array(np.arange(3.0) + group.rank), array(np.zeros(3))
    expected = group.size * np.arange(3.0) + sum(range(group.size))
    np.testing.assert_array_equal(mpidist.gpu_all_reduce(x, group).get(), expected)
    assert mpidist.gpu_broadcast(x, group, root=group.size - 1, out=out) is out
    np.testing.assert_array_equal(out.get(), np.arange(3.0) + group.size - 1)
    mpidist.gpu_all_reduce(x, group, op=mpidist.MAX, out=x)
    np.testing.assert_array_equal(x.get(), np.arange(3.0) + group.size - 1)
    with pytest.raises(mpidist.UnsupportedOperationError, match=r"x is numpy.ndarray.*asarray"):
        mpidist.gpu_all_reduce(np.zeros(3), group)
    with pytest.raises(mpidist.UnsupportedOperationError, match=r"out is numpy.ndarray.*broadcast"):
        mpidist.gpu_broadcast(x, group, out=np.zeros(3))


def test_collectives_of_device_arrays_only() -> None:
    on_devices(3, gpu_verbs)


@pytest.mark.ranks(2)
def test_collectives_of_device_arrays_only_on_ranks_of_mpi(
    stand_in_without_nccl: ModuleType, fallback: None, world: ProcessGroup
) -> None:
    gpu_verbs(world)
