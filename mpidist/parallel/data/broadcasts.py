"""What rank 0 sends to all: parameters at the start, buffers in each step, the order once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import array_namespace
from mpidist.backends.work import Deadline, Work
from mpidist.collectives import broadcast, ibroadcast
from mpidist.group import ProcessGroup
from mpidist.nn.names import former_names

__all__ = ["BucketOrder", "BufferSync", "OrderedGradients", "broadcast_in_place"]


def broadcast_in_place(arrays: Iterable[Array], group: ProcessGroup) -> None:
    """Overwrite arrays with rank 0's.

    Parameters
    ----------
    arrays : iterable of Array
        The same shapes and dtypes in the same order on all ranks.
    group : ProcessGroup
        The ranks taking part.

    Notes
    -----
    Collective over `group`; blocks. One broadcast per array.
    """
    for array in arrays:
        broadcast(array, group, root=0, out=array)


class BufferSync:
    """Give every rank rank 0's buffers, while backward runs.

    [Note: buffers] Running statistics are changed by each forward pass from the samples of this
    rank. Like PyTorch, we let rank 0's win: a mean over ranks has no meaning for a counter or a
    table. PyTorch broadcasts them before each forward pass, which is waited for, and leaves ranks
    with different buffers after the last step. Here they are copied when backward begins, travel
    along with the gradients, and are written when these are waited for: the next forward pass uses
    the same values, and after each step all ranks are equal, for an evaluation or a checkpoint on
    any of them. They go through a copy because backward may still read the buffers.

    Parameters
    ----------
    buffers : mapping of str to Array
        Arrays that their modules only change in place.
    group : ProcessGroup
        The ranks taking part.
    """

    def __init__(self, buffers: Mapping[str, Array], group: ProcessGroup) -> None:
        by_kind: dict[Any, dict[str, Array]] = {}
        for name, array in buffers.items():
            by_kind.setdefault((array_namespace(array), array.dtype), {})[name] = array
        self._group = group
        self._copies = [(_flat_like(arrays), arrays) for arrays in by_kind.values()]
        self._works: list[Work[Any]] = []

    def start(self) -> None:
        """Start sending rank 0's present values; does not block.

        One broadcast per dtype and kind of memory.
        """
        for flat, arrays in self._copies:
            if self._group.rank == 0:
                flat.pack(arrays)
            self._works.append(ibroadcast(flat.data, self._group, root=0, out=flat.data))

    def done(self) -> bool:
        """Whether the broadcasts are complete."""
        return all(work.done() for work in self._works)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for rank 0's values."""
        deadline = Deadline(timeout)
        for work in self._works:
            work.wait(deadline.left)

    def apply(self) -> None:
        """Write rank 0's values into the buffers."""
        if self._works and self._group.rank != 0:
            for flat, arrays in self._copies:
                flat.unpack(arrays)
        self._works = []


class OrderedGradients(Protocol):
    """Gradients of which buckets are made."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the parameters."""
        ...

    def arrivals(self) -> list[str]:
        """Return all names in the order in which gradients came in this step."""
        ...

    def relayout(self, order: Sequence[str]) -> None:
        """Make the buckets anew, for gradients that come in this order."""
        ...


class BucketOrder:
    """The order of the buckets: that in which rank 0's gradients arrived in the first step.

    [Note: order of arrival] The reverse of the order of the parameters is a guess at the order in
    which backward completes gradients. The first backward of a `DDP` outside `no_sync` shows the
    real one: rank 0's is broadcast along with the gradients, and when they are waited for the
    buckets are laid out anew in that order, in the same memory. What `Parameter.grad` returned
    before that, inside `no_sync`, must not be used any more; what it returns afterwards stays the
    same array. PyTorch does so, too. With a hook of the user's, which may keep something per
    bucket, the first layout stays. The units of an `FSDP`, and the buckets of a `ShardedOptimizer`,
    keep their gradients, and only the order in which they are sent changes.

    Parameters
    ----------
    gradients : OrderedGradients
        Who knows how the gradients arrived, and moves them from one layout to the next.
    group : ProcessGroup
        The ranks taking part.
    fixed : bool
        Whether the first layout stays.

    Attributes
    ----------
    order : tuple of str or None
        The names in that order; None before it is known.

    References
    ----------
    Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training,
    section 3.2.3.
    """

    def __init__(self, gradients: OrderedGradients, group: ProcessGroup, *, fixed: bool) -> None:
        self.order: tuple[str, ...] | None = None
        self._names = gradients.names
        self._gradients = gradients
        self._group = group
        self._fixed = fixed
        self._broadcast: Work[Any] | None = None

    def start(self) -> None:
        """Send rank 0's order to all, if it is not known; 8 bytes per name; does not block."""
        if self._fixed or self.order is not None:
            return
        index = {name: i for i, name in enumerate(self._names)}
        positions = np.array([index[name] for name in self._gradients.arrivals()], np.int64)
        self._broadcast = ibroadcast(positions, self._group, root=0, out=positions)

    def done(self) -> bool:
        """Whether the broadcast is complete."""
        return self._broadcast is None or self._broadcast.done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the broadcast."""
        if self._broadcast is not None:
            self._broadcast.wait(timeout)

    def apply(self) -> None:
        """Lay the buckets out in the order that was broadcast, if one was."""
        if self._broadcast is not None:
            positions = self._broadcast.wait()
            self._broadcast = None
            self.lay_out([self._names[position] for position in positions.tolist()])

    def lay_out(self, order: Sequence[str] | None) -> None:
        """Lay the buckets out in this order for good; None: as at first, until one is found."""
        if self._fixed:
            return
        if order is not None:
            order = self._present(order)
        self._gradients.relayout(self._names[::-1] if order is None else order)
        self.order = None if order is None else tuple(order)

    def check(self, order: Any) -> None:
        """Raise ValueError unless it is None or holds every name once."""
        if order is None:
            return
        known = isinstance(order, (list, tuple)) and all(isinstance(name, str) for name in order)
        if not known or sorted(self._present(order)) != sorted(self._names):
            raise ValueError(
                "load_state_dict: the order of the gradients' buckets must hold the name of every "
                f"parameter once, or be None, got {order!r}; nothing was changed"
            )

    def _present(self, order: Sequence[str]) -> list[str]:
        """Exchange names of which a wrapper was a part when they were saved."""
        present = {old: new for new, old in former_names(self._names, order).items()}
        return [present.get(name, name) for name in order]


def _flat_like(arrays: Mapping[str, Array]) -> FlatBuffer:
    """Allocate copies of arrays of one dtype, in their kind of memory."""
    shapes = {name: array.shape for name, array in arrays.items()}
    first = next(iter(arrays.values()))
    storage = array_namespace(first).empty(FlatBuffer.length_of(shapes), first.dtype)
    return FlatBuffer(shapes, first.dtype, storage=storage)
