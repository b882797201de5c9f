"""NCCL between the ranks of a group: the verbs on device arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from mpidist._threads import run_in_thread
from mpidist._types import Array, ReduceOp
from mpidist.arrays.namespaces import device_module
from mpidist.backends.base import Backend
from mpidist.backends.capabilities import Capabilities
from mpidist.backends.device.base import DeviceBackend
from mpidist.backends.device.nccl import calls
from mpidist.backends.device.nccl.communicator import NcclCommunicator
from mpidist.backends.device.nccl.dtypes import REDUCTIONS
from mpidist.backends.device.nccl.identity import check_devices, gather_facts, own_facts
from mpidist.backends.device.nccl.link import Link, NcclWork
from mpidist.backends.device.nccl.plans import Operation, Plans
from mpidist.backends.device.nccl.streams import Side
from mpidist.backends.device.nccl.unique_id import NcclUniqueId
from mpidist.backends.verbs import Collective
from mpidist.backends.work import Message, Waiter
from mpidist.errors import TransportError, UnsupportedOperationError

__all__ = ["NcclBackend"]

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


def _begin_all(operations: Sequence[Operation], communicator: NcclCommunicator) -> None:
    """Make the calls of operations; several begin as one."""
    if len(operations) == 1 and not operations[0].several:
        operations[0].call(communicator)
        return
    with communicator.together():
        for operation in operations:
            operation.call(communicator)


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
        facts = gather_facts(own_facts(self._host.node()), self._host, waiter)
        check_devices(facts)
        unique_id = NcclUniqueId.share(self._host, waiter)
        device: int = device_module().cuda.Device().id
        side = Side()
        made = _call_with_deadline(
            device,
            lambda: NcclCommunicator(self.size, self.rank, unique_id, device, side.handle),
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
        if link is None or link.communicator is None or not calls.can_split():
            return child
        # The library wants nothing to be outstanding on the parent.
        waiter.wait_for(link.idle)
        communicator, device = link.communicator, link.device
        with device_module().cuda.Device(device):
            side = Side()
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
        link.call(lambda: waiter, _begin_all, operations, link.communicator)
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
