"""NCCL between the ranks of a group: the verbs on device arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mpidist import env
from mpidist._threads import run_in_thread
from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import device_module
from mpidist.backends.availability import why_no_nccl
from mpidist.backends.base import Backend
from mpidist.backends.capabilities import Capabilities
from mpidist.backends.device.base import DeviceBackend
from mpidist.backends.device.nccl.communicator import (
    NcclCommunicator,
    can_split,
    share_unique_id,
    version,
)
from mpidist.backends.device.nccl.dtypes import REDUCTIONS
from mpidist.backends.device.nccl.link import Link, NcclWork, SideStream
from mpidist.backends.device.nccl.plans import Operation, Plans
from mpidist.backends.verbs import AllGather, Collective
from mpidist.backends.work import Message, Waiter
from mpidist.errors import (
    BackendUnavailableError,
    LaunchError,
    TransportError,
    UnsupportedOperationError,
)

_TEXT_BYTES, _REASON_LETTERS = 1024, 400
"""Bytes of the facts of a rank as JSON, and letters of a reason in them."""

_SHARED_SINCE = 23003
"""The NCCL that lets several ranks use one GPU, if the environment says so: 2.30.3."""

T = TypeVar("T")


def _call_with_deadline(device: int, function: Callable[[], T], waiter: Waiter) -> T:
    """Call what may block in the library from a thread, and wait for it with a deadline."""

    def call() -> T:
        device_module().cuda.Device(device).use()
        return function()

    future = run_in_thread(call, name="mpidist-nccl")
    waiter.wait_for(future.done)
    try:
        return future.result()
    except TransportError as error:
        raise TransportError(f"{waiter.told}: {error}", error.code) from error


def _gather_facts(host: Backend, waiter: Waiter) -> list[dict[str, Any]]:
    """Return what `check_devices` needs of every rank; collective, blocks."""
    reason = why_no_nccl()
    own: dict[str, Any]
    if reason is not None:
        own = {"lacks": reason[:_REASON_LETTERS]}
    else:
        cuda = device_module().cuda
        device = cuda.Device().id
        own = {
            "node": host.node(),
            "device": device,
            "bus": cuda.runtime.deviceGetPCIBusId(device),
            "nccl": version(),
            "shared": env.allows_shared_devices(),
        }
    sent = np.frombuffer(json.dumps(own).encode().ljust(_TEXT_BYTES), np.uint8)
    rows = np.empty((host.size, _TEXT_BYTES), np.uint8)
    host.run(AllGather(sent, rows.reshape(-1), (_TEXT_BYTES,) * host.size), waiter=waiter)
    return [json.loads(row.tobytes()) for row in rows]


def check_devices(facts: Sequence[dict[str, Any]]) -> None:
    """Raise, on all ranks alike, where NCCL could not connect these ranks.

    Raises
    ------
    LaunchError
        If two ranks use one device, and are not allowed to.
    BackendUnavailableError
        If a rank lacks something, or ranks have different releases of NCCL.
    """
    for rank, fact in enumerate(facts):
        if "lacks" in fact:
            raise BackendUnavailableError(f"NCCL: on rank {rank}, {fact['lacks']}")
    versions = {fact["nccl"] for fact in facts}
    if len(versions) > 1:
        releases = ", ".join(f"rank {rank} {fact['nccl']}" for rank, fact in enumerate(facts))
        raise BackendUnavailableError(
            f"NCCL: the ranks have different releases of the library: {releases}; use one "
            "environment on all nodes"
        )
    allowed = all(fact["shared"] for fact in facts) and min(versions) >= _SHARED_SINCE
    users: dict[tuple[int, str], int] = {}
    for rank, fact in enumerate(facts):
        first = users.setdefault((fact["node"], fact["bus"]), rank)
        if first != rank and not allowed:
            raise LaunchError(
                f"NCCL: ranks {first} and {rank} both use GPU {fact['bus']} (device "
                f"{fact['device']} there), which NCCL refuses, or hangs on. Start at most one rank "
                "per GPU (mpirun -n GPUS; srun --ntasks-per-node=GPUS --gpus-per-node=GPUS), and "
                "import cupy before mpidist.init, which gives each a GPU of its own then; with "
                f"NCCL 2.30.3 or newer (here {fact['nccl']}) NCCL_MULTI_RANK_GPU_ENABLE=1 on all "
                "ranks allows it"
            )


class NcclBackend(DeviceBackend[Backend]):
    """Device arrays of one group over NCCL.

    The first operation connects the ranks, on the device that is current then.

    Parameters
    ----------
    host : Backend
        The transport of host arrays between the same ranks.
    """

    name = "nccl"

    def __init__(self, host: Backend) -> None:
        super().__init__()
        self.rank, self.size = host.rank, host.size
        self.capabilities = Capabilities(
            reductions=REDUCTIONS,
            max_tag=0,
            any_source=False,
            unknown_shapes=False,
            halves_rounded_once=False,
        )
        self._host = host
        self._plans = Plans(host.rank)
        self._link: Link | None = None

    @property
    def chosen(self) -> int | None:
        """The device on which the ranks were connected; None before that."""
        return None if self._link is None else self._link.device

    @property
    def communicator(self) -> NcclCommunicator | None:
        """What connects the ranks; None before their first operation, and when it is closed."""
        return None if self._link is None else self._link.communicator

    # -- connecting ----------------------------------------------------------------------------

    def prepare(self, waiter: Waiter) -> None:
        """Connect the ranks, the first time; see `DeviceBackend.prepare`.

        Raises
        ------
        LaunchError
            If two ranks use one device.
        BackendUnavailableError
            If they have different releases of NCCL.
        CollectiveTimeoutError
            If they are not connected within the group's timeout.
        TransportError
            If NCCL fails on this rank.
        """
        if self._link is not None:
            return
        check_devices(_gather_facts(self._host, waiter))
        unique_id = share_unique_id(self._host, waiter)
        device: int = device_module().cuda.Device().id
        side = SideStream()
        made = _call_with_deadline(
            device,
            lambda: NcclCommunicator.connect(self.size, self.rank, unique_id, side.handle),
            waiter,
        )
        self._link = Link(made, side, device)

    def split(
        self, color: int | None, key: int, host: Backend | None, waiter: Waiter
    ) -> NcclBackend | None:
        """Make the transport of a new group; see `DeviceBackend.split`.

        Where the ranks are connected and NCCL can, the new communicators come of this one; else
        they are connected when they are used first.
        """
        child = None if host is None else NcclBackend(host)
        link = self._link
        if link is None or link.communicator is None or not can_split():
            return child
        # The library wants nothing to be outstanding on the parent.
        waiter.wait_for(link.idle)
        communicator, device = link.communicator, link.device
        with device_module().cuda.Device(device):
            side = SideStream()
        split = partial(communicator.split, color, key, side.handle)
        made = _call_with_deadline(device, split, waiter)
        if child is not None and made is not None:
            child._link = Link(made, side, device)
        return child

    def create(self, host: Backend) -> NcclBackend:
        """Make the transport of some ranks; it is connected when it is used first."""
        return NcclBackend(host)

    # -- operations ----------------------------------------------------------------------------

    def begin(self, collective: Collective, waiter: Waiter) -> NcclWork:
        """Start a collective; see `DeviceBackend.begin`."""
        operations = [member.by(self._plans) for member in collective.together]
        return self._perform(operations, collective.arrays, waiter)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], waiter: Waiter
    ) -> NcclWork:
        """Start several messages; see `DeviceBackend.exchange`."""
        if self._link is None:
            raise UnsupportedOperationError(
                f"{waiter.operation}: messages of device arrays need the ranks to be connected, "
                "which takes all of them: let all perform a collective on a device array of this "
                "group first, such as all_reduce(cupy.zeros(1), group)"
            )
        return self._perform([self._plans.messages(sends, receives)], (sends, receives), waiter)

    def _perform(
        self, operations: Sequence[Operation], held: tuple[Any, ...], waiter: Waiter
    ) -> NcclWork:
        """Put operations on the side stream, behind the current one."""
        link = self._link
        assert link is not None, "prepared before"

        def begin(communicator: NcclCommunicator) -> None:
            if len(operations) == 1 and not operations[0].several:
                operations[0].call(communicator)
                return
            with communicator.together():
                for operation in operations:
                    operation.call(communicator)

        link.call(lambda: waiter, begin, link.communicator)
        for operation in operations:
            if operation.after is not None:
                with link.side.stream:
                    operation.after()
        return link.hold((held, operations), lambda: waiter)

    def repeat_sum(self, x: Array, op: ReduceOp, waiter: Callable[[], Waiter]) -> NcclWork | None:
        """Begin an all_reduce in place if its array needs no preparation; else do nothing.

        The shortest way to the library: a plan and its checks take longer than a small sum.
        """
        link = self._link
        if link is None or link.communicator is None:
            return None
        wire = self._plans.direct_sum(x, op)
        lies: int = x.data.device_id  # type: ignore[attr-defined]  # cupy's
        if wire is None or not lies == link.device == link.side.current_device():
            return None
        link.call(waiter, link.communicator.all_reduce, x, x, wire, op)
        return link.hold((x,), waiter)

    # -- what is under way -----------------------------------------------------------------------

    def idle(self) -> bool:
        """Release finished operations; return whether none is pending."""
        return self._link is None or self._link.idle()

    def fence(self) -> Callable[[], bool]:
        """Return a function that says whether the current stream has done its work up to now."""
        return (lambda: True) if self._link is None else self._link.side.fence()

    def abandon(self, error: BaseException) -> None:
        """End what is under way; see `DeviceBackend.abandon`."""
        if self._link is not None:
            self._link.abandon(error)

    def close(self) -> None:
        """Release the communicator; nothing is under way any more."""
        if self._link is not None:
            self._link.close()
