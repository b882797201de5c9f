"""Parameters in flat arrays, which are cut into one slice per rank."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from math import prod

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.arrays.flat import FlatBuffer
from mpidist.arrays.shards import FlatPart, Part
from mpidist.parallel.data.buckets import ALIGNMENT_BYTES

__all__ = ["Cut", "FlatLayout", "FlatParameters"]

_EMPTY = Box((0,), (0,))


class Cut(Enum):
    """Where a flat array of parameters may be cut into slices.

    Notes
    -----
    `ROWS`: where a row of a parameter begins, a row being ``parameter[i]``: each rank's part of a
    parameter is a range of its rows. Slices differ by a row at most. A flat array that gives some
    rank nothing so, or twice its share, is cut as with `ELEMENTS`.

    `ELEMENTS`: at any cache line. The most even slices; parts are ranges of flattened parameters.

    `PARAMETERS`: where a parameter begins, so that each one is whole on one rank, as an optimizer
    needs it that works on matrices (Muon, Shampoo). The least even slices: the longest one is as
    short as the order of the parameters allows.
    """

    ROWS = "rows"
    ELEMENTS = "elements"
    PARAMETERS = "parameters"


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Which parameters lie in a flat array, where, and where it is cut.

    Attributes
    ----------
    shapes : mapping of str to tuple of int
        Name and shape of each parameter, in their order.
    spans : mapping of str to Box
        Where each lies in the flat array.
    dtype : dtype
        Of all of them.
    length : int
        Elements of the flat array, with the padding that brings every parameter to a cache
        line.
    cut : Cut
        Where it may be cut.
    """

    shapes: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, Box]
    dtype: DType
    length: int
    cut: Cut = Cut.ELEMENTS

    @classmethod
    def of(
        cls, like: Mapping[str, Array], cut: Cut = Cut.ELEMENTS, *, dtype: DType | None = None
    ) -> FlatLayout:
        """Lay out arrays one behind the other; they are of one dtype, unless it is given."""
        shapes = {name: tuple(array.shape) for name, array in like.items()}
        if dtype is None:
            (dtype,) = {array.dtype for array in like.values()}
        spans, offset = {}, 0
        for name, shape in shapes.items():
            spans[name] = Box((offset,), (like[name].size,))
            offset += FlatBuffer.length_of({name: shape}, alignment=_line(dtype))
        return cls(shapes, spans, dtype, offset, cut)

    @property
    def nbytes(self) -> int:
        """Bytes of the flat array."""
        return self.length * self.dtype.itemsize

    def buffer(self, storage: Array) -> FlatBuffer:
        """Return memory of this length, of any dtype, as a buffer with a view per parameter."""
        return FlatBuffer(self.shapes, storage.dtype, alignment=_line(self.dtype), storage=storage)

    def views(self, data: Array) -> dict[str, Array]:
        """Return the parameters in a flat array of this length; writes nothing."""
        return {n: data[span.slices].reshape(self.shapes[n]) for n, span in self.spans.items()}

    def counts(self, owners: int, size: int) -> tuple[int, ...]:
        """Return the number of elements of each rank's slice.

        Parameters
        ----------
        owners : int
            How many ranks, the first ones, own a slice; at most `size`.
        size : int
            Number of ranks; those after the owners have slices of length 0.
        """
        line = _line(self.dtype)
        shares = [count * line for _, count in split_evenly(self.length // line, owners)]
        if self.cut is Cut.PARAMETERS:
            shares = self._whole_parameters(owners)
        elif self.cut is Cut.ROWS:
            rows = self._whole_rows(owners)
            if min(rows) > 0 and max(rows) * owners <= 2 * self.length:
                shares = rows
        return (*shares, *(0,) * (size - owners))

    def _whole_rows(self, owners: int) -> list[int]:
        """Cut where those rows begin that are nearest to where even slices would."""
        names = [name for name, span in self.spans.items() if not span.empty]
        starts = [self.spans[name].offsets[0] for name in names]
        cuts = [0]
        for owner in range(1, owners if names else 1):
            even = self.length * owner / owners
            index = bisect_right(starts, even) - 1
            start, stop = starts[index], (*starts, self.length)[index + 1]
            shape = self.shapes[names[index]]
            row = prod(shape[1:])
            offset = round((even - start) / row) * row
            cuts.append(start + offset if offset < prod(shape) else stop)
        return [stop - start for start, stop in zip(cuts, (*cuts[1:], self.length), strict=True)]

    def _whole_parameters(self, owners: int) -> list[int]:
        """Fill slices of the least length with which there are enough of them."""
        starts = [span.offsets[0] for span in self.spans.values()]
        lengths = [stop - start for start, stop in pairwise((*starts, self.length))]
        least = bisect_left(
            range(self.length + 1),
            1,
            lo=max(lengths),
            key=lambda n: len(_fill(lengths, n)) <= owners,
        )
        shares = _fill(lengths, least)
        return shares + [0] * (owners - len(shares))


class FlatParameters:
    """Parameters in one flat array, of which each rank owns one slice.

    Parameters
    ----------
    layout : FlatLayout
        Names, shapes and positions of the parameters.
    own : Array, shape (counts[rank],)
        This rank's slice, in memory of its own or as a part of the whole flat array.
    counts : sequence of int
        Elements of each rank's slice.
    rank : int
        This rank.

    Attributes
    ----------
    layout, own, counts
        The arguments; `counts` as a tuple.
    """

    def __init__(self, layout: FlatLayout, own: Array, counts: Sequence[int], rank: int) -> None:
        self.layout = layout
        self.own = own
        self.counts = tuple(counts)
        self._slice = Box((sum(self.counts[:rank]),), (self.counts[rank],))

    @classmethod
    def sliced(
        cls, layout: FlatLayout, data: Array, counts: Sequence[int], rank: int
    ) -> FlatParameters:
        """Take this rank's slice out of a whole flat array, of shape (length,)."""
        start = sum(counts[:rank])
        return cls(layout, data[start : start + counts[rank]], counts, rank)

    def box(self, name: str) -> Box:
        """Return what this rank owns of a parameter.

        Returns
        -------
        Box
            In the flattened parameter; one dimension.
        """
        span = self.layout.spans[name]
        common = span.intersect(self._slice)
        return _EMPTY if common is None else common.relative_to(span)

    def part(self, name: str, *, first: bool = True) -> Part | FlatPart:
        """Return what this rank owns of a parameter: a range of its rows, or of its elements.

        Parameters
        ----------
        name : str
            Of the parameter.
        first : bool, optional
            Whether this rank counts and writes it, of several that own the same.
        """
        shape = self.layout.shapes[name]
        (start,), (count,) = self.box(name).offsets, self.box(name).sizes
        row = prod(shape[1:])
        if self.layout.cut is Cut.ELEMENTS or not shape or not row or start % row or count % row:
            return FlatPart(shape, start, first)
        sizes, rest = (count // row, *shape[1:]), (0,) * (len(shape) - 1)
        boxes = (Box((start // row, *rest), sizes), Box((0, *rest), sizes))
        return Part(shape, (boxes,), first)

    def within(self, name: str, own: Array) -> Array:
        """Return what belongs to a parameter in an array of the shape of `own`.

        Returns
        -------
        Array, shape (rows, ...) or (elements,)
            A view, of the shape that `part` says.
        """
        common = self.layout.spans[name].intersect(self._slice)
        flat = own[:0] if common is None else own[common.relative_to(self._slice).slices]
        part = self.part(name)
        return flat.reshape(part.boxes[0][1].sizes) if isinstance(part, Part) else flat


def _line(dtype: DType) -> int:
    """Return the elements of a cache line, on which every parameter begins."""
    return max(ALIGNMENT_BYTES // dtype.itemsize, 1)


def _fill(lengths: Sequence[int], most: int) -> list[int]:
    """Return the sums of neighbours, of which as many are put together as are no longer."""
    sums = [0]
    for length in lengths:
        if sums[-1] + length > most:
            sums.append(0)
        sums[-1] += length
    return sums
