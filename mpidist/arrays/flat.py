"""One 1-D array that holds many named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mpidist._types import Array
from mpidist.arrays.boxes import round_up
from mpidist.arrays.namespaces import array_namespace
from mpidist.errors import SizeMismatchError

if TYPE_CHECKING:
    import numpy.typing as npt

Label = TypeVar("Label")


class FlatBuffer:
    """Named arrays laid one behind the other in one flat array.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Name and shape of each part, in the order in which they are laid down.
    dtype : dtype
        Element type of the flat array, and so of all parts.
    alignment : int, optional
        Each part begins at a multiple of this many elements; the gaps hold zeros.
    storage : Array, shape (length,), optional
        The memory to use, on the host or on a device; made with `numpy.empty` when omitted.
        `FlatBuffer.length_of` returns its length.

    Attributes
    ----------
    data : Array, shape (length,)
        The whole, padding included.
    views : dict of str to Array
        The parts; they share the memory of `data`.

    Raises
    ------
    SizeMismatchError
        If `storage` has another shape or dtype.

    Examples
    --------
    >>> buffer = FlatBuffer({"w": (2, 3), "b": (3,)}, np.float32)
    >>> buffer.views["b"][:] = 1
    >>> buffer.data[6:]
    array([1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        dtype: npt.DTypeLike,
        *,
        alignment: int = 1,
        storage: Array | None = None,
    ) -> None:
        length = self.length_of(shapes, alignment=alignment)
        dtype = np.dtype(dtype)
        if storage is None:
            storage = np.empty(length, dtype)
        elif storage.shape != (length,) or storage.dtype != dtype:
            raise SizeMismatchError(
                f"FlatBuffer: storage must have shape ({length},) and dtype {dtype}, "
                f"got {storage.shape} and {storage.dtype}"
            )
        self.data = storage
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._alignment = alignment
        self.views: dict[str, Array] = {}
        self._slices: dict[str, slice] = {}
        offset = 0
        for name, shape in shapes.items():
            count = prod(shape)
            self.views[name] = storage[offset : offset + count].reshape(tuple(shape))
            end = offset + count
            self._slices[name] = slice(offset, end)
            offset = round_up(end, alignment)
            storage[end:offset] = 0

    @staticmethod
    def length_of(shapes: Mapping[str, Sequence[int]], *, alignment: int = 1) -> int:
        """Return the number of elements that these parts need, padding included."""
        return sum(round_up(prod(shape), alignment) for shape in shapes.values())

    def pack(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays of the same names and shapes into the parts, casting to the dtype."""
        for name, view in self.views.items():
            array_namespace(view).copyto(view, arrays[name], casting="unsafe")

    def unpack(self, arrays: Mapping[str, Array]) -> None:
        """Copy the parts out into arrays of the same names and shapes, casting to their dtypes."""
        for name, view in self.views.items():
            array_namespace(view).copyto(arrays[name], view, casting="unsafe")

    def zeros_like(self) -> FlatBuffer:
        """Make one of zeros that is laid out as this one is, in the same kind of memory."""
        length = self.length_of(self._shapes, alignment=self._alignment)
        storage = array_namespace(self.data).zeros(length, self.data.dtype)
        return FlatBuffer(self._shapes, self.data.dtype, alignment=self._alignment, storage=storage)

    def segments(self, labels: Mapping[str, Label]) -> list[tuple[Label, slice]]:
        """Find the longest segments of `data` whose parts all have the same label.

        A part without a label is in no segment. Returns each label with its segment: from the first
        element of its first part to the last one of its last part, with the gaps between them.
        """
        segments: list[tuple[Label, slice]] = []
        contiguous = False
        for name, part in self._slices.items():
            if name not in labels:
                contiguous = False
                continue
            label = labels[name]
            if contiguous and segments[-1][0] == label:
                segments[-1] = (label, slice(segments[-1][1].start, part.stop))
            else:
                segments.append((label, part))
            contiguous = True
        return segments
