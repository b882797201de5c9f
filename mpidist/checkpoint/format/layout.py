"""Where in a rank's file its parts go: known before a byte is written, by any rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mpidist._types import DType
from mpidist.arrays.boxes import Box
from mpidist.checkpoint.format.manifest import ALIGNMENT, name_of

__all__ = ["Extent", "Outline", "lay_out"]


class Extent(Protocol):
    """What a part of an array is, without its elements."""

    @property
    def name(self) -> str:
        """Of the array."""
        ...

    @property
    def box(self) -> Box:
        """Which part."""
        ...

    @property
    def dtype(self) -> DType:
        """Of the array."""
        ...

    @property
    def nbytes(self) -> int:
        """Of the part."""
        ...


E = TypeVar("E", bound=Extent)


@dataclass(frozen=True, slots=True)
class Outline:
    """An `Extent`, and nothing else.

    Attributes
    ----------
    name : str
        Of the array.
    box : Box
        Which part.
    dtype : dtype
        Of the array.
    """

    name: str
    box: Box
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return self.box.count * self.dtype.itemsize


def lay_out(
    pieces: Iterable[E],
) -> tuple[list[E], dict[str, tuple[tuple[int, ...], DType]], list[tuple[str, int]]]:
    """Say where in a file pieces go.

    Parameters
    ----------
    pieces : iterable of Extent
        What goes into it.

    Returns
    -------
    pieces : list of Extent
        In the order of the file.
    datasets : dict of str to (tuple of int, dtype)
        Shapes and dtypes by name.
    places : list of (str, int)
        Of each piece: its dataset, and the position of its first element there.
    """
    # What is packed comes first, each dtype in one go.
    pieces = sorted(pieces, key=lambda piece: (piece.nbytes >= ALIGNMENT, _kind(piece)))
    packed: dict[str, int] = {}
    dtypes: dict[str, DType] = {}
    datasets: dict[str, tuple[tuple[int, ...], DType]] = {}
    boxes = []
    for piece in pieces:
        if piece.nbytes >= ALIGNMENT:
            name = f"arrays/{piece.name}{_words(piece.box)}"
            datasets[name] = (piece.box.sizes, piece.dtype)
            boxes.append((name, 0))
        else:
            name = f"packed/{_kind(piece)}"
            boxes.append((name, packed.get(name, 0)))
            packed[name] = packed.get(name, 0) + piece.box.count
            dtypes[name] = piece.dtype
    for name, count in packed.items():
        datasets[name] = ((count,), dtypes[name])
    return pieces, datasets, boxes


def _kind(piece: Extent) -> str:
    return name_of(piece.dtype)


def _words(box: Box) -> str:
    """Return a box as numpy's index is written: [0:512, 0:1024]."""
    ranges = zip(box.offsets, box.stops, strict=True)
    return f"[{', '.join(f'{start}:{stop}' for start, stop in ranges)}]"
