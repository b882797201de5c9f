"""Broadcast rank 0's parameters and buffers: at the start, and buffers in each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpidist._types import Array
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.namespaces import array_namespace
from mpidist.backends.work import Work
from mpidist.collectives import broadcast, ibroadcast
from mpidist.group import ProcessGroup

__all__ = ["BufferSync", "broadcast_in_place"]


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

    def finish(self, timeout: float | None = None) -> None:
        """Wait for rank 0's values and write them into the buffers."""
        for work in self._works:
            work.wait(timeout)
        if self._works and self._group.rank != 0:
            for flat, arrays in self._copies:
                flat.unpack(arrays)
        self._works = []


def _flat_like(arrays: Mapping[str, Array]) -> FlatBuffer:
    """Allocate copies of arrays of one dtype, in their kind of memory."""
    shapes = {name: array.shape for name, array in arrays.items()}
    first = next(iter(arrays.values()))
    storage = array_namespace(first).empty(FlatBuffer.length_of(shapes), first.dtype)
    return FlatBuffer(shapes, first.dtype, storage=storage)
