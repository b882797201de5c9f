"""The plan of a save: what the ranks hold together, and which of them writes what.

Every rank describes what it holds (`LocalMetadata`). Rank 0, the coordinator, makes the
`GlobalPlan` from that and sends each rank its `LocalPlan`. Where nothing but values has changed
since the save before, all ranks use the plan of that one again.
"""

from __future__ import annotations

import heapq
import json
import os
import platform
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import xxhash

from mpidist import __version__
from mpidist._formatting import shorten
from mpidist._types import Array
from mpidist.arrays.boxes import Box, split_evenly, view_of_box
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.directory import clear, create_directory, step_directory, step_of
from mpidist.checkpoint.format.files import hdf5_versions
from mpidist.checkpoint.format.manifest import (
    ALIGNMENT,
    JSON,
    Manifest,
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
    dtype_of,
    name_of,
)
from mpidist.checkpoint.format.parsing import check_cover
from mpidist.checkpoint.saving.writing import BoxSpec, Written, file_name, is_being_written, lay_out
from mpidist.checkpoint.state import FlatState, State, as_json, check_nesting, flatten
from mpidist.collectives import all_gather, broadcast_object, gather_object, scatter_object
from mpidist.errors import (
    CheckpointError,
    CollectiveMismatchError,
    DistributedError,
    SizeMismatchError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup


class ArrayMetadata(NamedTuple):
    """The name of an array's dtype, and its global shape: the same on all ranks."""

    dtype: str
    shape: tuple[int, ...]


class WriteItem(NamedTuple):
    """A box of an array that a rank writes, inside the box that it holds in memory."""

    name: str
    held: Box
    box: Box


LocalPlan: TypeAlias = list[WriteItem]
"""What one rank writes."""


@dataclass(frozen=True)
class LocalMetadata:
    """What one rank holds: whole arrays, arrays of which it has some boxes or none, and values."""

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
    """What a save consists of, and what each rank writes, by rank; on the coordinator."""

    arrays: dict[str, ArrayMetadata]
    values: dict[str, JSON]
    local_plans: list[LocalPlan]


def make_global_plan(local: Sequence[LocalMetadata]) -> GlobalPlan:
    """Divide the work of a save among the ranks, given what each holds, by rank.

    Each element of each array is written by one of the ranks that hold it. A box that several ranks
    hold is cut, or given to the one of them that has least to write.

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
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for nbytes, name, box, ranks in replicated:
        for part in _cut(box, max(min(len(ranks), nbytes // ALIGNMENT), 1)):
            if len(ranks) < len(loads):
                rank = min(ranks, key=lambda rank: (loads[rank], rank))
            else:
                while loads[heap[0][1]] != heap[0][0]:
                    heapq.heappop(heap)  # the rank has been given more since
                rank = heap[0][1]
            loads[rank] += nbytes * part.count // max(box.count, 1)
            heapq.heappush(heap, (loads[rank], rank))
            plans[rank].append(WriteItem(name, box, part))
    for plan in plans:
        plan.sort(key=lambda item: (item.name, item.box.offsets))
    return GlobalPlan(arrays, values, plans)


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
                    f"{name!r} is {shorten(repr(value), 60)} on rank {rank} and "
                    f"{shorten(repr(values[name]), 60)} on rank {first[name]}; give what differs "
                    "a name of its own on each rank"
                )
    return values


def _json(value: JSON) -> str:
    return json.dumps(value, sort_keys=True)


def _cut(box: Box, parts: int) -> list[Box]:
    """Cut a box into parts along the first dimension that is long enough, or the longest."""
    if parts == 1:
        return [box]
    long = [d for d, size in enumerate(box.sizes) if size >= parts]
    dimension = long[0] if long else max(range(len(box.sizes)), key=box.sizes.__getitem__)
    lengths = split_evenly(box.sizes[dimension], parts)
    return [box.along(dimension, start, size) for start, size in lengths if size]


@cache  # every save asks
def versions() -> Mapping[str, str]:
    """Return the versions of mpidist and of the libraries that write a checkpoint."""
    python = platform.python_version()
    return {"mpidist": __version__, "numpy": np.__version__, "python": python} | hdf5_versions()


def describe(flat: FlatState) -> LocalMetadata:
    """Return the metadata of a rank with this state."""
    local = LocalMetadata(values=flat.values)
    for name, array in flat.arrays.items():
        metadata = ArrayMetadata(name_of(array.dtype), tuple(array.shape))
        if isinstance(array, ShardedArray):
            local.sharded[name] = (metadata, tuple(array.pieces))
        else:
            local.arrays[name] = metadata
    return local


def view_of(array: Array | ShardedArray, item: WriteItem) -> Array:
    """Return the elements that an item names: a view of what the rank holds."""
    held = array.pieces[item.held] if isinstance(array, ShardedArray) else array
    return held if item.box == item.held else view_of_box(held, item.held, item.box)


@dataclass(frozen=True)
class SavePlan:
    """What a rank knows of a save that is about to begin: what it holds, and what it writes.

    `coordinator` is, on rank 0, the manifest without its files and arrays, and the plan of all
    ranks.
    """

    id: str
    directory: Path
    flat: FlatState
    local: LocalPlan
    coordinator: tuple[Manifest, GlobalPlan] | None


class _Held(NamedTuple):
    """What this rank holds, and the digest of its values."""

    flat: FlatState
    metadata: JSON
    local: LocalMetadata
    values: bytes

    @classmethod
    def of(cls, flat: FlatState, metadata: JSON = None) -> _Held:
        local = describe(flat)
        return cls(flat, metadata, local, _digest(json.dumps(local.values, sort_keys=True)))

    @property
    def without_values(self) -> LocalMetadata:
        """All that a plan depends on: names, but not the values themselves."""
        return replace(self.local, values=dict.fromkeys(self.local.values))

    @property
    def common(self) -> bytes:
        """Digest of the values, and of the arrays that this rank holds whole."""
        return _digest(f"{sorted(self.local.arrays.items())}{self.values.hex()}")


class _Cached(NamedTuple):
    """The plan of the last save, which serves again if all ranks hold what they held.

    The names of the values are held, without the values. Equal ids, those of the save that the
    plan was made for, mean the same plan. Rank 0 has that of all ranks.
    """

    held: LocalMetadata
    id: str
    local: LocalPlan
    plan: GlobalPlan | None


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode(errors="surrogatepass"))  # names of files have them


class Planner:
    """Plans the saves of a group, which nothing else uses, and keeps the plan of the last one."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.last: _Cached | None = None

    def plan(
        self,
        state: State,
        metadata: JSON,
        path: str | os.PathLike[str],
        step: int,
        *,
        file: str = "",
        check: Callable[[], None],
    ) -> SavePlan:
        """Plan a save with all ranks.

        Parameters
        ----------
        state, metadata, path, step
            As for `save`; rank 0 makes the directory.
        file : str, optional
            Name of the file that all ranks write together; each writes its own when omitted.
        check : callable
            Called first; all ranks raise what it raises.

        Raises
        ------
        DistributedError
            On every rank, with the same message, if something is wrong on any of them.

        Notes
        -----
        Collective over the group; blocks. One all_gather of 65 bytes where names, shapes and boxes
        are those of the save before; else a gather of what is held, and a scatter of plans.
        """
        group = self._group
        held, problem = self._described(state, metadata, check)
        directory = Path(str(path))  # for messages, if the step has no directory
        try:
            directory = step_directory(path, step)
        except DistributedError as error:
            problem = problem or type(error)(f"rank {group.rank}: {error}")
        except (TypeError, ValueError) as error:
            problem = problem or UnsupportedOperationError(f"rank {group.rank}: {error}")
        target = str(directory / file)
        without_values = held.without_values
        last = self.last
        if problem is not None or (last is not None and last.held != without_values):
            last = None
        identity = self._reused(last, held, target, directory)
        if identity is not None and last is not None:
            local, plan = last.local, last.plan
            plan = plan and replace(plan, values=held.local.values)
        else:
            identity, local, plan = self._planned(held, problem, target, directory)
            self.last = _Cached(without_values, identity, local, plan)
        if plan is None:
            return SavePlan(identity, directory, held.flat, local, None)
        header = Manifest(
            id=identity,
            step=step_of(directory),
            created="",
            world_size=group.size,
            versions=versions(),
            crossovers=asdict(group.crossovers),
            metadata=held.metadata,
            values=plan.values,
        )
        return SavePlan(identity, directory, held.flat, local, (header, plan))

    def _described(
        self, state: State, metadata: JSON, check: Callable[[], None]
    ) -> tuple[_Held, DistributedError | None]:
        """Return what this rank holds, and what is wrong with it or with an earlier save."""
        rank = self._group.rank
        try:
            check()
            return _Held.of(flatten(state), as_json("metadata", metadata)), None
        except DistributedError as error:
            return _Held.of(FlatState()), type(error)(f"rank {rank}: {error}")
        except Exception as error:  # noqa: BLE001  # an object's own, which all ranks must learn
            message = f"rank {rank}: {type(error).__name__}: {error}"
            return _Held.of(FlatState()), CheckpointError(message)

    def _reused(
        self, last: _Cached | None, held: _Held, target: str, directory: Path
    ) -> str | None:
        """Return the id of a save that follows the last plan, or None on all ranks.

        All ranks follow it if none has a problem, each holds what it held, and all values are the
        same on all ranks. Rank 0 has made the directory then.
        """
        group = self._group
        ready = last is not None
        identity = uuid.uuid4()
        if ready and group.rank == 0:
            try:
                _create(directory, identity.hex)
            except DistributedError:  # reported to all when they plan anew
                ready = False
        digests = [held.values, _digest(target), _digest("" if last is None else last.id)]
        row = b"".join([bytes([ready]), *digests, identity.bytes])
        table = all_gather(np.frombuffer(row, np.uint8), group).reshape(group.size, -1)
        if table[:, 0].all() and (table[:, :49] == table[0, :49]).all():
            return bytes(table[0, 49:]).hex()
        if ready and group.rank == 0:
            clear(directory, identity.hex)
        return None

    def _planned(
        self, held: _Held, problem: DistributedError | None, target: str, directory: Path
    ) -> tuple[str, LocalPlan, GlobalPlan | None]:
        """Let rank 0 plan with what all ranks hold, make the directory, and send what each writes.

        Returns the id of the save, what this rank writes, and on rank 0 the plan of all ranks.
        """
        group = self._group
        local, problems = self._gathered(held, problem, target)
        plan: GlobalPlan | None = None
        orders: list[tuple[DistributedError | None, str, LocalPlan]] | None = None
        if group.rank == 0:
            identity = uuid.uuid4().hex
            try:
                if problems:
                    raise problems[0]  # noqa: TRY301  # its message is completed below
                plan = make_global_plan(local)
                _create(directory, identity)
                orders = [(None, identity, items) for items in plan.local_plans]
            except DistributedError as error:
                refusal = type(error)(f"save of {directory} on {group}: {error}")
                orders = [(refusal, "", [])] * group.size
            except Exception as error:  # noqa: BLE001  # such as no memory; the others must not wait
                what = f"save of {directory} on {group}: rank 0: {type(error).__name__}: {error}"
                orders = [(CheckpointError(what), "", [])] * group.size
        problem, identity, items = scatter_object(orders, group)
        if problem is not None:
            raise problem
        return identity, items, plan

    def _gathered(
        self, held: _Held, problem: DistributedError | None, target: str
    ) -> tuple[list[LocalMetadata], list[DistributedError]]:
        """Return, on rank 0, what each rank holds, and what is wrong; elsewhere nothing."""
        group, local, common = self._group, held.local, held.common
        rows = gather_object((problem, target, common, local.sharded), group)
        # Most often all ranks hold the same arrays whole, and one list of them is enough.
        others = (
            None if rows is None else [r for r, (*_, key, _) in enumerate(rows) if key != common]
        )
        others = broadcast_object(others, group)
        lists = gather_object(local if group.rank in others else None, group) if others else None
        if rows is None:
            return [], []
        gathered = [
            lists[rank]
            if lists is not None and rank in others
            else LocalMetadata(local.arrays, sharded, local.values)
            for rank, (*_, sharded) in enumerate(rows)
        ]
        problems = [error for error, *_ in rows if error is not None]
        problems += [
            CollectiveMismatchError(
                f"rank {rank} saves to {other}, and rank 0 to {target}; give the same path, step "
                "and single_file on all ranks, and an absolute path where their working "
                "directories differ"
            )
            for rank, (_, other, *_) in enumerate(rows)
            if other != target
        ]
        return gathered, problems


def _create(directory: Path, identity: str) -> None:
    """Make the directory of a step, or empty one that a killed save has left."""
    if is_being_written(directory):
        raise CheckpointError("an earlier save of this step is still under way; wait for it")
    try:
        create_directory(directory, identity)
    except CheckpointError as error:
        raise CheckpointError(f"rank 0: {error}") from error
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        raise CheckpointError(f"rank 0 cannot make it: {type(error).__name__}: {error}") from error


def report_of(written: Written) -> JSON:
    """Return what `assemble` has to know of a file."""
    boxes = [(name, box.as_json()) for name, box in written.boxes]
    if written.file is None:
        return {"boxes": boxes}
    datasets = {name: (d.byte, d.shape) for name, d in written.file.datasets.items()}
    return {"file": (written.file.name, written.file.size, datasets), "boxes": boxes}


def foresee(header: Manifest, plan: GlobalPlan) -> Manifest:
    """Return the manifest that `assemble` will return, without bytes, sizes and digests.

    It has all that a view needs, before a file is written.
    """
    files = []
    boxes: dict[str, list[StoredBox]] = {name: [] for name in plan.arrays}
    dtypes = {name: dtype_of(array.dtype) for name, array in plan.arrays.items()}
    for rank, items in enumerate(plan.local_plans):
        specs = (BoxSpec(item.name, item.box, dtypes[item.name]) for item in items)
        ordered, datasets, positions = lay_out(specs)
        shapes = {name: StoredDataset(0, shape) for name, (shape, _) in datasets.items()}
        files.append(StoredFile(file_name(rank), 0, shapes))
        for spec, (dataset, first) in zip(ordered, positions, strict=True):
            boxes[spec.name].append(StoredBox(spec.box, rank, dataset, first, b""))
    return replace(header, files=tuple(files), arrays=_arrays(plan.arrays, boxes))


def assemble(
    header: Manifest, metadata: Mapping[str, ArrayMetadata], reports: Sequence[JSON]
) -> Manifest:
    """Return the header completed by files and arrays, from what `report_of` says of each file."""
    files: list[StoredFile] = []
    boxes: dict[str, list[StoredBox]] = {name: [] for name in metadata}
    for report in reports:
        if "file" in report:
            name, size, datasets = report["file"]
            stored = {key: StoredDataset(byte, tuple(shp)) for key, (byte, shp) in datasets.items()}
            files.append(StoredFile(name, size, stored))
        for array, entry in report["boxes"]:
            boxes[array].append(StoredBox.from_json(entry | {"file": len(files) - 1}))
    arrays = _arrays(metadata, boxes)
    created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return replace(header, created=created, files=tuple(files), arrays=arrays)


def _arrays(
    metadata: Mapping[str, ArrayMetadata], boxes: Mapping[str, Sequence[StoredBox]]
) -> dict[str, StoredArray]:
    return {
        name: StoredArray(dtype_of(array.dtype), array.shape, tuple(boxes[name]))
        for name, array in metadata.items()
    }
