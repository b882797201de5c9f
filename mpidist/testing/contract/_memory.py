"""Where the arrays of the cases lie: in the host's memory, or on a device.

Cases make their inputs, and all that they expect, with numpy. A place brings an input to where the
verb is to find it, and a result back for the comparison.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from mpidist import collectives
from mpidist._types import Array, DType
from mpidist.arrays.namespaces import DTYPES
from mpidist.backends.capabilities import Capabilities
from mpidist.group import ProcessGroup
from mpidist.testing.contract._landings import (
    HOST_LANDINGS,
    HOST_LAYOUTS,
    LANDINGS,
    LAYOUTS,
    Landing,
    Layout,
)
from mpidist.testing.contract._values import check_that


class Place(ABC):
    """Where the arrays of a case lie; the layouts of inputs there, and of an `out`."""

    layouts: tuple[Layout, ...] = LAYOUTS
    landings: tuple[Landing, ...] = LANDINGS

    @abstractmethod
    def put(self, x: Array) -> Array:
        """Return the elements of a host array at this place, contiguous."""

    @abstractmethod
    def take(self, x: Any) -> Any:
        """Return a result as a host array; None stays None, and what lies elsewhere is an error.

        The copy is made in the order of the current stream, right behind what the verb, or
        `Work.wait`, has left there: nothing else makes it wait for the result.
        """

    @abstractmethod
    def capabilities(self, group: ProcessGroup) -> Capabilities:
        """Return what the group does with arrays that lie here."""

    @abstractmethod
    def ready(self, group: ProcessGroup) -> None:
        """Do what must be done before messages and immediate calls; collective, may block."""

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """Every dtype that mpidist moves and this place can hold."""
        return tuple(sorted(DTYPES, key=str))

    @property
    def on_host(self) -> bool:
        """Whether this is the host's memory."""
        return False


class HostPlace(Place):
    """The host's memory: numpy's own arrays."""

    layouts = (*LAYOUTS, *HOST_LAYOUTS)
    landings = (*LANDINGS, *HOST_LANDINGS)
    on_host = True

    def put(self, x: Array) -> Array:
        """Return `x` itself."""
        return x

    def take(self, x: Any) -> Any:
        """Return `x` itself; `expect` finds out whether it is a host array."""
        return x

    def capabilities(self, group: ProcessGroup) -> Capabilities:
        """Return what the group does with host arrays."""
        return group.capabilities

    def ready(self, group: ProcessGroup) -> None:
        """Do nothing: a group carries host arrays from its beginning."""


HOST = HostPlace()


_SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
  long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}
"""


class DevicePlace(Place):
    """The memory of the current device.

    Parameters
    ----------
    cupy : module
        Makes and holds the arrays.
    """

    def __init__(self, cupy: ModuleType) -> None:
        self.cupy = cupy

    def put(self, x: Array) -> Array:
        """Return a copy on the device, made in the order of the current stream."""
        copied: Array = self.cupy.asarray(np.asarray(x, order="C"))
        return copied

    def take(self, x: Any) -> Any:
        """Return a copy on the host, made in the order of the current stream."""
        if x is None:
            return None
        check_that(
            isinstance(x, self.cupy.ndarray), f"expected a device array, got {type(x).__name__}"
        )
        return x.get()

    def capabilities(self, group: ProcessGroup) -> Capabilities:
        """Return what the group does with device arrays."""
        offered = group.device_capabilities
        if offered is None:
            raise AssertionError(f"{group} carries no device arrays")
        return offered

    def ready(self, group: ProcessGroup) -> None:
        """Let the group make its communicator, which its first collective on a device does."""
        collectives.iall_reduce(self.put(np.zeros(1)), group).synchronize()

    def busy(self, seconds: float) -> None:
        """Keep the current stream busy, as a slow kernel does; returns at once."""
        spin = self.cupy.RawKernel(_SPIN, "spin")
        spin((1,), (1,), (np.int64(seconds * 1e9),))

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """Every dtype that this CuPy knows: bfloat16 came with CuPy 14."""
        return tuple(dtype for dtype in super().dtypes if self._holds(dtype))

    def _holds(self, dtype: DType) -> bool:
        try:
            self.cupy.empty(0, dtype)
        except (TypeError, ValueError):
            return False
        return True


P = TypeVar("P", bound=Place)


def with_peers(case: Callable[[ProcessGroup, P], None]) -> Callable[[ProcessGroup, P], None]:
    """Make a case do nothing where the group is a single rank, which has nobody to talk to."""

    @wraps(case)
    def run(group: ProcessGroup, device: P) -> None:
        if group.size > 1:
            case(group, device)

    return run
