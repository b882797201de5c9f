"""One 1-D array that holds many named ones: the only packing code of mpidist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mpidist._types import Array
from mpidist.errors import SizeMismatchError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["FlatBuffer"]


class FlatBuffer:
    """Named arrays laid one behind the other in one flat array.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Name and shape of each part, in the order in which they are laid down.
    dtype : dtype
        Of all parts.
    alignment : int, optional
        Each part begins at a multiple of this many elements; the gaps hold zeros.
    storage : Array, shape (length,), optional
        The memory to use; made with `numpy.empty` when omitted. `FlatBuffer.length_of` tells its
        length.

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
        self.views: dict[str, Array] = {}
        offset = 0
        for name, shape in shapes.items():
            count = prod(shape)
            self.views[name] = storage[offset : offset + count].reshape(tuple(shape))
            end = offset + count
            offset = _round_up(end, alignment)
            storage[end:offset] = 0

    @staticmethod
    def length_of(shapes: Mapping[str, Sequence[int]], *, alignment: int = 1) -> int:
        """Return the number of elements that these parts need, padding included."""
        return sum(_round_up(prod(shape), alignment) for shape in shapes.values())

    def pack(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays of the same names and shapes into their places, casting to the dtype."""
        for name, view in self.views.items():
            np.copyto(view, arrays[name], casting="unsafe")

    def unpack(self, arrays: Mapping[str, Array]) -> None:
        """Copy the parts out into arrays of the same names and shapes, casting to their dtypes."""
        for name, view in self.views.items():
            np.copyto(arrays[name], view, casting="unsafe")


def _round_up(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
