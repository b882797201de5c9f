"""The plan of a save: what the ranks hold together, and which of them writes what.

Every rank describes what it holds (`LocalMetadata`). Rank 0, the coordinator, makes the
`GlobalPlan` from that and sends each rank its `LocalPlan`. Where nothing but values has changed
since the save before, all ranks use the plan of that one again.
"""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xxhash

from mpidist import __version__
from mpidist._types import Array
from mpidist.arrays.shards import ShardedArray
from mpidist.checkpoint.directory import clear, create_directory, step_directory, step_of
from mpidist.checkpoint.format.files import hdf5_versions
from mpidist.checkpoint.format.manifest import (
    JSON,
    Manifest,
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
    dtype_of,
    name_of,
)
from mpidist.checkpoint.saving.plan import (
    ArrayMetadata,
    GlobalPlan,
    LocalMetadata,
    LocalPlan,
    WriteItem,
    make_global_plan,
)
from mpidist.checkpoint.saving.writing import BoxSpec, Written, file_name, is_being_written, lay_out
from mpidist.checkpoint.state import FlatState, State, as_json, flatten
from mpidist.collectives import all_gather, broadcast_object, gather_object, scatter_object
from mpidist.errors import (
    CheckpointError,
    CollectiveMismatchError,
    DistributedError,
    UnsupportedOperationError,
)
from mpidist.group import ProcessGroup


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
    if item.box == item.held:
        return held
    index: Any = (*item.box.relative_to(item.held).slices, ...)  # a view, also of a 0-d array
    return cast("Array", held[index])


@dataclass(frozen=True)
class SavePlan:
    """What a rank knows of a save that is about to begin.

    Attributes
    ----------
    id : str
        Identifies the save.
    directory : Path
        The directory of the step.
    flat : FlatState
        What this rank holds.
    local : LocalPlan
        What this rank writes.
    coordinator : (Manifest, GlobalPlan) or None
        On rank 0, the manifest without its files and arrays, and the plan of all ranks.
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


class _Order(NamedTuple):
    """What rank 0 sends to a rank: what to write, or why nothing is saved."""

    problem: DistributedError | None
    id: str
    local: LocalPlan


class _Cached(NamedTuple):
    """The plan of the last save, which serves again if all ranks hold what they held.

    Attributes
    ----------
    held : LocalMetadata
        What this rank held, without the values.
    id : str
        The save that the plan was made for: equal ids mean the same plan.
    local : LocalPlan
        What this rank wrote.
    plan : GlobalPlan or None
        On rank 0, the plan of all ranks.
    """

    held: LocalMetadata
    id: str
    local: LocalPlan
    plan: GlobalPlan | None


def _digest(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode(errors="surrogatepass"))  # names of files have them


class Planner:
    """Plans the saves of a group, and keeps the plan of the last one.

    Parameters
    ----------
    group : ProcessGroup
        The ranks that save; used by nothing else.
    """

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

        Returns
        -------
        SavePlan
            What this rank holds and writes.

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
            order, plan = _Order(None, identity.hex(), last.local), last.plan
            plan = plan and replace(plan, values=held.local.values)
        else:
            order, plan = self._planned(held, problem, target, directory)
            self.last = _Cached(without_values, order.id, order.local, plan)
        if plan is None:
            return SavePlan(order.id, directory, held.flat, order.local, None)
        header = Manifest(
            id=order.id,
            step=step_of(directory),
            created="",
            world_size=group.size,
            versions=versions(),
            crossovers=asdict(group.crossovers),
            metadata=held.metadata,
            values=plan.values,
        )
        return SavePlan(order.id, directory, held.flat, order.local, (header, plan))

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
    ) -> bytes | None:
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
            return bytes(table[0, 49:])
        if ready and group.rank == 0:
            clear(directory, identity.hex)
        return None

    def _planned(
        self, held: _Held, problem: DistributedError | None, target: str, directory: Path
    ) -> tuple[_Order, GlobalPlan | None]:
        """Gather what all ranks hold, let rank 0 plan, and send each rank what it writes."""
        local, problems = self._gathered(held, problem, target)
        plan, orders = None, None
        if local:
            plan, orders = self._decided(local, problems, directory)
        order: _Order = scatter_object(orders, self._group)
        if order.problem is not None:
            raise order.problem
        return order, plan

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
        problems += _elsewhere([target for _, target, *_ in rows])
        return gathered, problems

    def _decided(
        self, local: list[LocalMetadata], problems: list[DistributedError], directory: Path
    ) -> tuple[GlobalPlan | None, list[_Order]]:
        """Make the plan and the directory, on rank 0."""
        identity = uuid.uuid4().hex
        try:
            if problems:
                raise problems[0]  # noqa: TRY301  # its message is completed below
            plan = make_global_plan(local)
            _create(directory, identity)
        except DistributedError as error:
            problem = type(error)(f"save of {directory} on {self._group}: {error}")
        except Exception as error:  # noqa: BLE001  # such as no memory; the others must not wait
            problem = CheckpointError(
                f"save of {directory} on {self._group}: rank 0: {type(error).__name__}: {error}"
            )
        else:
            return plan, [_Order(None, identity, items) for items in plan.local_plans]
        return None, [_Order(problem, "", [])] * len(local)


def _elsewhere(targets: Sequence[str]) -> Iterator[DistributedError]:
    """Yield an error for each rank that would write elsewhere than rank 0."""
    for rank, target in enumerate(targets):
        if target != targets[0]:
            yield CollectiveMismatchError(
                f"rank {rank} saves to {target}, and rank 0 to {targets[0]}; give the same path, "
                "step and single_file on all ranks, and an absolute path where their working "
                "directories differ"
            )


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
