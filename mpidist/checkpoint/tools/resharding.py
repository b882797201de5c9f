"""`reshard`: the checkpoint of any number of ranks, as any other number would have saved it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import as_bytes
from mpidist.checkpoint.directory import (
    Checkpoint,
    clear,
    commit,
    create_directory,
    find,
    step_directory,
)
from mpidist.checkpoint.format import view
from mpidist.checkpoint.format.manifest import JSON, ChunkGrid, Manifest, digests_of, name_of
from mpidist.checkpoint.loading.reading import (
    MAX_READ,
    ArrayTargets,
    BoxRequest,
    Files,
    ReadItem,
    check_files,
    contiguous_ranges,
    read_items,
    scatter,
)
from mpidist.checkpoint.saving.plan import (
    ArrayMetadata,
    GlobalPlan,
    LocalMetadata,
    assemble,
    make_global_plan,
    report_of,
    versions,
)
from mpidist.checkpoint.saving.writing import BoxSource, file_name, write_file
from mpidist.errors import CheckpointError, DistributedError, InvalidWorldSizeError

Progress: TypeAlias = Callable[[int], object]
"""Called with how many more bytes are done."""


def ignore_progress(nbytes: int) -> None:
    """Do nothing."""


def reshard(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    num_ranks: int,
    *,
    step: int | str = "latest",
    progress: Progress = ignore_progress,
) -> Checkpoint:
    """Write a checkpoint anew, split evenly over another number of ranks.

    Parameters
    ----------
    src : path
        Directory of checkpoints to read from.
    dst : path
        Directory of checkpoints to write to; made if missing. Another one than `src`, for the step
        stays the same.
    num_ranks : int
        Ranks of the new checkpoint. It has as many files, with the boxes that `save` would write if
        each of so many ranks held all arrays whole.
    step : int or "latest", optional
        Which one; the newest complete one when omitted.
    progress : callable, optional
        Called now and then with how many more bytes are done, of `Checkpoint.nbytes`.

    Returns
    -------
    Checkpoint
        The new one, complete and on disk: with the step, metadata and values of the old one, and
        the versions of what has written it now.

    Raises
    ------
    CheckpointNotFoundError
        If there is none in `src`.
    CheckpointCorruptError, CheckpointMissingShardError
        If a file of it is damaged, cut off or missing: all digests are compared.
    CheckpointError
        If `dst` has a complete checkpoint of this step, or cannot be written.
    InvalidWorldSizeError
        If `num_ranks` is less than 1.

    Notes
    -----
    Local: without any group. Loading does not need it: a checkpoint loads on any number of ranks.
    Memory: some blocks of at most 8 MiB, whatever the arrays' sizes, and the manifest. A kill
    leaves a directory without a manifest, which is no checkpoint.
    """
    checkpoint = find(src, step)
    manifest = checkpoint.manifest
    check_files(checkpoint.directory, manifest)
    with Reader(checkpoint) as reader:
        return build(
            dst,
            reader.sources(),
            manifest.values,
            step=checkpoint.step,
            num_ranks=num_ranks,
            metadata=manifest.metadata,
            crossovers=manifest.crossovers,
            progress=progress,
        )


@dataclass(frozen=True)
class ArraySource:
    """An array of which any box can be read, and which need not be in memory.

    The dtype may have any byte order; `read` returns the elements of a box, with the box's sizes.
    """

    shape: tuple[int, ...]
    dtype: DType
    read: Callable[[Box], Array]


class Reader:
    """Reads any part of any array of a checkpoint, each verified by its digests.

    A context manager. Memory: 1 MiB, and what is asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._manifest = checkpoint.manifest
        self._files = Files(checkpoint.directory, self._manifest)
        self._memory = np.empty(MAX_READ, np.uint8)

    def __enter__(self) -> Reader:
        """Return the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._files.__exit__()

    def read(self, name: str, box: Box) -> Array:
        """Return a part of an array; raises CheckpointError as `Files.load` does."""
        out: Array = np.empty(box.sizes, self._manifest.arrays[name].dtype)
        for item, data in self.items(name, box):
            scatter(self._manifest, item, data, {name: ArrayTargets([(box, out)])})
        return out

    def items(self, name: str, box: Box) -> Iterator[tuple[ReadItem, Array]]:
        """Yield which chunks have to be read for a part of an array, and their elements.

        The elements are there until the next ones are asked for.
        """
        for item in read_items(self._manifest, [BoxRequest(name, box)]):
            yield item, self._files.load([item], [self._memory])[0]

    def sources(self) -> dict[str, ArraySource]:
        """Return all arrays, to be read while this is open."""
        return {
            name: ArraySource(array.shape, array.dtype, partial(self.read, name))
            for name, array in self._manifest.arrays.items()
        }


def build(
    path: str | os.PathLike[str],
    sources: Mapping[str, ArraySource],
    values: Mapping[str, JSON],
    *,
    step: int,
    num_ranks: int = 1,
    metadata: JSON = None,
    crossovers: JSON = None,
    progress: Progress = ignore_progress,
) -> Checkpoint:
    """Write the checkpoint that `save` would, called by ranks that all hold all of the state.

    Parameters
    ----------
    sources : mapping of str to ArraySource
        The arrays by name; each is read part by part.
    values : mapping of str to JSON value
        Everything that is not an array, by name.
    step : int
        From 0 to 2**63 - 1; ValueError otherwise.
    num_ranks : int, optional
        How many ranks, and so how many files.
    metadata, crossovers : JSON value, optional
        As the manifest shall have them.

    Raises
    ------
    CheckpointError
        If there is a complete checkpoint of this step, or it cannot be written, or a source not be
        read. There is no such checkpoint then, and earlier ones are as they were.
    InvalidWorldSizeError
        If `num_ranks` is less than 1.

    Notes
    -----
    Local. Memory: some blocks of at most 8 MiB, whatever the arrays' sizes. Parts of an array are
    read as its new chunks need them. See [Note: commit].
    """
    if num_ranks < 1:
        raise InvalidWorldSizeError(f"a checkpoint is of at least 1 rank, got {num_ranks}")
    arrays = {name: ArrayMetadata(name_of(s.dtype), s.shape) for name, s in sources.items()}
    plan = make_global_plan([LocalMetadata(arrays=arrays, values=dict(values))] * num_ranks)
    header = Manifest(
        id=uuid.uuid4().hex,
        step=step,
        created="",
        world_size=num_ranks,
        versions=versions(),
        crossovers=crossovers,
        metadata=metadata,
        values=plan.values,
    )
    directory = step_directory(path, step)
    try:
        create_directory(directory, header.id)
        try:
            _write(directory, header, plan, sources, progress)
        except BaseException:
            clear(directory, header.id)
            raise
    except DistributedError as error:
        raise type(error)(f"{directory} is not written: {error}") from error
    except OSError as error:
        message = f"{directory} cannot be written: {type(error).__name__}: {error}"
        raise CheckpointError(message) from error
    return Checkpoint(directory)


def _write(
    directory: Path,
    header: Manifest,
    plan: GlobalPlan,
    sources: Mapping[str, ArraySource],
    progress: Progress,
) -> None:
    reports = []
    for rank, items in enumerate(plan.local_plans):
        boxes = []
        for name, _, box in items:
            dtype = sources[name].dtype.newbyteorder("=")
            boxes.append(_StreamedBox(name, box, dtype, sources[name], progress))
        attributes: dict[str, str | int] = {
            "id": header.id,
            "step": header.step,
            "rank": rank,
            "world_size": header.world_size,
        }
        written = write_file(directory / file_name(rank), boxes, attributes)
        reports.append(report_of(written))
    manifest = assemble(header, plan.arrays, reports)
    view.create_view(directory / view.VIEW, manifest)
    commit(directory, manifest)


@dataclass
class _StreamedBox(BoxSource):
    """A box of an array that is read, digested and written some chunks at a time."""

    source: ArraySource
    progress: Progress
    _digests: list[bytes] = field(default_factory=list)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield its bytes, some chunks at a time."""
        itemsize = self.dtype.itemsize
        grid = ChunkGrid.of(self.box.sizes, itemsize)
        self._digests.clear()
        for _, _, region in grid.joined(np.arange(grid.count), MAX_READ):
            data = self.source.read(region.placed_in(self.box))
            data = np.ascontiguousarray(data, self.dtype.newbyteorder("<")).reshape(region.sizes)
            self._digests.append(digests_of(data, grid.over(region)))
            offset, flat = 0, as_bytes(data)
            for start, length in contiguous_ranges(region, self.box.sizes):
                yield start * itemsize, flat[offset : offset + length * itemsize]
                offset += length * itemsize
            self.progress(data.nbytes)

    def digests(self) -> bytes:
        """Return the digests of its chunks, in the order of their numbers."""
        return b"".join(self._digests)
