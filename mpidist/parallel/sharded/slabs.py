"""`Slab`: parameters in one flat array, of which each rank owns one slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.arrays.flat import FlatBuffer
from mpidist.parallel.data.bucket import ALIGNMENT_BYTES, BucketSizes, assign_buckets

__all__ = ["Slab", "SlabLayout", "lay_out"]

_NOTHING = Box((0,), (0,))


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """Which parameters lie in a slab, and where.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        Name and shape of each parameter, in their order.
    spans : mapping of str to Box
        Where each lies in the slab, which has one dimension.
    dtype : dtype
        Of all of them.
    length : int
        Elements of the slab, the padding that brings every parameter to a cache line included.
    """

    shapes: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, Box]
    dtype: DType
    length: int

    @classmethod
    def of(cls, like: Mapping[str, Array]) -> SlabLayout:
        """Lay out arrays of one dtype as a `Bucket` lays out their gradients."""
        shapes = {name: tuple(array.shape) for name, array in like.items()}
        (dtype,) = {array.dtype for array in like.values()}
        spans, offset = {}, 0
        for name, shape in shapes.items():
            spans[name] = Box((offset,), (like[name].size,))
            offset += FlatBuffer.length_of({name: shape}, alignment=_line(dtype))
        return cls(shapes, spans, dtype, offset)

    def counts(self, owners: int, size: int) -> tuple[int, ...]:
        """Return the number of elements of each rank's slice: whole cache lines.

        Parameters
        ----------
        owners : int
            How many ranks, the first ones, own a slice; at most `size`.
        size : int
            Number of ranks.
        """
        line = _line(self.dtype)
        shares = [count * line for _, count in split_evenly(self.length // line, owners)]
        return (*shares, *(0,) * (size - owners))


def lay_out(arrays: Mapping[str, Array], sizes: BucketSizes) -> list[SlabLayout]:
    """Distribute arrays over slabs as `assign_buckets` distributes their gradients."""
    return [
        SlabLayout.of({name: arrays[name] for name in names})
        for names in assign_buckets(arrays, sizes)
    ]


class Slab:
    """Parameters in one flat array, of which each rank owns one slice.

    Parameters
    ----------
    layout : SlabLayout
        What lies where.
    data : Array, shape (length,)
        The memory.
    counts : sequence of int
        Elements of each rank's slice.
    rank : int
        This rank.

    Attributes
    ----------
    layout, data, counts
        As given.
    views : dict of str to Array
        The parameters, of their shapes: views of `data`.
    own : Array, shape (counts[rank],)
        This rank's slice: a view of `data`.
    """

    def __init__(self, layout: SlabLayout, data: Array, counts: Sequence[int], rank: int) -> None:
        self.layout = layout
        self.data = data
        self.counts = tuple(counts)
        self.views = FlatBuffer(
            layout.shapes, layout.dtype, alignment=_line(layout.dtype), storage=data
        ).views
        self._rank = rank
        self._slices: list[Box] = []
        start = 0
        for count in self.counts:
            self._slices.append(Box((start,), (count,)))
            start += count
        self.own = data[self._slices[rank].slices]

    def box(self, name: str, rank: int | None = None) -> Box:
        """Return what a rank, this one when omitted, owns of a parameter.

        Returns
        -------
        Box
            In the flattened parameter; one dimension.
        """
        span = self.layout.spans[name]
        common = span.intersect(self._slices[self._rank if rank is None else rank])
        return _NOTHING if common is None else common.relative_to(span)

    def part(self, name: str, piece: Array) -> Array:
        """Return what belongs to a parameter in an array of the shape of `own`."""
        mine = self._slices[self._rank]
        common = self.layout.spans[name].intersect(mine)
        return piece[:0] if common is None else piece[common.relative_to(mine).slices]


def _line(dtype: DType) -> int:
    """Return the elements of a cache line: every parameter, and every slice, begins on one."""
    return max(ALIGNMENT_BYTES // dtype.itemsize, 1)
