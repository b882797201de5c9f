"""Who writes what: planned by rank 0 from what all ranks say that they hold."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

from mpidist._types import Array
from mpidist.arrays.boxes import Box, split_evenly
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.format.cover import check_cover
from mpidist.checkpoint.format.manifest import ALIGNMENT, JSON, dtype_of, name_of
from mpidist.checkpoint.state import FlatState, check_nesting
from mpidist.errors import CollectiveMismatchError, SizeMismatchError

__all__ = ["Assignment", "Declaration", "Kind", "Part", "Plan", "make_plan", "part_of"]


class Kind(NamedTuple):
    """What all ranks must agree on about an array: the name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Part(NamedTuple):
    """A part of an array that a rank is to write, and the box, held by the rank, that it is of."""

    name: str
    of: Box
    box: Box


Assignment: TypeAlias = list[Part]
"""What one rank writes."""


@dataclass(frozen=True)
class Declaration:
    """What one rank holds.

    Attributes
    ----------
    whole : dict of str to Kind
        Arrays of which it holds all.
    sharded : dict of str to (Kind, tuple of Box)
        Arrays of which it holds some boxes, perhaps none.
    values : dict of str to JSON value
        All else.
    """

    whole: dict[str, Kind] = field(default_factory=dict)
    sharded: dict[str, tuple[Kind, tuple[Box, ...]]] = field(default_factory=dict)
    values: dict[str, JSON] = field(default_factory=dict)

    @classmethod
    def of(cls, flat: FlatState) -> Declaration:
        """Return what a rank with this state says."""
        mine = cls(values=flat.values)
        for name, array in flat.arrays.items():
            kind = Kind(name_of(array.dtype), tuple(array.shape))
            if isinstance(array, ShardedArray):
                mine.sharded[name] = (kind, tuple(array.pieces))
            else:
                mine.whole[name] = kind
        return mine


@dataclass(frozen=True)
class Plan:
    """What a save is going to be.

    Attributes
    ----------
    kinds : dict of str to Kind
        Every array.
    values : dict of str to JSON value
        Every value.
    assignments : list of Assignment
        By rank.
    """

    kinds: dict[str, Kind]
    values: dict[str, JSON]
    assignments: list[Assignment]


