"""Checkpoints that one process writes alone, from arrays that it reads part by part."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpidist._types import Array, DType
from mpidist.arrays.boxes import Box
from mpidist.arrays.namespaces import as_bytes
from mpidist.checkpoint.directory import Checkpoint, clear, make_room, step_directory
from mpidist.checkpoint.format import hdf5
from mpidist.checkpoint.format.manifest import JSON, Manifest, name_of
from mpidist.checkpoint.format.tiles import Tiling, digests_of
from mpidist.checkpoint.format.versions import versions
from mpidist.checkpoint.loading.units import UNIT, runs_of
from mpidist.checkpoint.saving.commit import VIEW, assemble, commit, report_of
from mpidist.checkpoint.saving.plan import Declaration, Kind, Plan, make_plan
from mpidist.checkpoint.saving.writing import shard_name, write_file
from mpidist.checkpoint.tools.sources import Progress, Source, unheard
from mpidist.errors import CheckpointError, DistributedError, InvalidWorldSizeError

__all__ = ["build"]


def build(
    path: str | os.PathLike[str],
    sources: Mapping[str, Source],
    values: Mapping[str, JSON],
    *,
    step: int,
    num_ranks: int = 1,
    metadata: JSON = None,
    crossovers: JSON = None,
    progress: Progress = unheard,
) -> Checkpoint:
    """Write the checkpoint that `save` would, called by ranks that all hold all of the state.

    Parameters
    ----------
    path : path
        Directory of checkpoints.
    sources : mapping of str to Source
        The arrays.
    values : mapping of str to JSON value
        All else.
    step : int
        From 0 to 2**63 - 1; ValueError otherwise.
    num_ranks : int, optional
        How many ranks, and so how many files.
    metadata, crossovers : JSON value, optional
        As the manifest shall have them.
    progress : callable, optional
        Is told how many more bytes are written.

    Returns
    -------
    Checkpoint
        Complete and on disk.

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
    read as its new tiles need them. See [Note: commit].
    """
    if num_ranks < 1:
        raise InvalidWorldSizeError(f"a checkpoint is of at least 1 rank, got {num_ranks}")
    kinds = {name: Kind(name_of(s.dtype), s.shape) for name, s in sources.items()}
    plan = make_plan([Declaration(whole=kinds, values=dict(values))] * num_ranks)
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
        make_room(directory, header.id)
        try:
            _write(directory, header, plan, sources, progress)
        except BaseException:
            clear(directory, header.id)
            raise
    except DistributedError as error:
        raise type(error)(f"{directory} is not written: {error}") from error
    except OSError as error:
        words = f"{directory} cannot be written: {type(error).__name__}: {error}"
        raise CheckpointError(words) from error
    return Checkpoint(directory)


def _write(
    directory: Path, header: Manifest, plan: Plan, sources: Mapping[str, Source], progress: Progress
) -> None:
    results = []
    for rank, assignment in enumerate(plan.assignments):
        pieces = [
            _Streamed(part.name, part.box, sources[part.name], progress) for part in assignment
        ]
        attributes: dict[str, str | int] = {
            "id": header.id,
            "step": header.step,
            "rank": rank,
            "world_size": header.world_size,
        }
        results.append(report_of(write_file(directory / shard_name(rank), pieces, attributes)))
    manifest = assemble(header, plan.kinds, results)
    hdf5.create_view(directory / VIEW, manifest)
    commit(directory, manifest)


@dataclass
class _Streamed:
    """A part of an array that is read, digested and written tile by tile: a `Writable`."""

    name: str
    box: Box
    source: Source
    progress: Progress
    _digests: list[bytes] = field(default_factory=list)

    @property
    def dtype(self) -> DType:
        """Of the array."""
        native: DType = self.source.dtype.newbyteorder("=")
        return native

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return self.box.count * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """Yield its bytes, some tiles at a time."""
        itemsize = self.dtype.itemsize
        tiling = Tiling.of(self.box.sizes, itemsize)
        self._digests.clear()
        for _, _, region in tiling.joined(np.arange(tiling.count), UNIT):
            data = self.source.read(region.placed_in(self.box))
            data = np.ascontiguousarray(data, self.dtype.newbyteorder("<")).reshape(region.sizes)
            self._digests.append(digests_of(data, tiling.over(region)))
            place, flat = 0, as_bytes(data)
            for start, length in runs_of(region, self.box.sizes):
                yield start * itemsize, flat[place : place + length * itemsize]
                place += length * itemsize
            self.progress(data.nbytes)

    def digests(self) -> bytes:
        """Return the digests of its tiles, in the order of their numbers."""
        return b"".join(self._digests)
