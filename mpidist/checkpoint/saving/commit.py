"""The end of a save: all ranks learn whether all have written, and rank 0 writes the manifest.

[Note: commit] A checkpoint exists if its manifest does. Every rank writes its file under a
temporary name, syncs it, renames it and syncs the directory, and then reports to rank 0 what lies
where. When rank 0 has the reports of all ranks, it writes the manifest in the same way, and answers
all of them. So there is no instant at which a manifest names something that is not on disk, and a
rank that fails, or dies, leaves a directory without a manifest, which is no checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpidist._types import Array
from mpidist.checkpoint.directory import claimed, clear
from mpidist.checkpoint.format import view
from mpidist.checkpoint.format.files import (
    naming,
    rename_synced,
    sync_directory,
    temporary,
    write_at,
)
from mpidist.checkpoint.format.manifest import (
    JSON,
    MANIFEST,
    MOST_BYTES,
    Manifest,
    StoredArray,
    StoredBox,
    StoredDataset,
    StoredFile,
    dtype_of,
)
from mpidist.checkpoint.saving.planning import ArrayMetadata, GlobalPlan
from mpidist.checkpoint.saving.writing import BoxSpec, Written, call_now, file_name, lay_out
from mpidist.errors import CheckpointError
from mpidist.group import ProcessGroup
from mpidist.point_to_point import irecv, isend

_REPORT, _VERDICT = 1, 2
"""Tags of the messages to and from rank 0."""


@dataclass(frozen=True)
class Save:
    """What a save is, and how far it has come on this rank.

    Attributes
    ----------
    directory : Path
        The directory of the step.
    coordinator : (Manifest, GlobalPlan) or None
        On rank 0, the manifest without files and arrays, and the plan of all ranks.
    written : Future of Written
        What becomes of this rank's file.
    viewed : bool
        Whether rank 0 makes the view with its file.
    """

    directory: Path
    coordinator: tuple[Manifest, GlobalPlan] | None
    written: Future[Written]
    viewed: bool = False


class Pending(Protocol):
    """What may take its time."""

    def done(self) -> bool:
        """Return whether it is over; may drive it."""
        ...

    def wait(self) -> object:
        """Return when it is over."""


class _InThread:
    """What another thread is doing."""

    def __init__(self, future: Future[Any], what: str, timeout: float) -> None:
        self._future = future
        self._what = what
        self._timeout = timeout

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        wait([self._future], self._timeout)
        if not self._future.done():
            raise CheckpointError(
                f"{self._what} has not ended within {self._timeout:g} s; the disk is slow or "
                "hangs. A longer timeout of the group gives it more time"
            )


def steps_of(save: Save, group: ProcessGroup) -> Iterator[Pending]:
    """Take a save from the writing of this rank's file to its commit.

    Yields
    ------
    Pending
        What has to be over before the next step.

    Raises
    ------
    CheckpointError
        On every rank, with the same message, if a rank could not write.

    Notes
    -----
    Nothing here depends on when the ranks ask: rank 0 gets one message from each rank and sends one
    to each, on tags of their own.
    """
    yield _InThread(save.written, f"writing {save.directory}", group.timeout)
    own = _report(save.written, group.rank)
    if group.rank:
        sent = isend(_packed(own), group, dst=0, tag=_REPORT)
        answer = irecv(group, src=0, tag=_VERDICT)
        yield sent
        yield answer
        problem = _unpacked(answer.wait())
    else:
        receives = [irecv(group, src=rank, tag=_REPORT) for rank in range(1, group.size)]
        yield from receives
        reports = [own, *(_unpacked(receive.wait()) for receive in receives)]
        problem = _first_problem(reports)
        if problem is None:
            problem = _failure(call_now(_conclude, save, reports), 0)
        if problem is not None:
            assert save.coordinator is not None, "rank 0 planned it"
            problem = f"{problem}. {clear(save.directory, save.coordinator[0].id)}"
        verdict = _packed(problem)
        yield from [isend(verdict, group, dst=rank, tag=_VERDICT) for rank in range(1, group.size)]
    if problem is not None:
        raise CheckpointError(
            f"save of {save.directory} on group {group.name!r}: {problem}, and earlier ones are as "
            "they were"
        )


def _conclude(save: Save, reports: Sequence[JSON]) -> None:
    """Do on rank 0 what is left, all files being on disk."""
    assert save.coordinator is not None, "rank 0 planned it"
    header, plan = save.coordinator
    manifest = assemble(header, plan.arrays, reports)
    if not save.viewed:
        view.create_view(save.directory / view.VIEW, manifest)
    commit(save.directory, manifest)


def commit(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, all other files being on disk: from then on the checkpoint exists.

    Raises
    ------
    OSError
        If it cannot be written; there is none then, unless the disk does not even take it back.
    CheckpointError
        If it is larger than what is read, or the directory belongs to another save by now.
    """
    sync_directory(directory.parent)
    path = directory / MANIFEST
    part = temporary(path)
    data = np.frombuffer(manifest.to_bytes(), np.uint8)
    if data.nbytes > MOST_BYTES:
        raise CheckpointError(
            f"the manifest would have {data.nbytes} bytes, and at most {MOST_BYTES} are read; save "
            "fewer or larger pieces"
        )
    with naming(part, data.nbytes), claimed(directory, manifest.id) as descriptor:
        os.ftruncate(descriptor, 0)
        write_at(descriptor, data, 0)
        os.fsync(descriptor)
    try:
        rename_synced(part, path)
    except FileExistsError:  # another save's, which is complete
        raise
    except OSError:
        with suppress(OSError):  # the first one says more
            path.replace(part)
        raise


def _report(written: Future[Written], rank: int) -> JSON:
    """Return what a rank reports to rank 0 about its file."""
    problem = _failure(written, rank)
    if problem is not None:
        return {"problem": problem}
    return report_of(written.result())


def report_of(written: Written) -> JSON:
    """Return what `assemble` has to know of a file."""
    boxes = [(name, box.as_json()) for name, box in written.boxes]
    if written.file is None:
        return {"boxes": boxes}
    datasets = {name: (d.byte, d.shape) for name, d in written.file.datasets.items()}
    return {"file": (written.file.name, written.file.size, datasets), "boxes": boxes}


def _failure(future: Future[Any], rank: int) -> str | None:
    error = future.exception()
    if error is None:
        return None
    unseen = isinstance(error, FileNotFoundError)  # rank 0 has made the directory
    cure = "; all ranks must see the directory that rank 0 has made" if unseen else ""
    return f"rank {rank} failed: {type(error).__name__}: {error}{cure}"


def _first_problem(reports: Sequence[JSON]) -> str | None:
    return next((report["problem"] for report in reports if "problem" in report), None)


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


def _packed(value: JSON) -> Array:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _unpacked(data: Array) -> JSON:
    return json.loads(data.tobytes())
