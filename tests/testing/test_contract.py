"""The contract finds what it is there for: transports that are wrong in one way each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pytest

import mpidist
from mpidist import collectives
from mpidist._types import MIN
from mpidist.arrays.namespaces import HALVES
from mpidist.backends import algorithms
from mpidist.backends.base import Backend
from mpidist.backends.device.nccl.link import Link, NcclWork, SideStream
from mpidist.backends.device.staging import HostStaging
from mpidist.backends.verbs import (
    AllReduce,
    AllToAll,
    Broadcast,
    Collective,
    Reduce,
    ReduceScatter,
)
from mpidist.backends.work import Waiter, Work, wait_until
from mpidist.errors import TransportError
from mpidist.group import ProcessGroup
from mpidist.group.pending import DeviceGroupWork
from mpidist.testing import BackendContract, run_ranks
from mpidist.testing.contract import DeviceContract
from tests.nccl_stub.place import StandInPlace

C = TypeVar("C", bound=Collective)
Transfer: TypeAlias = Callable[[Collective, Waiter], "Work[Any]"]


def spoil_call(backend: Backend, verb: type[C], spoil: Callable[[C], Collective]) -> None:
    """Let a transport perform another call than the one of this verb."""
    original: Transfer = backend.transfer

    def transfer(call: Collective, waiter: Waiter) -> Work[Any]:
        return original(spoil(call) if isinstance(call, verb) else call, waiter)

    backend.transfer = transfer  # type: ignore[method-assign]


def waits_inside(backend: Backend) -> None:
    """Wait in the call that should only start."""
    original: Transfer = backend.transfer

    def transfer(call: Collective, waiter: Waiter) -> Work[Any]:
        work = original(call, waiter)
        if isinstance(call, AllReduce):
            wait_until(work.done, timeout=60, progress=backend.progress)
        return work

    backend.transfer = transfer  # type: ignore[method-assign]


def loses_nan(backend: Backend) -> None:
    """Let MIN ignore NaN, as C's comparison does."""

    def spoil(call: AllReduce) -> AllReduce:
        if call.op is MIN and call.x.dtype == np.float64:
            return replace(call, x=np.where(np.isnan(call.x), np.inf, call.x))
        return call

    spoil_call(backend, AllReduce, spoil)


def rounds_each_step(backend: Backend) -> None:
    """Sum halves pair by pair, rounding each time."""
    original: Transfer = backend.transfer

    def transfer(call: Collective, waiter: Waiter) -> Work[Any]:
        if not isinstance(call, AllReduce) or call.x.dtype not in HALVES:
            return original(call, waiter)
        lane = backend._next_lane()
        return backend.start(algorithms.ring_all_reduce(lane, call.x, call.out, call.op))

    backend.transfer = transfer  # type: ignore[method-assign]


def other_bits_on_one_rank(backend: Backend) -> None:
    """Change the last bit of a result on rank 1."""
    original: Transfer = backend.transfer

    def transfer(call: Collective, waiter: Waiter) -> Work[Any]:
        work = original(call, waiter)
        if not isinstance(call, AllReduce) or call.x.dtype != np.float32 or backend.rank != 1:
            return work
        wait_until(work.done, timeout=10, progress=backend.progress)
        call.out[-1:] = np.nextafter(call.out[-1:], np.float32(np.inf))
        return backend.start(iter(()))  # type: ignore[arg-type]

    backend.transfer = transfer  # type: ignore[method-assign]


def spoils_its_input(backend: Backend) -> None:
    """Use the input of a reduction as scratch memory."""

    def spoil(call: ReduceScatter) -> ReduceScatter:
        copy = replace(call, x=call.x.copy())
        call.x[...] = 0
        return copy

    spoil_call(backend, ReduceScatter, spoil)


def takes_root_for_granted(backend: Backend) -> None:
    """Broadcast from rank 0 whatever the root."""
    spoil_call(backend, Broadcast, lambda call: replace(call, root=0))


def swaps_counts(backend: Backend) -> None:
    """Mistake the counts that are received for those that are sent, where both add up."""

    def spoil(call: AllToAll) -> AllToAll:
        sent, received = call.send_counts, call.recv_counts
        if sum(sent) != sum(received):
            return call
        return replace(call, send_counts=received, recv_counts=sent)

    spoil_call(backend, AllToAll, spoil)


def claims_too_much(backend: Backend) -> None:
    """Offer 16-bit sums, but of small numbers only."""

    def spoil(call: Reduce) -> Reduce:
        x = call.x
        return replace(call, x=np.clip(x, -9999, 9999) if x.dtype == np.int16 else x)

    spoil_call(backend, Reduce, spoil)


