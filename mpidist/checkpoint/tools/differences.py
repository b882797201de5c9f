"""What two checkpoints have in common, and what not."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from mpidist._formatting import shorten
from mpidist._types import Array
from mpidist.arrays.boxes import Box
from mpidist.checkpoint.directory import Checkpoint
from mpidist.checkpoint.format.manifest import DIGEST_BYTES, JSON, ChunkGrid, Manifest, StoredBox
from mpidist.checkpoint.loading.reading import MAX_READ, check_files
from mpidist.checkpoint.tools.resharding import Progress, Reader, ignore_progress


@dataclass(frozen=True, slots=True)
class Difference:
    """One name under which two checkpoints have something else.

    Attributes
    ----------
    kind : str
        One of "array", "value" and "metadata".
    name : str
        Of the array or value; the path to it in the metadata.
    text : str
        What differs, in words.
    elements : int or None
        How many elements of an array differ, where dtype and shape do not.
    largest : float or None
        Largest absolute difference of two elements; NaN if in each pair one is NaN.
    """

    kind: str
    name: str
    text: str
    elements: int | None = None
    largest: float | None = None

    def as_json(self) -> dict[str, JSON]:
        """Return it as the command line prints it."""
        return {"words" if key == "text" else key: value for key, value in asdict(self).items()}


def compare(
    first: Checkpoint, second: Checkpoint, *, progress: Progress = ignore_progress
) -> builtins.list[Difference]:
    """Return what two checkpoints do not have in common; neither ranks nor steps count.

    Returns
    -------
    list of Difference
        By kind and name; none if both hold the same. NaN equals NaN at the same place, and 0.0
        equals -0.0.

    Raises
    ------
    CheckpointCorruptError, CheckpointMissingShardError
        If a file is damaged, cut off or missing.

    Notes
    -----
    Local. Where both were cut in the same way, parts whose digests are equal are taken for equal
    and not read. Memory: some blocks of 1 MiB, whatever the arrays' sizes.
    """
    for checkpoint in (first, second):
        check_files(checkpoint.directory, checkpoint.manifest)
    with Reader(first) as one, Reader(second) as other:
        arrays = builtins.list(_arrays(first.manifest, one, second.manifest, other, progress))
    return [
        *arrays,
        *_values("value", dict(first.values), dict(second.values)),
        *_values("metadata", {"metadata": first.metadata}, {"metadata": second.metadata}),
    ]


def _arrays(
    first: Manifest, one: Reader, second: Manifest, other: Reader, progress: Progress
) -> Iterator[Difference]:
    for name in sorted(first.arrays.keys() | second.arrays.keys()):
        a, b = first.arrays.get(name), second.arrays.get(name)
        if a is None or b is None:
            yield Difference("array", name, _only("first" if b is None else "second"))
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            text = f"{a.dtype}{builtins.list(a.shape)} and {b.dtype}{builtins.list(b.shape)}"
            yield Difference("array", name, text)
        else:
            elements, largest = 0, float("nan")
            for box in _unsettled(a.boxes, b.boxes, a.dtype.itemsize):
                x, y = one.read(name, box), other.read(name, box)
                differs = (x != y) & ~((x != x) & (y != y))  # noqa: PLR0124  # only NaN is not itself
                if differs.any():
                    elements += int(np.count_nonzero(differs))
                    largest = float(np.fmax(largest, _largest(x[differs], y[differs])))
            if elements:
                total = Box.whole(a.shape).count
                text = f"{elements} of {total} elements, by at most {largest:g}"
                yield Difference("array", name, text, elements, largest)
        if a is not None:
            progress(a.nbytes)


def _unsettled(
    ours: tuple[StoredBox, ...], theirs: tuple[StoredBox, ...], itemsize: int
) -> Iterator[Box]:
    """Yield the parts of an array that have to be read, of at most 1 MiB each."""
    known = {stored.box: stored.digests for stored in theirs}
    for stored in ours:
        grid = ChunkGrid.of(stored.box.sizes, itemsize)
        numbers = np.arange(grid.count)
        if stored.box in known:
            a, b = (_table(digests) for digests in (stored.digests, known[stored.box]))
            numbers = np.flatnonzero((a != b).any(axis=1))
        for _, _, region in grid.joined(numbers, MAX_READ):
            yield region.placed_in(stored.box)


def _table(digests: bytes) -> Array:
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)


def _largest(a: Array, b: Array) -> float:
    """Return the largest absolute difference of pairs without NaN; NaN if there are none."""
    with np.errstate(invalid="ignore", over="ignore"):
        if a.dtype.kind in "iu":  # in modular arithmetic the larger minus the smaller is right
            return float(
                (np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64)).max()
            )
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        return float(np.fmax.reduce(abs(a.astype(wide) - b.astype(wide))))


def _values(kind: str, a: JSON, b: JSON, path: str = "") -> Iterator[Difference]:
    """Yield where two mappings differ, the names inside joined by "/"."""
    for key in sorted(a.keys() | b.keys()):
        name = f"{path}{key}"
        if key not in a or key not in b:
            yield Difference(kind, name, _only("first" if key in a else "second"))
        elif isinstance(a[key], Mapping) and isinstance(b[key], Mapping):
            yield from _values(kind, a[key], b[key], f"{name}/")
        elif repr(a[key]) != repr(b[key]):  # NaN is itself here, and 1 is not 1.0
            texts = (shorten(repr(value), 40) for value in (a[key], b[key]))
            yield Difference(kind, name, " and ".join(texts))


def _only(where: str) -> str:
    return f"only in the {where}"
