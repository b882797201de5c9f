"""The contract between the verbs and the transports of device arrays.

Operations on a device are put on a stream, and the host goes on: what a group waits for is the
order of the streams, not the end of the operation. So these transports have an interface of their
own, and `mpidist.backends.base.Backend` has a place for one of them: see `Backend.device`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from mpidist.arrays.namespaces import array_namespace
from mpidist.backends.verbs import Collective
from mpidist.backends.work import Message, PolledWork, Waiter
from mpidist.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from mpidist._types import Array, ReduceOp
    from mpidist.backends.capabilities import Capabilities

H = TypeVar("H")
"""The transport of host arrays that it belongs to."""


class DeviceWork(PolledWork):
    """An operation on device arrays under way; it holds them until the device is done with them."""

    _then: Callable[[], None] | None = None

    @abstractmethod
    def order(self) -> None:
        """Let the current stream go on only behind this operation; the host does not wait."""

    def when_over(self, then: Callable[[], None]) -> None:
        """Call this when the operation is seen to be over."""
        self._then = then


class DeviceBackend(ABC, Generic[H]):
    """Moves device arrays between the ranks of one group.

    Attributes
    ----------
    name : str
        Name of the transport, for messages.
    capabilities : Capabilities
        What it can do.
    compares_calls : bool
        Whether it compares what the ranks call, later than `begin` returns.
    """

    compares_calls = False

    name: str
    capabilities: Capabilities

    def __init__(self) -> None:
        self._kept: list[tuple[Callable[[], bool], object]] = []

    def keep(self, what: object) -> None:
        """Hold something until what is on the current stream by now has been done.

        Memory goes back to the stream on which it was made: whatever another stream still reads has
        to be held.
        """
        self._kept = [(reached, held) for reached, held in self._kept if not reached()]
        self._kept.append((self.fence(), what))

    def abandon(self, error: BaseException) -> None:  # optional
        """End what is under way: the group is broken, by this error."""

    @abstractmethod
    def prepare(self, waiter: Waiter) -> None:
        """Connect the ranks, the first time; collective, blocks."""

    @abstractmethod
    def begin(self, collective: Collective, waiter: Waiter) -> DeviceWork:
        """Start a collective behind what is on the current stream, and return at once.

        Those of a `Together` are all started at once.
        """

    def repeat_sum(self, x: Array, op: ReduceOp, waiter: Callable[[], Waiter]) -> DeviceWork | None:
        """Begin an all_reduce in place at once, if that needs no plan; else return None."""
        return None

    @abstractmethod
    def idle(self) -> bool:
        """Make progress, and return whether nothing is under way."""

    @abstractmethod
    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], waiter: Waiter
    ) -> DeviceWork:
        """Start several messages at once; between two ranks they match in order, without lanes."""

    @abstractmethod
    def fence(self) -> Callable[[], bool]:
        """Return a function that says whether the current stream has done its work up to now."""

    @abstractmethod
    def split(
        self, color: int | None, key: int, host: H | None, waiter: Waiter
    ) -> DeviceBackend[H] | None:
        """Make the transport that belongs to the host's new one; collective over all, blocks."""

    @abstractmethod
    def create(self, host: H) -> DeviceBackend[H]:
        """Make the transport that belongs to the host's new one of some ranks; does not block."""

    @property
    @abstractmethod
    def chosen(self) -> int | None:
        """The device of this rank's arrays; None until the first operation chooses it."""

    def check_device(self, x: Array, what: str) -> None:
        """Raise unless an array lies on this rank's device, and that is this thread's current one.

        `what` names the operation, its group and the array.
        """
        current: int = array_namespace(x).cuda.Device().id
        device = current if self.chosen is None else self.chosen
        lies: int = x.device.id  # type: ignore[attr-defined]  # cupy's
        if lies != device:
            raise UnsupportedOperationError(
                f"{what} lies on device {lies}, and this rank's is device {device}; copy it there "
                f"(with cupy.cuda.Device({device}): cupy.array(x)), or choose the device by "
                "cupy.cuda.Device(i).use() before the group's first operation"
            )
        if current != device:
            # What an operation makes lies on the current device, and its streams are that one's.
            raise UnsupportedOperationError(
                f"{what} lies on device {device}, as it has to, but the current device of this "
                f"thread is {current}: call it inside of 'with cupy.cuda.Device({device}):', or "
                f"let the thread begin with cupy.cuda.Device({device}).use()"
            )

    @abstractmethod
    def close(self) -> None:
        """Release what the transport holds; nothing is under way any more."""