FAKES: dict[Callable[[Backend], None], tuple[str, str]] = {
    waits_inside: ("test_immediate", "recv|iall_reduce|did not end"),
    loses_nan: ("test_not_a_number", r"all_reduce MIN float64, NaN of rank"),
    rounds_each_step: ("test_halves_round_once", r"all_reduce SUM of \d+ "),
    other_bits_on_one_rank: ("test_same_bits", r"ranks \[1\] hold other bits"),
    spoils_its_input: ("test_every_reduce_scatter", "the input afterwards"),
    takes_root_for_granted: ("test_every_root", r"broadcast\(float64.*root=[12]\)"),
    swaps_counts: ("test_uneven_counts", r"all_to_all\(|receive on rank"),
    claims_too_much: ("test_every_reduce", r"reduce\(int16, .*SUM"),
}


@pytest.mark.parametrize("spoil", FAKES, ids=lambda spoil: spoil.__name__)
def test_a_wrong_transport_is_found(spoil: Callable[[Backend], None]) -> None:
    name, words = FAKES[spoil]

    def run(case: Callable[[ProcessGroup], None]) -> None:
        def on_rank(group: ProcessGroup) -> None:
            spoil(group.transport)
            case(group)

        run_ranks(3, on_rank, timeout=0.5 if spoil is waits_inside else 20)

    method = getattr(BackendContract(), name)
    with pytest.raises((AssertionError, TimeoutError, TransportError), match=words):
        method(run)


# -- of device arrays --------------------------------------------------------------------------


def forgets_the_event_before(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Begin before what is on the current stream has been done."""
    patch.setattr(SideStream, "wait_for_current", lambda side: None)


def forgets_the_event_after(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Let the current stream go on before the operation is over."""
    patch.setattr(NcclWork, "order", lambda work: None)


def drops_its_arrays(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Keep none of the arrays that NCCL reads and writes."""
    hold = Link.hold
    patch.setattr(Link, "hold", lambda self, held, waiter: hold(self, (), waiter))


def waits_on_the_host(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Wait for the device where only the current stream has to."""
    order, cuda = NcclWork.order, importlib.import_module("cupy").cuda

    def blocks(work: NcclWork) -> None:
        order(work)
        cuda.get_current_stream().synchronize()

    patch.setattr(NcclWork, "order", blocks)


def goes_by_the_host(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Copy to the host and back, and say nothing of it."""
    world.transport.device = HostStaging(world.transport)


def leaves_results_on_the_host(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Copy to the host, and leave the result there."""
    right = collectives.all_reduce
    patch.setattr(collectives, "all_reduce", lambda *args, **kwargs: right(*args, **kwargs).get())


def takes_begun_for_done(patch: pytest.MonkeyPatch, world: ProcessGroup) -> None:
    """Return from `synchronize` when the operation is on its stream."""
    patch.setattr(DeviceGroupWork, "synchronize", DeviceGroupWork.wait)


DEVICE_FAKES: list[tuple[Callable[[pytest.MonkeyPatch, ProcessGroup], None], str, str]] = [
    (forgets_the_event_before, "test_behind_a_slow_kernel", "all_reduce behind a slow kernel"),
    (forgets_the_event_before, "test_other_streams", "on a stream of the user's own"),
    (forgets_the_event_before, "test_every_all_reduce", r"all_reduce\("),
    (forgets_the_event_after, "test_consumers", "what follows a blocking all_reduce"),
    (forgets_the_event_after, "test_late_consumers", "another stream behind wait"),
    (forgets_the_event_after, "test_two_groups", "a sum on one group of a sum on another"),
    (forgets_the_event_after, "test_every_all_reduce", r"all_reduce\("),
    (drops_its_arrays, "test_freed_memory", "freed too early"),
    (drops_its_arrays, "test_temporaries", "a result that is not contiguous"),
    (waits_on_the_host, "test_the_host_goes_on", r"waited for the device on ranks \[0\]"),
    (goes_by_the_host, "test_the_host_goes_on", r"waited for the device on ranks \[0\]"),
    (leaves_results_on_the_host, "test_every_all_reduce", "expected a device array, got ndarray"),
    (takes_begun_for_done, "test_synchronized", "not done after synchronize"),
]


@pytest.mark.parametrize(
    ("spoil", "case", "words"),
    [pytest.param(*fake, id=f"{fake[0].__name__}-{fake[1]}") for fake in DEVICE_FAKES],
)
def test_a_wrong_transport_of_device_arrays_is_found(
    spoil: Callable[[pytest.MonkeyPatch, ProcessGroup], None],
    case: str,
    words: str,
    stand_in: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contract = DeviceContract()
    contract.place = StandInPlace(importlib.import_module("cupy"))
    with mpidist.init("hybrid") as world, monkeypatch.context() as patch:
        spoil(patch, world)
        with pytest.raises(AssertionError, match=words):
            getattr(contract, case)(lambda case: case(world))


def test_every_method_says_what_it_asks() -> None:
    methods = [getattr(BackendContract, name) for name in vars(BackendContract) if "test_" in name]
    assert len(methods) > 40
    for method in methods:
        assert method.__doc__
