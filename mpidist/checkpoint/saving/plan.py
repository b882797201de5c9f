"""The global plan of a save: which rank writes which box; made without communication."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from mpidist.arrays.boxes import Box, split_evenly
from mpidist.checkpoint.format.manifest import ALIGNMENT, JSON, dtype_of
from mpidist.checkpoint.format.parsing import check_cover
from mpidist.checkpoint.state import check_nesting
from mpidist.errors import CollectiveMismatchError, SizeMismatchError


class ArrayMetadata(NamedTuple):
    """The name of an array's dtype, and its global shape: the same on all ranks."""

    dtype: str
    shape: tuple[int, ...]


class WriteItem(NamedTuple):
    """A box of an array that a rank writes.

    Attributes
    ----------
    name : str
        The array's name.
    held : Box
        The box of the array that this rank has in memory.
    box : Box
        The box to write, inside `held`.
    """

    name: str
    held: Box
    box: Box


LocalPlan: TypeAlias = list[WriteItem]
"""What one rank writes."""


@dataclass(frozen=True)
class LocalMetadata:
    """What one rank holds.

    Attributes
    ----------
    arrays : dict of str to ArrayMetadata
        Arrays of which it holds all.
    sharded : dict of str to (ArrayMetadata, tuple of Box)
        Arrays of which it holds some boxes, perhaps none.
    values : dict of str to JSON value
        What is no array.
    """

    arrays: dict[str, ArrayMetadata] = field(default_factory=dict)
    sharded: dict[str, tuple[ArrayMetadata, tuple[Box, ...]]] = field(default_factory=dict)
    values: dict[str, JSON] = field(default_factory=dict)

    def boxes(self) -> Iterator[tuple[str, ArrayMetadata, Sequence[Box]]]:
        """Yield each array's name and metadata, and the boxes that this rank holds."""
        for name, metadata in self.arrays.items():
            yield name, metadata, (Box.whole(metadata.shape),)
        for name, (metadata, boxes) in self.sharded.items():
            yield name, metadata, boxes


@dataclass(frozen=True)
class GlobalPlan:
    """What a save consists of; on the coordinator.

    Attributes
    ----------
    arrays : dict of str to ArrayMetadata
        Every array.
    values : dict of str to JSON value
        Every value.
    local_plans : list of LocalPlan
        What each rank writes, by rank.
    """

    arrays: dict[str, ArrayMetadata]
    values: dict[str, JSON]
    local_plans: list[LocalPlan]


def make_global_plan(local: Sequence[LocalMetadata]) -> GlobalPlan:
    """Divide the work of a save among the ranks, given what each holds, by rank.

    Returns
    -------
    GlobalPlan
        Each element of each array is written by one of the ranks that hold it. A box that several
        ranks hold is cut, or given to the one of them that has least to write.

    Raises
    ------
    CollectiveMismatchError
        If ranks differ about a dtype, a shape or a value.
    SizeMismatchError
        If boxes of an array overlap without being the same, or elements are in none.
    """
    values = _same_values(local)
    arrays, holders = _holders(local)
    loads = [0] * len(local)
    plans: list[LocalPlan] = [[] for _ in local]
    replicated = []
    for name, boxes in holders.items():
        itemsize = dtype_of(arrays[name].dtype).itemsize
        for box, ranks in boxes.items():
            if len(ranks) == 1:
                loads[ranks[0]] += box.count * itemsize
                plans[ranks[0]].append(WriteItem(name, box, box))
            else:
                replicated.append((box.count * itemsize, name, box, ranks))
    replicated.sort(key=lambda entry: -entry[0])  # the large ones first: small ones level the loads
    lightest = _Lightest(loads)
    for nbytes, name, box, ranks in replicated:
        for part in _cut(box, max(min(len(ranks), nbytes // ALIGNMENT), 1)):
            rank = lightest.add(ranks, nbytes * part.count // max(box.count, 1))
            plans[rank].append(WriteItem(name, box, part))
    for plan in plans:
        plan.sort(key=lambda item: (item.name, item.box.offsets))
    return GlobalPlan(arrays, values, plans)


class _Lightest:
    """The rank that has least to write, found by a heap of (bytes, rank)."""

    def __init__(self, loads: Sequence[int]) -> None:
        self._loads = list(loads)
        self._heap = [(load, rank) for rank, load in enumerate(loads)]
        heapq.heapify(self._heap)

    def add(self, ranks: Sequence[int], nbytes: int) -> int:
        """Add bytes to the one of these ranks that has least, and return it."""
        if len(ranks) < len(self._loads):
            rank = min(ranks, key=lambda rank: (self._loads[rank], rank))
        else:
            while self._loads[self._heap[0][1]] != self._heap[0][0]:
                heapq.heappop(self._heap)  # the rank has been given more since
            rank = self._heap[0][1]
        self._loads[rank] += nbytes
        heapq.heappush(self._heap, (self._loads[rank], rank))
        return rank


def _holders(
    local: Sequence[LocalMetadata],
) -> tuple[dict[str, ArrayMetadata], dict[str, dict[Box, list[int]]]]:
    """Return the metadata of each array, and which ranks hold which boxes of it."""
    known: dict[str, tuple[ArrayMetadata, int]] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, metadata in enumerate(local):
        for name, array, boxes in metadata.boxes():
            other, first = known.setdefault(name, (array, rank))
            if other != array:
                raise CollectiveMismatchError(
                    f"{name!r} is {array.dtype}{list(array.shape)} on rank {rank} and "
                    f"{other.dtype}{list(other.shape)} on rank {first}; an array of one name must "
                    "have one dtype and one global shape on all ranks (ShardedArray, if each rank "
                    "holds a part)"
                )
            for box in boxes:
                holders[name][box].append(rank)
    check_nesting(known)
    for name, (array, _) in known.items():
        try:
            check_cover(array.shape, list(holders[name]))
        except SizeMismatchError as error:
            raise SizeMismatchError(
                f"{name!r}: {error}; the boxes of all ranks together must be the whole array, and "
                "those that meet must be the same"
            ) from None
    return {name: array for name, (array, _) in known.items()}, holders


def _same_values(local: Sequence[LocalMetadata]) -> dict[str, JSON]:
    values: dict[str, JSON] = {}
    first: dict[str, int] = {}
    for rank, metadata in enumerate(local):
        for name, value in metadata.values.items():
            if first.setdefault(name, rank) == rank:
                values[name] = value
            elif _json(values[name]) != _json(value):  # as text NaN equals NaN, and 1 is not 1.0
                raise CollectiveMismatchError(
                    f"{name!r} is {_short(value)} on rank {rank} and {_short(values[name])} on "
                    f"rank {first[name]}; give what differs a name of its own on each rank"
                )
    return values


def _json(value: JSON) -> str:
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