def make_plan(declarations: Sequence[Declaration]) -> Plan:
    """Share the work of a save out.

    Parameters
    ----------
    declarations : sequence of Declaration
        By rank.

    Returns
    -------
    Plan
        Each element of each array is written by one of the ranks that hold it. What several hold is
        cut, or given to the one of them that has least to write.

    Raises
    ------
    CollectiveMismatchError
        If ranks differ about a dtype, a shape or a value.
    SizeMismatchError
        If boxes of an array overlap without being the same, or elements are in none.
    """
    values = _same_values(declarations)
    kinds, holders = _holders(declarations)
    loads = [0] * len(declarations)
    assignments: list[Assignment] = [[] for _ in declarations]
    shared = []
    for name, boxes in holders.items():
        itemsize = dtype_of(kinds[name].dtype).itemsize
        for box, ranks in boxes.items():
            if len(ranks) == 1:
                loads[ranks[0]] += box.count * itemsize
                assignments[ranks[0]].append(Part(name, box, box))
            else:
                shared.append((box.count * itemsize, name, box, ranks))
    shared.sort(key=lambda entry: -entry[0])  # the large ones first, so that small ones level it
    lightest = _Lightest(loads)
    for nbytes, name, box, ranks in shared:
        parts = _cut(box, max(min(len(ranks), nbytes // ALIGNMENT), 1))
        for part in parts:
            rank = lightest.take(ranks, nbytes * part.count // max(box.count, 1))
            assignments[rank].append(Part(name, box, part))
    for assignment in assignments:
        assignment.sort(key=lambda part: (part.name, part.box.offsets))
    return Plan(kinds, values, assignments)


class _Lightest:
    """Which rank has least to write."""

    def __init__(self, loads: Sequence[int]) -> None:
        self._loads = list(loads)
        self._heap = [(load, rank) for rank, load in enumerate(loads)]
        heapq.heapify(self._heap)

    def take(self, ranks: Sequence[int], nbytes: int) -> int:
        """Give so many bytes to the one of these ranks that has least, and return it."""
        if len(ranks) < len(self._loads):
            rank = min(ranks, key=lambda rank: (self._loads[rank], rank))
        else:
            while self._loads[self._heap[0][1]] != self._heap[0][0]:
                heapq.heappop(self._heap)  # what it says is no longer so
            rank = self._heap[0][1]
        self._loads[rank] += nbytes
        heapq.heappush(self._heap, (self._loads[rank], rank))
        return rank


def _holders(
    declarations: Sequence[Declaration],
) -> tuple[dict[str, Kind], dict[str, dict[Box, list[int]]]]:
    """Return what each array is, and which ranks hold which boxes of it."""
    kinds: dict[str, tuple[Kind, int]] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, declaration in enumerate(declarations):
        for name, kind, boxes in _held(declaration):
            known, first = kinds.setdefault(name, (kind, rank))
            if known != kind:
                raise CollectiveMismatchError(
                    f"{name!r} is {kind.dtype}{list(kind.shape)} on rank {rank} and "
                    f"{known.dtype}{list(known.shape)} on rank {first}; an array of one name must "
                    "have one dtype and one global shape on all ranks (ShardedArray, if each rank "
                    "holds a part)"
                )
            for box in boxes:
                holders[name][box].append(rank)
    check_nesting(kinds)
    for name, (kind, _) in kinds.items():
        try:
            check_cover(kind.shape, list(holders[name]))
        except SizeMismatchError as error:
            raise SizeMismatchError(
                f"{name!r}: {error}; the boxes of all ranks together must be the whole array, and "
                "those that meet must be the same"
            ) from None
    return {name: kind for name, (kind, _) in kinds.items()}, holders


def _held(declaration: Declaration) -> Iterator[tuple[str, Kind, Sequence[Box]]]:
    for name, kind in declaration.whole.items():
        yield name, kind, (Box.whole(kind.shape),)
    for name, (kind, boxes) in declaration.sharded.items():
        yield name, kind, boxes


def _same_values(declarations: Sequence[Declaration]) -> dict[str, JSON]:
    values: dict[str, JSON] = {}
    first: dict[str, int] = {}
    for rank, declaration in enumerate(declarations):
        for name, value in declaration.values.items():
            if first.setdefault(name, rank) == rank:
                values[name] = value
            elif _told(values[name]) != _told(value):  # NaN is itself here, and 1 is not 1.0
                raise CollectiveMismatchError(
                    f"{name!r} is {_short(value)} on rank {rank} and {_short(values[name])} on "
                    f"rank {first[name]}; give what differs a name of its own on each rank"
                )
    return values


def _told(value: JSON) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: JSON) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _cut(box: Box, parts: int) -> list[Box]:
    """Cut a box into parts along the first dimension that is long enough, or the longest."""
    if parts == 1:
        return [box]
    long = [d for d, size in enumerate(box.sizes) if size >= parts]
    dimension = long[0] if long else max(range(len(box.sizes)), key=box.sizes.__getitem__)
    lengths = split_evenly(box.sizes[dimension], parts)
    return [box.along(dimension, start, size) for start, size in lengths if size]


def part_of(array: Array | ShardedArray, part: Part) -> Array:
    """Return the elements that a part names: a view of what the rank holds."""
    held = array.pieces[part.of] if isinstance(array, ShardedArray) else array
    if part.box == part.of:
        return held
    index: Any = (*part.box.relative_to(part.of).slices, ...)  # a view, also of a 0-d array
    return cast("Array", held[index])
